"""Results of a tree of experiments: settings, metrics and test accuracies of each run."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from carclass.data.formats import json_text
from carclass.evaluation.metrics import wilson_interval
from carclass.formatting import value_text
from carclass.runs.run import STAGES, best_epoch_row

DASH = "\u2013"
STATES = ("finished", "stale", "begun", "missing", "diverged", "unreadable")
TREATMENTS = {"none": "whole photo", "crop": "crop", "mask": "mask", "crop+mask": "crop and mask"}
"""Names of the modes of `cutout`; `none` is a dataset without masks."""
NOT_IN_RECIPE = (
    *("name", "parent", "parent_sha256", "dataset", "seed"),
    *("num_workers", "use_gpu", "checkpoint_seconds", "loggers"),
)
"""Settings that do not belong to a recipe, like all that begin with `keep_`."""


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """Evaluation of a run's model on the test photos."""

    keys: list[str]
    """Source keys of the photos, sorted; equal for the same photos in all datasets."""
    image_ids: list[str] | None
    """Hashes of the photos' content, in the order of the keys; None in evaluations of former versions."""
    correct: np.ndarray
    """bool (N,): correctly classified photos, in the order of the keys."""
    metrics: dict[str, Any]
    """Result of evaluation.metrics.classification_metrics."""
    report: str
    """Relative link to the run's report.html."""

    @property
    def accuracy(self) -> float:
        """Return the share of correctly classified photos."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy (Wilson)."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """An experiment's run with its results."""

    name: str
    parent: str
    """`imagenet`, a URI, or `exp_002@12`."""
    parent_name: str | None
    """Name of the parent if it is part of the comparison."""
    dataset: str
    treatment: str
    """Cutout of the photos: `none`, `crop`, `mask` or `crop+mask`."""
    state: str
    """One of STATES."""
    reason: str | None
    """Cause of the states `stale`, `diverged` and `unreadable`."""
    settings: dict[str, Any]
    """Settings of the run by dotted key."""
    epochs: list[dict[str, Any]]
    """A row of metrics per epoch of all stages; may be empty."""
    val_accuracy: float | None
    """Val accuracy of the run's model."""
    baseline_val: float | None
    """Val accuracy of the baseline."""
    baseline_test: float | None
    """Test accuracy of the baseline."""
    test: TestResult | None
    val_photos: str | None = None
    """Name of the first dataset of the tree with the val photos of this run's; None if they are not known."""
    seen_photos: str = ""
    """Number of its test photos that it or its ancestors were trained on, in words; empty if there are none."""

    @property
    def rank(self) -> float:
        """Return the val accuracy for sorting; -1 if there is none."""
        return -1.0 if self.val_accuracy is None or math.isnan(self.val_accuracy) else self.val_accuracy

    @property
    def best_row(self) -> dict[str, Any]:
        """Return the epoch of all stages with the highest finite val accuracy, the first of equals; empty without."""
        return best_epoch_row(self.epochs) or {}

    @property
    def best_epoch_text(self) -> str:
        """Return "epoch 12", with its stage if the run has several: "frozen epoch 12"; a dash if there is none."""
        if not self.best_row:
            return DASH
        stage = f"{self.best_row['stage']} " if len(self.stages) > 1 else ""
        return f"{stage}epoch {self.best_row['epoch']}"

    @property
    def stages(self) -> list[str]:
        """Return the stages of the settings."""
        return [stage for stage in STAGES if any(key.startswith(f"{stage}.") for key in self.settings)]

    @property
    def max_epochs(self) -> int | None:
        """Return the number of epochs of all stages in the settings; None if it is not set."""
        limits = [self.settings.get(f"{stage}.epochs") for stage in self.stages]
        return sum(limits) if limits and all(isinstance(limit, int) for limit in limits) else None  # type: ignore[arg-type]

    @property
    def recipe(self) -> str:
        """Return the settings but those NOT_IN_RECIPE as JSON, to find runs that are trained alike."""
        kept = {key: v for key, v in self.settings.items() if key not in NOT_IN_RECIPE and not key.startswith("keep_")}
        return json_text(kept, sort_keys=True, default=str)

    @property
    def treatment_label(self) -> str:
        """Return the treatment in words."""
        return TREATMENTS.get(self.treatment, self.treatment)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of a tree of experiments and the baseline they are compared with."""

    title: str
    facts: list[tuple[str, str]]
    runs: list[ComparedRun]
    """In the tree's order: parents before children."""
    baseline: str | None
    """Name of the baseline: `the original (Keras, Stanford Cars)`."""
    seed: int
    """Seed of the bootstrap."""

    @cached_property
    def finished(self) -> list[ComparedRun]:
        """Return the finished runs with a val accuracy, sorted by it, best first. Test results are not used."""
        finished = [run for run in self.runs if run.state == "finished" and run.rank >= 0]
        return sorted(finished, key=lambda run: -run.rank)

    @property
    def best(self) -> ComparedRun:
        """Return the finished run with the highest val accuracy, the first of equals."""
        return self.finished[0]

    @property
    def tied(self) -> list[ComparedRun]:
        """Return the other finished runs with the val accuracy of the best one, which is the first of them."""
        return [run for run in self.finished[1:] if run.rank == self.best.rank]

    @property
    def on_other_photos(self) -> list[ComparedRun]:
        """Return the finished runs whose val photos are known to differ from those of the best one."""
        known = [run for run in self.finished if run.val_photos is not None]
        return [run for run in known if self.best.val_photos not in (None, run.val_photos)]

    @property
    def has_other_test_photos(self) -> bool:
        """Return True if the runs were tested on different numbers of photos."""
        return len({len(run.test.keys) for run in self.runs if run.test}) > 1

    @property
    def best_baseline(self) -> ComparedRun | None:
        """Return the run whose baseline has the highest val accuracy."""
        known = [run for run in self.runs if run.baseline_val is not None]
        return max(known, key=lambda run: run.baseline_val or 0.0, default=None)

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of runs by state, without states that do not occur."""
        states = [run.state for run in self.runs]
        return {state: states.count(state) for state in STATES if state in states}

    def parent(self, run: ComparedRun) -> ComparedRun | None:
        """Return the run that another starts from, if it is part of the comparison."""
        return next((other for other in self.runs if other.name == run.parent_name), None)


def setting_text(settings: dict[str, Any], key: str) -> str:
    """Return a setting's value as text; a dash if there is no such setting."""
    if key not in settings:
        return DASH
    value = settings[key]
    return value_text(value) if value is None or isinstance(value, bool | int | float | str) else json_text(value)


def settings_diff(run: ComparedRun, parent: ComparedRun) -> list[tuple[str, str, str]]:
    """Return the settings that differ between a run and its parent: (key, parent's value, run's value).

    If each has a single stage, the settings of the two stages are compared with each other.
    """
    is_single = len(run.stages) == len(parent.stages) == 1
    after, before = (_without_stage_names(each) if is_single else _without_null_stages(each) for each in (run, parent))
    diff = []
    for key in dict.fromkeys([*before, *after]):
        old, new = setting_text(before, key), setting_text(after, key)
        if old != new and key not in ("name", "parent", "parent_sha256"):
            diff.append((key, old, new))
    return diff


def _without_null_stages(run: ComparedRun) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key not in STAGES}


def _without_stage_names(run: ComparedRun) -> dict[str, Any]:
    """Return the settings of a run with a single stage: `lr` for `frozen.lr`, and `stage`."""
    (stage,) = run.stages
    common = {key: value for key, value in run.settings.items() if key.split(".")[0] not in STAGES}
    own = {key.split(".", 1)[1]: value for key, value in run.settings.items() if key.startswith(f"{stage}.")}
    return {**common, "stage": stage, **own}
