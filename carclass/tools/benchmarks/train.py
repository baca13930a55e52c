"""Benchmark of the unfrozen stage: a worker of Ray Train against a plain script without Ray.

Both sides are described in train_in_process.py. Each has one training process, with all cores of the machine or one
GPU; the sides alternate, and Ray is idle while the plain script runs.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from carclass.cluster import connection, resources
from carclass.config.schema import TrainSettings
from carclass.progress import print_line
from carclass.tools.benchmarks import labelled, plain_training, train_in_process
from carclass.training.allocator import WORKER_ENV
from carclass.training.dataloader import PhotoBlock


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on a GPU, or on all CPUs without one, and return the figures."""
    settings = train_in_process.make_settings(labelled.backbone_file(weights))
    connection.connect()
    use_gpu = resources.decide_gpus(None, 1, "--in-process", resources.TRAIN)
    splits = train_in_process.choose_photos(photos, "cuda" if use_gpu else "cpu")
    plain_folder = labelled.link_class_folders(splits, folder / "plain") / "train"
    blocks = [ray.put(block._asdict()) for block in labelled.decode(splits["train"], settings.model.image_size)]
    num_classes = labelled.num_classes(splits)
    config = {"blocks": blocks, "settings": settings.model_dump(), "num_classes": num_classes}
    config["num_threads"] = 1 if use_gpu else int(ray.cluster_resources()["CPU"])
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "on_device": []}
    for turn in range(train_in_process.TURNS):
        rates["plain"].append(_run_plain(plain_folder, settings, num_classes))
        for side, rate in _run_ray_train(config, use_gpu, folder / f"turn-{turn}").items():
            rates[side].append(rate)
        print_line(", ".join(f"{side} {turns[-1]:.2f} photos/s" for side, turns in rates.items()))
    return train_in_process.summarise(rates, len(splits["train"]), settings)


def _run_plain(folder: Path, settings: TrainSettings, num_classes: int) -> float:
    """Run the plain script in a new process and return its photos per second."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        args = (folder, Path(settings.parent), settings.model_dump(), num_classes)
        return process.submit(plain_training.measure_unfrozen, *args).result()


def _run_ray_train(config: dict[str, Any], use_gpu: bool, folder: Path) -> dict[str, float]:
    """Run Ray Train with one worker, configured as for a stage, and return the worker's rates."""
    trainer = ray.train.torch.TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # here and below, mypy sees the types of Train V1
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1} if use_gpu else {"CPU": config["num_threads"]},
        ),
        run_config=ray.train.RunConfig(
            name="turn",
            storage_path=str(folder),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            worker_runtime_env={} if use_gpu else {"env_vars": WORKER_ENV},
        ),
    )
    return dict(trainer.fit().return_value)  # type: ignore[attr-defined]


def train_worker(config: dict[str, Any]) -> dict[str, float]:
    """Measure the stage's steps in a worker."""
    torch.set_num_threads(config["num_threads"])
    blocks = [PhotoBlock(**block) for block in ray.get(config["blocks"])]
    settings = TrainSettings.model_validate(config["settings"])
    return train_in_process.measure_steps(blocks, settings, config["num_classes"], ray.train.torch.get_device())
