"""What an epoch costs beyond its arithmetic, with 16 steps an epoch: checkpoint, metrics, TensorBoard, bookkeeping.

An epoch of the unfrozen stage as it runs, with all that is kept of it on disk, takes turns with the same steps and the
same validation bare. What is still being written at its end is waited for, so that nothing is left out. Every sixth
epoch also writes a checkpoint to go on from, of 0.4 GB, so the mean is what counts. ResNet50 on few photos of 64 px, so
that what is fixed shows.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch

from carclass.config.schema import ModelSettings, TrainSettings, UnfrozenSettings
from carclass.progress import say
from carclass.runs.run import Run
from carclass.tools.benchmarks import labelled
from carclass.tools.benchmarks.train_in_process import trainee_of
from carclass.training import loop
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.dataloader import PhotoLoader, PhotoSamples

BATCH_SIZE, NUM_STEPS, NUM_VAL, SIZE = 8, 16, 64, 64
TURNS = 48
EVERY = 6 * NUM_STEPS
"""Steps between checkpoints: the default, 100, as a multiple of an epoch's."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on the GPU, if there is one, else on all CPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = TrainSettings(
        name="benchmark",
        parent=str(labelled.backbone_file(weights)),
        model=ModelSettings(stride_in_1x1=True, image_size=SIZE),
        frozen=None,
        unfrozen=UnfrozenSettings(batch_size=BATCH_SIZE, epochs=TURNS + 1),
        checkpoint_steps=EVERY,
    )
    chosen = labelled.choose(photos, {"train": BATCH_SIZE * NUM_STEPS, "val": NUM_VAL})
    train, val = (PhotoSamples(labelled.decode(chosen[split], SIZE), seed=given.seed) for split in ("train", "val"))
    assert given.unfrozen is not None
    batches = PhotoLoader(train, val, given.augmentation, given.unfrozen, device)
    trainee, state = trainee_of(given, labelled.num_classes(chosen), device), loop.TrainState()
    keeper = CheckpointWriter(Run(str(folder), given), "unfrozen", trainee.trained, state)
    keeping = loop.Callbacks(keeper.save, keeper.finish, every=given.checkpoint_steps)
    whole, bare = [], []
    for turn in range(TURNS + 1):  # the first is not counted
        bare.append(timed(lambda: arithmetic(trainee, batches)))
        whole.append(timed(lambda: epoch(trainee, batches, state, keeping), keeper.wait))
        say(f"turn {turn}: an epoch {whole[-1]:.2f} s, its arithmetic {bare[-1]:.2f} s")
    costs = [all_of_it - part for all_of_it, part in zip(whole[1:], bare[1:], strict=True)]
    return {
        "steps": NUM_STEPS,
        "turns": TURNS,
        "epoch_s": mean(whole[1:]),
        "arithmetic_s": mean(bare[1:]),
        "fixed_cost_s": mean(costs),
        "fixed_cost_s_standard_error": stdev(costs) / len(costs) ** 0.5,
    }


def timed(*work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    started = time.perf_counter()
    for part in work:
        part()
    return time.perf_counter() - started


def epoch(trainee: loop.Trainee, batches: loop.Loader, state: loop.TrainState, keeping: loop.Callbacks) -> None:
    """An epoch as a stage has them."""
    loop.train_epoch(trainee, batches, state, keeping)
    keeping.finish(state, loop.finish_epoch(trainee, batches, state))


def arithmetic(trainee: loop.Trainee, batches: PhotoLoader) -> None:
    """An epoch's steps and the validation, alone."""
    tallies = [
        loop.train_step(trainee, batch, step, batches.num_steps) for step, batch in enumerate(batches.train(1), 1)
    ]
    torch.stack(tallies).sum().item()  # when the device has done it all
    loop.validate(trainee, batches)
