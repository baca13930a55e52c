"""Benchmark of several workers: steps of the unfrozen stage by Ray Train and DDP, against as many single workers.

Each worker has one GPU, or one CPU core, and the same number of photos per step. The turns alternate; figures are
medians.
"""

from pathlib import Path
from statistics import median
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from carclass.cluster import connection, resources
from carclass.config.schema import TrainSettings
from carclass.progress import print_line
from carclass.tools.benchmarks import labelled, train_in_process
from carclass.tools.benchmarks.timing import ThroughputClock
from carclass.tools.benchmarks.train_in_process import TimedLoader
from carclass.training import loop
from carclass.training.allocator import WORKER_ENV
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.preemption import StepCheck, WorkerContext
from carclass.training.worker import DDP

TURNS = 3
STEPS = {"cpu": 10, "cuda": 120}
SIZE = {"cpu": 128, "cuda": 224}
PER_WORKER = {"cpu": 8, "cuda": 32}
"""Photos of a worker's step."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure one worker and as many as there are GPUs, or two on CPUs, and return the figures."""
    connection.connect()
    use_gpu = resources.decide_gpus(None, 1, "workers", resources.TRAIN)
    device, most = ("cuda", int(ray.cluster_resources()["GPU"])) if use_gpu else ("cpu", 2)
    settings = train_in_process.make_settings(labelled.backbone_file(weights))
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"image_size": SIZE[device]})})
    splits = labelled.choose_photos(photos, {"train": STEPS[device] * PER_WORKER[device] * most})
    blocks = [ray.put(block._asdict()) for block in labelled.decode(splits["train"], SIZE[device])]
    config = {"blocks": blocks, "settings": settings.model_dump(), "num_classes": labelled.num_classes(splits)}
    rates: dict[int, list[float]] = {1: [], most: []}
    for turn in range(TURNS):
        for count, turns in rates.items():
            turns.append(_measure(config, count, device, folder / f"{turn}-{count}"))
        print_line(", ".join(f"{count} worker(s) {turns[-1]:.2f} photos/s" for count, turns in rates.items()))
    ratios = [several / one / most for one, several in zip(rates[1], rates[most], strict=True)]
    return {
        "workers": most,
        "one_photos_per_s": median(rates[1]),
        "several_photos_per_s": median(rates[most]),
        "share_of_ideal": median(ratios),
        "lowest_share": min(ratios),
        "highest_share": max(ratios),
    }


def _measure(config: dict[str, Any], count: int, device: str, folder: Path) -> float:
    """Return the photos per second of all workers together."""
    trainer = ray.train.torch.TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # here and below, mypy sees the types of Train V1
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=count,
            use_gpu=device == "cuda",
            resources_per_worker={"GPU": 1} if device == "cuda" else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name="turn",
            storage_path=str(folder),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            worker_runtime_env={} if device == "cuda" else {"env_vars": WORKER_ENV},
        ),
    )
    return float(trainer.fit().return_value) * count  # type: ignore[attr-defined]


def train_worker(config: dict[str, Any]) -> float:
    """Return the photos per second of one of the workers."""
    torch.set_num_threads(1)
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, count = context.get_world_rank(), context.get_world_size()
    settings = TrainSettings.model_validate(config["settings"])
    assert settings.unfrozen is not None
    stage = settings.unfrozen.model_copy(update={"batch_size": PER_WORKER[device.type] * count})
    settings = settings.model_copy(update={"unfrozen": stage})
    learner = train_in_process.unfrozen_learner(settings, config["num_classes"], device)
    if count > 1:
        forward = ray.train.torch.prepare_model(learner.module, parallel_strategy_kwargs=DDP)
        learner = learner._replace(forward=forward)
    blocks = [PhotoBlock(**block) for block in ray.get(config["blocks"])]
    samples = PhotoSamples(blocks, seed=settings.seed, rank=rank, num_workers=count)
    photos = PhotoLoader(samples, samples, settings.augmentation, stage, device)
    loader = TimedLoader(photos, False, ThroughputClock(device))
    loader.num_steps = min(loader.num_steps, STEPS[device.type])
    callbacks = loop.Callbacks(after_step=StepCheck(WorkerContext(rank, count, device, lambda: False)))
    loop.train_epoch(learner, loader, loop.TrainState(), callbacks)
    return loader.clock.rate()
