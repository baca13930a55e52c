"""Synthetic results of sweeps, for tests of reports and charts."""

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import Dimension
from carclass.tuning.trial_records import Trial

LR, BATCH, FLIP, DROPOUT = (
    "train.unfrozen.lr",
    "train.unfrozen.batch_size",
    "train.augmentation.flip",
    "train.model.dropout",
)
DIMENSIONS = (
    Dimension(key=LR, low=1e-4, high=1e-2, log=True),
    Dimension(key=BATCH, low=8, high=64),
    Dimension(key=FLIP, choices=(True, False, None)),
    Dimension(key=DROPOUT, low=0.0, high=0.6),
)
BASE_VALUES = {LR: 6e-4, BATCH: 32, FLIP: True, DROPOUT: 0.0}
MAX_EPOCHS = 10


def make_epochs(accuracy: float, number: int = MAX_EPOCHS, seconds: float = 40.0) -> list[dict[str, Any]]:
    """Return the metrics of epochs whose val accuracy approaches the given one from below."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 0.9,
            "val_loss": 2.5 / epoch,
            "val_accuracy": accuracy * (1 - 0.7 * math.exp(-epoch / 1.4)),
            "lr": 1e-3,
            "seconds": seconds,
        }
        for epoch in range(1, number + 1)
    ]


def make_result(number: int, epochs: list[dict[str, Any]], **changes: Any) -> TrialResult:
    """Return a trial with these epochs, by default a complete one with the settings of the experiment."""
    trial = {"number": number, "values": BASE_VALUES, "seed": 123, "state": "complete"} | changes
    return TrialResult(
        trial=Trial(**trial),
        epochs=epochs,
        max_epochs=MAX_EPOCHS,
        devices=2.0,
        end_time=1_700_000_000.0 + 60 * number if epochs else None,
    )


def make_sweep(num_trials: int = 20, repeats: bool = True, **changes: Any) -> SweepResult:
    """Return a sweep whose accuracy depends mostly on lr, best at 2e-3, and a little on dropout and noise."""
    generator = random.Random(5)
    results = [make_result(0, make_epochs(0.8))]
    for number in range(1, num_trials):
        values = {
            LR: 10 ** generator.uniform(-4, -2),
            BATCH: generator.randint(8, 64),
            FLIP: generator.choice((True, False, None)),
            DROPOUT: generator.uniform(0, 0.6),
        }
        accuracy = 0.88 - 0.14 * math.log10(values[LR] / 2e-3) ** 2 - 0.08 * abs(values[DROPOUT] - 0.2)
        accuracy += generator.gauss(0, 0.004)
        if number == 7:
            state, epochs, reason = "failed", [], "torch.OutOfMemoryError: CUDA out of memory <script>alert(1)</script>"
        elif accuracy < 0.82 and number > 3:
            state, epochs, reason = "pruned", make_epochs(accuracy, generator.choice((1, 3))), None
        else:
            state, epochs, reason = "complete", make_epochs(accuracy), None
        results.append(make_result(number, epochs, values=values, state=state, reason=reason))
    values = {
        "name": "lr-and-dropout",
        "facts": [("experiment", "full"), ("dataset", "v1-masked"), ("scheduler", "ASHA")],
        "stage": "unfrozen",
        "device": "GPU",
        "dimensions": DIMENSIONS,
        "seed": 123,
        "num_seeds": 3,
        "trials": results,
    }
    sweep = SweepResult(**{**values, **changes})
    return with_repeats(sweep) if repeats else sweep


def with_repeats(sweep: SweepResult, apart: float = 0.003) -> SweepResult:
    """Add repeats of the best three trials and of trial 0 with two seeds, one better and one worse by `apart`."""
    return with_seeds(sweep, [[one.accuracy + apart, one.accuracy - apart] for one in sweep.repeated])


def with_seeds(sweep: SweepResult, accuracies: Iterable[Iterable[float]]) -> SweepResult:
    """Add repeats with the seeds from 124: accuracies of each repeated trial, the best three and trial 0."""
    results = list(sweep.trials)
    for repeated, values in zip(sweep.repeated, accuracies, strict=True):
        for seed, accuracy in enumerate(values, 124):
            repeats = {"values": repeated.trial.values, "seed": seed, "repeats": repeated.trial.number}
            epochs = [
                {**row, "val_accuracy": row["val_accuracy"] - repeated.accuracy + accuracy} for row in repeated.epochs
            ]
            results.append(make_result(len(results), epochs, **repeats))
    return replace(sweep, trials=results, num_seeds=1 + max(result.trial.seed - 123 for result in results))


def make_best(values: dict[str, Any], epochs: list[dict[str, Any]] | None = None) -> SweepResult:
    """Return a sweep whose best trial, by a wide margin, has these values or epochs."""
    sweep = make_sweep(repeats=False)
    best = make_result(20, epochs or make_epochs(0.97), values={**BASE_VALUES, BATCH: 33, **values})
    return replace(sweep, trials=[*sweep.trials, best])


def edge_case_sweeps() -> dict[str, SweepResult]:
    """Return sweeps with unusual trials, by a description."""
    long = [f"s3://bucket/with/a/very/long/name/of/a/parent/run-{i}/model.safetensors" for i in range(9)]
    named = [make_result(n, make_epochs(0.5 + n / 50), values={FLIP: name}) for n, name in enumerate(long)]
    gap = make_epochs(0.8)
    gap[4]["val_accuracy"] = math.nan
    many = [Dimension(key=f"train.part_{i}.setting", low=0.0, high=1.0) for i in range(8)]
    generator = random.Random(2)
    hundred = [
        make_result(n, make_epochs(generator.random()), values={each.key: generator.random() for each in many})
        for n in range(100)
    ]
    never = [{**row, "val_accuracy": math.nan} for row in make_epochs(0.8)]
    outside = make_result(0, make_epochs(0.7), values={LR: 0.0, BATCH: 128, FLIP: "other", DROPOUT: None})
    return {
        "one trial": make_sweep(num_trials=1, repeats=False),
        "all alike": make_sweep(trials=[make_result(n, make_epochs(0.8)) for n in range(9)], repeats=False),
        "one epoch": make_sweep(trials=[make_result(n, make_epochs(0.8, 1)) for n in range(3)], repeats=False),
        "a gap": make_sweep(trials=[make_result(0, gap)], repeats=False),
        "never a number": make_sweep(trials=[make_result(0, never), *make_sweep().trials[1:]], repeats=False),
        "long names": make_sweep(trials=named, dimensions=[Dimension(key=FLIP, choices=tuple(long))], repeats=False),
        "a hundred": make_sweep(trials=hundred, dimensions=many, repeats=False),
        "an experiment elsewhere": make_sweep(trials=[outside, *make_sweep().trials[1:]], repeats=False),
    }
