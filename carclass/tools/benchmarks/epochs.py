"""Benchmark of per-epoch overhead: checkpoints, metrics, TensorBoard and bookkeeping.

Epochs of the unfrozen stage with all their output on disk alternate with the same steps and the same validation alone.
The time until everything is written counts. Few photos of 64 px, 16 steps of ResNet50 per epoch, make the fixed cost
visible.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch

from carclass.config.schema import ModelSettings, TrainSettings, UnfrozenSettings
from carclass.progress import print_line
from carclass.runs.run import Run
from carclass.tools.benchmarks import labelled
from carclass.tools.benchmarks.train_in_process import unfrozen_learner
from carclass.training import loop
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.dataloader import PhotoLoader, PhotoSamples
from carclass.training.learner import Learner

BATCH_SIZE, NUM_STEPS, NUM_VAL, SIZE = 8, 16, 64, 64
TURNS = 48


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on the GPU, or on all CPUs without one, and return the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainSettings(
        name="benchmark",
        parent=str(labelled.backbone_file(weights)),
        model=ModelSettings(stride_in_1x1=True, image_size=SIZE),
        frozen=None,
        unfrozen=UnfrozenSettings(batch_size=BATCH_SIZE, epochs=TURNS + 1),
    )
    assert settings.unfrozen is not None
    splits = labelled.choose_photos(photos, {"train": BATCH_SIZE * NUM_STEPS, "val": NUM_VAL})
    train, val = (PhotoSamples(labelled.decode(splits[split], SIZE), seed=settings.seed) for split in ("train", "val"))
    loader = PhotoLoader(train, val, settings.augmentation, settings.unfrozen, device)
    learner, state = unfrozen_learner(settings, labelled.num_classes(splits), device), loop.TrainState()
    writer = CheckpointWriter(Run(str(folder), settings), "unfrozen", learner, state)
    callbacks = loop.Callbacks(
        writer.save, writer.finish_epoch, lambda _: loop.StepSignal(is_checkpoint_due=writer.is_checkpoint_due())
    )
    epochs, steps = [], []
    for turn in range(TURNS + 1):  # the first is a warm-up
        steps.append(_measure(lambda: _steps_alone(learner, loader)))
        epochs.append(_measure(lambda: _epoch(learner, loader, state, callbacks), writer.wait))
        print_line(f"turn {turn}: an epoch {epochs[-1]:.2f} s, its steps and validation {steps[-1]:.2f} s")
    costs = [epoch - alone for epoch, alone in zip(epochs[1:], steps[1:], strict=True)]
    return {
        "steps": NUM_STEPS,
        "turns": TURNS,
        "epoch_s": mean(epochs[1:]),
        "arithmetic_s": mean(steps[1:]),
        "fixed_cost_s": mean(costs),
        "fixed_cost_s_standard_error": stdev(costs) / len(costs) ** 0.5,
    }


def _measure(*functions: Callable[[], object]) -> float:
    """Return the seconds that calling all functions takes."""
    started = time.perf_counter()
    for function in functions:
        function()
    return time.perf_counter() - started


def _epoch(learner: Learner, loader: loop.Loader, state: loop.TrainState, callbacks: loop.Callbacks) -> None:
    """Train and validate an epoch as a stage does."""
    loop.train_epoch(learner, loader, state, callbacks)
    callbacks.on_epoch_end(state, *loop.finish_epoch(learner, loader, state))


def _steps_alone(learner: Learner, loader: PhotoLoader) -> None:
    """Run an epoch's steps and validation without any output."""
    tallies = [loop.train_step(learner, batch, step, loader.num_steps) for step, batch in enumerate(loader.train(1), 1)]
    torch.stack(tallies).sum().item()  # synchronises with the device
    loop.validate(learner, loader)
