"""Results of a sweep: trials with their learning curves, and val accuracies over seeds of training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from carclass.runs.run import best_epoch_row
from carclass.tuning.search_space import Dimension
from carclass.tuning.trial_records import Trial

NUM_REPEATED = 3
"""Number of best trials that are repeated with other seeds."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial with the metrics of its epochs."""

    trial: Trial
    epochs: list[dict[str, Any]]
    """Rows of the last stage, oldest first: epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds."""
    max_epochs: int
    """Number of epochs without pruning."""
    devices: float
    """Number of GPUs or CPUs."""
    end_time: float | None
    """Unix time of the end of the last epoch, in seconds."""

    @property
    def best_epoch(self) -> int | None:
        """Return the epoch with the highest finite val accuracy, the earliest of equals."""
        row = best_epoch_row(self.epochs)
        return None if row is None else row["epoch"]

    @property
    def accuracy(self) -> float:
        """Return the highest finite val accuracy; NaN if there is none."""
        row = best_epoch_row(self.epochs)
        return math.nan if row is None else row["val_accuracy"]

    @property
    def has_result(self) -> bool:
        """Return True for a complete trial with an accuracy: only such trials are ranked, averaged and tested."""
        return self.trial.state == "complete" and self.best_epoch is not None

    @property
    def device_seconds(self) -> float:
        """Return the time of training and validation in the last stage, times devices."""
        return self.devices * sum(row["seconds"] for row in self.epochs)

    @property
    def saved_device_seconds(self) -> float:
        """Return the estimated time of the epochs that pruning skipped, at the mean time per epoch."""
        if self.trial.state != "pruned" or not self.epochs:
            return 0.0
        return self.device_seconds / len(self.epochs) * (self.max_epochs - len(self.epochs))


@dataclass(frozen=True, kw_only=True)
class SeedRepeats:
    """Val accuracies of one trial's settings over other seeds than the search's, which chose the settings."""

    number: int
    accuracies: tuple[float, ...]
    num_missing: int
    """Number of repeats that failed, are not finished or have lost their metrics."""

    @property
    def mean(self) -> float:
        """Return the mean over seeds; there must be one."""
        return mean(self.accuracies)

    @property
    def std(self) -> float:
        """Return the sample standard deviation over seeds; 0 for a single seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All results of a sweep, as its report needs them."""

    name: str
    facts: list[tuple[str, str]]
    """(name, value): experiment, dataset, scheduler and so on."""
    stage: str
    device: str
    """`GPU` or `CPU`: unit of device seconds."""
    dimensions: Sequence[Dimension]
    trials: Sequence[TrialResult]
    """By number, from trial 0, the unchanged experiment; repeats with other seeds included."""
    seed: int
    num_seeds: int
    """Number of seeds with which the best settings are trained; the results of further ones are not counted."""

    @cached_property
    def searched(self) -> list[TrialResult]:
        """Return all trials but repeats with other seeds."""
        return [result for result in self.trials if result.trial.repeats is None]

    @property
    def pruned(self) -> list[TrialResult]:
        """Return the searched trials that were ended early."""
        return [result for result in self.searched if result.trial.state == "pruned"]

    @cached_property
    def complete(self) -> list[TrialResult]:
        """Return the searched trials with all of their epochs, best first, the earlier of equals first."""
        complete = [result for result in self.searched if result.has_result]
        return sorted(complete, key=lambda result: (-result.accuracy, result.trial.number))

    @cached_property
    def distinct(self) -> list[TrialResult]:
        """Return the complete trials, best first, without those that have the settings of an earlier one."""
        first: dict[str, int] = {}
        for result in sorted(self.complete, key=lambda result: result.trial.number):
            first.setdefault(repr(sorted(result.trial.values.items())), result.trial.number)
        numbers = {*first.values()}
        return [result for result in self.complete if result.trial.number in numbers]

    @cached_property
    def repeated(self) -> list[TrialResult]:
        """Return the distinct trials to repeat with other seeds: the NUM_REPEATED best, the finalists, and trial 0."""
        rest = [result for result in self.distinct[NUM_REPEATED:] if result.trial.number == 0]
        return [*self.distinct[:NUM_REPEATED], *rest]

    @property
    def lost(self) -> list[TrialResult]:
        """Return the trials among `counted` whose metrics are lost."""
        return [result for result in self.counted if result.trial.state == "lost"]

    @cached_property
    def counted(self) -> list[TrialResult]:
        """Return the searched trials, and the repeats of those in `repeated` with up to `num_seeds` seeds."""
        last_seed = {result.trial.number: result.trial.seed + self.num_seeds - 1 for result in self.repeated}
        return [
            result
            for result in self.trials
            if result.trial.repeats is None or result.trial.seed <= last_seed.get(result.trial.repeats, -1)
        ]

    def seed_repeats(self, number: int) -> SeedRepeats:
        """Return the accuracies of a trial's settings over other seeds than the search's."""
        repeats = [result for result in self.counted if result.trial.repeats == number]
        accuracies = tuple(result.accuracy for result in repeats if result.has_result)
        return SeedRepeats(number=number, accuracies=accuracies, num_missing=len(repeats) - len(accuracies))

    @cached_property
    def best(self) -> TrialResult:
        """Return the best repeated trial by its mean over other seeds than the search's, trial 0 if none is better.

        Without repeats it is the best trial of the search. There must be a complete trial.
        """
        groups = [(result, self.seed_repeats(result.trial.number)) for result in self.repeated]
        ranked = [(group.mean, -result.trial.number, result) for result, group in groups if group.accuracies]
        return max(ranked)[2] if ranked else self.distinct[0]

    @property
    def tied(self) -> list[TrialResult]:
        """Return the other distinct trials that equal the best one in the figure that it was chosen by."""
        repeats = self.seed_repeats(self.best.trial.number)
        others = [result for result in self.distinct if result.trial.number != self.best.trial.number]
        if not repeats.accuracies:
            return [result for result in others if result.accuracy == self.best.accuracy]
        groups = [(result, self.seed_repeats(result.trial.number)) for result in others]
        return [result for result, group in groups if group.accuracies and group.mean == repeats.mean]

    @property
    def device_seconds(self) -> float:
        """Return the device time of the search, without repeats."""
        return sum(result.device_seconds for result in self.searched)

    @property
    def saved_device_seconds(self) -> float:
        """Return the device time that pruning saved in the search."""
        return sum(result.saved_device_seconds for result in self.searched)
