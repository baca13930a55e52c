"""What an epoch costs beyond its arithmetic, with 16 steps an epoch: checkpoint, metrics, TensorBoard, bookkeeping.

Epochs of the unfrozen stage as it runs, with all that is kept of them on disk, take turns with the same steps and the
same validation bare. An epoch also bears what is still being written of the one before it, a bare one nothing.
ResNet50, whose checkpoints hold 0.4 GB, on photos of 64 px, so that what is fixed shows.
"""

import time
from pathlib import Path
from statistics import median

import torch

from carclass import config, lineage
from carclass.benchmarks import labelled
from carclass.benchmarks.train_in_process import trainee_of
from carclass.progress import say
from carclass.training import loop
from carclass.training.feed import Feed, PhotoBatches
from carclass.training.keeper import Keeper

BATCH_SIZE, NUM_STEPS, NUM_VAL, ROUNDS, SIZE = 32, 16, 128, 6, 64


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on the GPU, if there is one, else on all CPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = config.Train(
        name="benchmark",
        parent=str(labelled.backbone_file(weights)),
        model=config.Model(stride_in_1x1=True, image_size=SIZE),
        frozen=None,
        unfrozen=config.Unfrozen(batch_size=BATCH_SIZE, epochs=2 * ROUNDS + 2),
    )
    chosen = labelled.choose(photos, {"train": BATCH_SIZE * NUM_STEPS, "val": NUM_VAL})
    train, val = (Feed(labelled.decode(chosen[split], SIZE), seed=given.seed) for split in ("train", "val"))
    batches = PhotoBatches(train, val, given.augmentation, BATCH_SIZE, device)
    trainee, state = trainee_of(given, labelled.num_classes(chosen), device), loop.State()
    keeper = Keeper(lineage.Run(str(folder), given), "unfrozen", trainee.trained, state)
    whole, bare = [], []
    for turn in range(ROUNDS + 1):  # the first is not counted
        keeper.wait()
        bare.append(arithmetic(trainee, batches))
        epoch(trainee, batches, state, keeper)
        whole.append(epoch(trainee, batches, state, keeper))
        say(f"turn {turn}: an epoch {whole[-1]:.2f} s, its arithmetic {bare[-1]:.2f} s")
    keeper.wait()
    costs = [all_of_it - part for all_of_it, part in zip(whole[1:], bare[1:], strict=True)]
    return {
        "steps": NUM_STEPS,
        "turns": ROUNDS,
        "epoch_s": median(whole[1:]),
        "arithmetic_s": median(bare[1:]),
        "fixed_cost_s": median(costs),
        "fixed_cost_s_lowest": min(costs),
        "fixed_cost_s_highest": max(costs),
    }


def epoch(trainee: loop.Trainee, batches: loop.Batches, state: loop.State, keeper: Keeper) -> float:
    """Seconds from the start of an epoch to that of the next one, as a stage has them."""
    started = time.perf_counter()
    loop.train_epoch(trainee, batches, state, loop.Keeping(keeper.save))
    keeper.save(state, loop.finish_epoch(trainee, batches, state), True)
    return time.perf_counter() - started


def arithmetic(trainee: loop.Trainee, batches: PhotoBatches) -> float:
    """Seconds of an epoch's steps and of the validation, alone."""
    started = time.perf_counter()
    tallies = [
        loop.train_step(trainee, batch, step, batches.num_steps) for step, batch in enumerate(batches.train(1), 1)
    ]
    torch.stack(tallies).sum().item()  # when the device has done it all
    loop.validate(trainee, batches)
    return time.perf_counter() - started
