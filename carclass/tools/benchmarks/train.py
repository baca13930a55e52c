"""The unfrozen stage in a worker of Ray Train, against a plain script in a process without Ray, in photos per second.

What each side does is told in train_in_process.py. One training process on either side, with all cores of the machine
or with one GPU; the sides take turns, and Ray idles while the plain script runs.
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
from carclass.progress import say
from carclass.tools.benchmarks import labelled, plain_training, train_in_process
from carclass.training.dataloader import PhotoBlock
from carclass.training.train import MALLOC_ENV


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on a GPU, if the cluster has one, else on all CPUs."""
    given = train_in_process.settings(labelled.backbone_file(weights))
    connection.connect()
    use_gpu = resources.decide_gpus(None, 1, "--in-process", resources.TRAIN)
    chosen = train_in_process.choose(photos, "cuda" if use_gpu else "cpu")
    plain_folder = labelled.lay_out(chosen, folder / "plain") / "train"
    blocks = [ray.put(block._asdict()) for block in labelled.decode(chosen["train"], given.model.image_size)]
    num_classes = labelled.num_classes(chosen)
    task = {"blocks": blocks, "given": given.model_dump(), "num_classes": num_classes}
    task["num_threads"] = 1 if use_gpu else int(ray.cluster_resources()["CPU"])
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "on_device": []}
    for turn in range(train_in_process.ROUNDS):
        rates["plain"].append(_plain(plain_folder, given, num_classes))
        for side, rate in _ours(task, use_gpu, folder / f"turn-{turn}").items():
            rates[side].append(rate)
        say(", ".join(f"{side} {found[-1]:.2f} photos/s" for side, found in rates.items()))
    return train_in_process.figures(rates, len(chosen["train"]), given)


def _plain(folder: Path, given: TrainSettings, num_classes: int) -> float:
    """The plain script in a fresh process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        arguments = (folder, Path(given.parent), given.model_dump(), num_classes)
        return process.submit(plain_training.unfrozen_rate, *arguments).result()


def _ours(task: dict[str, Any], use_gpu: bool, folder: Path) -> dict[str, float]:
    """A run of Ray Train with one worker, set up as a stage's."""
    trainer = ray.train.torch.TorchTrainer(
        work,  # type: ignore[arg-type]  # here and below, mypy sees Train V1's
        train_loop_config=task,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1} if use_gpu else {"CPU": task["num_threads"]},
        ),
        run_config=ray.train.RunConfig(
            name="turn",
            storage_path=str(folder),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            worker_runtime_env={} if use_gpu else {"env_vars": MALLOC_ENV},
        ),
    )
    return dict(trainer.fit().return_value)  # type: ignore[attr-defined]


def work(task: dict[str, Any]) -> dict[str, float]:
    """The worker's part."""
    torch.set_num_threads(task["num_threads"])
    blocks = [PhotoBlock(**block) for block in ray.get(task["blocks"])]
    given = TrainSettings.model_validate(task["given"])
    return train_in_process.ours(blocks, given, task["num_classes"], ray.train.torch.get_device())
