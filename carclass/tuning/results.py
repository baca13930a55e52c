"""What a sweep found: its trials with their learning curves, and how sure the best of them is. Plain figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from carclass.tuning.search_space import Dimension
from carclass.tuning.trial_records import Trial

NUM_REPEATED = 3
"""How many of the best settings are trained with more seeds."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial and what came of it."""

    trial: Trial
    epochs: list[dict[str, Any]]
    """The last stage's, oldest first: epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds."""
    max_epochs: int
    """How many there would be without pruning."""
    devices: float
    """GPUs or CPUs that it trained on."""
    finished: float | None
    """When its last epoch ended, in seconds since 1970."""

    @property
    def accuracy(self) -> float:
        """val accuracy of its best epoch; 0 before the first, and where no epoch has a finite one."""
        found = (row["val_accuracy"] for row in self.epochs)
        return max((accuracy for accuracy in found if math.isfinite(accuracy)), default=0.0)

    @property
    def device_seconds(self) -> float:
        """Time of training and validation in the last stage, times devices."""
        return self.devices * sum(row["seconds"] for row in self.epochs)

    @property
    def saved_device_seconds(self) -> float:
        """What the epochs that pruning left out would have taken, at the pace of the others."""
        if self.trial.state != "pruned" or not self.epochs:
            return 0.0
        return self.device_seconds / len(self.epochs) * (self.max_epochs - len(self.epochs))


@dataclass(frozen=True, kw_only=True)
class SeedRepeats:
    """One setting's val accuracies over seeds of training, the first being that of the search."""

    number: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over all seeds."""
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds (n - 1); 0 for a single one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """Everything that is told of a sweep."""

    name: str
    facts: list[tuple[str, str]]
    """(name, value): experiment, dataset, scheduler and the like."""
    stage: str
    device: str
    """`GPU` or `CPU`: what device seconds are of."""
    dimensions: Sequence[Dimension]
    outcomes: Sequence[TrialResult]
    """By number; number 0, the experiment as it stands, first."""
    seed: int

    @property
    def searched(self) -> list[TrialResult]:
        """All but repetitions with other seeds."""
        return [found for found in self.outcomes if found.trial.repeats is None]

    @property
    def complete(self) -> list[TrialResult]:
        """Those searched that got to their end, the best first; of equals the earlier."""
        found = [one for one in self.searched if one.trial.state == "complete"]
        return sorted(found, key=lambda one: (-one.accuracy, one.trial.number))

    def seeds(self, number: int) -> SeedRepeats:
        """A complete trial's accuracies over seeds."""
        same = [one for one in self.outcomes if number in (one.trial.number, one.trial.repeats)]
        return SeedRepeats(
            number=number, accuracies=tuple(one.accuracy for one in same if one.trial.state == "complete")
        )

    @property
    def best(self) -> TrialResult:
        """Of the TOP best in the search, the one with the best mean over seeds. There must be a complete one."""
        return max(self.complete[:NUM_REPEATED], key=lambda one: (self.seeds(one.trial.number).mean, -one.trial.number))
