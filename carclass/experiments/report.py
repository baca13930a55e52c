"""A tree of experiments as one HTML file and one table: what each run starts from, what it changes, what that gave."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from carclass.errors import UserError
from carclass.evaluation.metrics import wilson_interval
from carclass.experiments import charts
from carclass.experiments.significance import Verdict, compare
from carclass.formatting import percent_text, value_text
from carclass.reporting import page
from carclass.reporting.axes import fit_text

STATES = ("finished", "stale", "begun", "missing", "failed")
STAGES = ("frozen", "unfrozen")
NUM_CLASSES, NUM_PAIRS = 10, 8  # shown of the best run's weakest classes and confused pairs
TREATMENTS = {"none": "whole photo", "crop": "crop", "mask": "mask", "crop+mask": "crop and mask"}
APART = ("name", "parent", "parent_sha256", "dataset", "seed", "num_workers", "use_gpu", "checkpoint_steps")
"""Settings in which runs may differ and still be trained alike, and all that begin with `keep_`."""
FLIPS = {"none": "none", "horizontal": "H", "horizontal+vertical": "H+V"}


@dataclass(frozen=True, kw_only=True)
class TestResult:
    """What the test photos say of a run's best epoch."""

    keys: list[str]
    """Sorted; the same photos have the same keys in every dataset."""
    correct: np.ndarray
    """bool (N,): whether each was classified correctly, in that order."""
    metrics: dict[str, Any]
    """As evaluation.metrics.classification_metrics returns it."""
    report: str
    """Relative link to the run's own report.html."""

    @property
    def accuracy(self) -> float:
        """Share of the photos that were classified correctly."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Accuracy's 95 % interval (Wilson)."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """An experiment."""

    name: str
    parent: str
    """`imagenet`, a URI, or `exp_002@12`."""
    parent_name: str | None
    """The experiment it starts from, when that is one of the comparison."""
    dataset: str
    treatment: str
    """What was done to the photos: `none`, `crop`, `mask` or `crop+mask`."""
    state: str
    """One of STATES."""
    reason: str | None
    """Why it is stale, or failed, in words."""
    settings: dict[str, Any]
    """Dotted key -> value, all of the run's settings."""
    epochs: list[dict[str, Any]]
    """A row of metrics for each epoch, with its stage; may be empty."""
    val_accuracy: float | None
    """Of the last stage's best epoch."""
    baseline_val: float | None
    """The original's."""
    baseline_test: float | None
    test: TestResult | None

    @property
    def val(self) -> float:
        """Val accuracy for ranking; below all others where there is none."""
        return -1.0 if self.val_accuracy is None or math.isnan(self.val_accuracy) else self.val_accuracy

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the last stage with the highest val accuracy that is a number, the earlier of equals."""
        last = [row for row in self.epochs if row["stage"] == self.epochs[-1]["stage"]]
        rows = [row for row in last if math.isfinite(row["val_accuracy"])]
        return max(rows, key=lambda row: row["val_accuracy"])["epoch"] if rows else None

    @property
    def stages(self) -> list[str]:
        """The stages that its settings ask for."""
        return [stage for stage in STAGES if any(key.startswith(f"{stage}.") for key in self.settings)]

    @property
    def max_epochs(self) -> int | None:
        """What its settings allow, over all stages."""
        caps = [self.settings.get(f"{stage}.epochs") for stage in self.stages]
        return sum(caps) if caps and all(isinstance(cap, int) for cap in caps) else None  # type: ignore[arg-type]

    @property
    def recipe(self) -> str:
        """All settings but those APART: the same text for runs trained alike."""
        kept = {key: v for key, v in self.settings.items() if key not in APART and not key.startswith("keep_")}
        return json.dumps(kept, sort_keys=True, default=str)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Experiments side by side."""

    title: str
    facts: list[tuple[str, str]]
    entries: list[ComparedRun]
    """In the tree's order: parents before children."""
    baseline: str | None
    """What the baseline's figures are, in words: `the original (Keras, Stanford Cars)`."""
    seed: int
    """Of the bootstrap."""

    @cached_property
    def finished(self) -> list[ComparedRun]:
        """Finished entries with a val accuracy, the best first. The order is by val accuracy, never by test."""
        found = [one for one in self.entries if one.state == "finished" and one.val >= 0]
        return sorted(found, key=lambda one: -one.val)

    @property
    def best(self) -> ComparedRun:
        """The finished entry with the highest val accuracy."""
        return self.finished[0]

    @property
    def counts(self) -> dict[str, int]:
        """How many entries are in each state that occurs."""
        states = [one.state for one in self.entries]
        return {state: states.count(state) for state in STATES if state in states}

    def parent(self, one: ComparedRun) -> ComparedRun | None:
        """The entry that another starts from."""
        return next((other for other in self.entries if other.name == one.parent_name), None)


class Pair(NamedTuple):
    """An entry against another, on the test photos that both have."""

    ours: ComparedRun
    theirs: ComparedRun
    reason: str
    """Why these two, or which: `its parent`."""
    verdict: Verdict | None
    """None when one isn't evaluated, or they share no photo."""

    @property
    def lacking(self) -> str:
        """Why there is no verdict, in words."""
        missing = [one.name for one in (self.ours, self.theirs) if one.test is None]
        return f"{' and '.join(missing)} not evaluated" if missing else "no test photos in common"


class Group(NamedTuple):
    """Entries trained alike on photos that were treated in different ways."""

    entries: list[ComparedRun]
    pairs: list[Pair]


def render_comparison(comparison: Comparison) -> str:
    """Return the page as one HTML document. UserError when no experiment has finished."""
    if not comparison.finished:
        raise UserError(
            f"none of the {len(comparison.entries)} experiments of `{comparison.title}` has finished, so there is "
            "nothing to compare. Run `python jobs/lineage.py run all` and then compare again."
        )
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=comparison.title,
        facts=comparison.facts,
        comparison=comparison,
        best=comparison.best,
        original=_best_baseline(comparison),
        found=summarise(comparison),
        rivals=rivals(comparison),
        groups=groups(comparison),
        changes=[(one, changes(one, parent)) for one in comparison.entries if (parent := comparison.parent(one))],
        repeats=_repeats(comparison),
        runs=_runs(comparison),
        charts=charts,
        told=_told,
        weakest=weakest_classes(comparison.best),
        num_pairs=NUM_PAIRS,
        treatment_of=run_treatment,
        optimizers=_optimizers,
        setting=_setting,
        flips=FLIPS,
        fitted=fit_text,
    )


def comparison_table(comparison: Comparison) -> pa.Table:
    """What is known of each experiment, a row each, in the tree's order."""
    entries = comparison.entries
    tests = [one.test for one in entries]
    texts = ("name", "parent", "parent_name", "dataset", "treatment", "state", "reason")
    columns = {name: pa.array([getattr(one, name) for one in entries], pa.string()) for name in texts}
    columns |= {
        "seed": pa.array([one.settings.get("seed") for one in entries], pa.int64()),
        "epochs": pa.array([len(one.epochs) for one in entries], pa.int64()),
        "max_epochs": pa.array([one.max_epochs for one in entries], pa.int64()),
        "best_epoch": pa.array([one.best_epoch for one in entries], pa.int64()),
        "seconds": pa.array([sum(row["seconds"] for row in one.epochs) for one in entries], pa.float64()),
        "val_accuracy": pa.array([one.val_accuracy for one in entries], pa.float64()),
        "test_accuracy": pa.array([test and test.accuracy for test in tests], pa.float64()),
        "test_low": pa.array([test and test.interval[0] for test in tests], pa.float64()),
        "test_high": pa.array([test and test.interval[1] for test in tests], pa.float64()),
        "test_photos": pa.array([test and len(test.keys) for test in tests], pa.int64()),
        "baseline_val": pa.array([one.baseline_val for one in entries], pa.float64()),
        "baseline_test": pa.array([one.baseline_test for one in entries], pa.float64()),
    }
    return pa.table(columns)


def summarise(comparison: Comparison) -> list[str]:
    """What was found, in sentences. There must be a finished experiment."""
    best, original = comparison.best, _best_baseline(comparison)
    reached = f"val accuracy {percent_text(best.val)} in epoch {best.best_epoch or charts.DASH}"
    words = [f"The best run is {best.name}, on {best.dataset} ({run_treatment(best)}), from {best.parent}: {reached}."]
    if best.test:
        right, low, high = map(percent_text, (best.test.accuracy, *best.test.interval))
        words.append(f"It gets {right} of the test photos right (95 % interval {low} to {high}).")
    else:
        words.append("It is not evaluated on the test photos yet.")
    if original:
        known = [(one.val, one.baseline_val) for one in comparison.finished if one.baseline_val is not None]
        words.append(
            f"{comparison.baseline or 'The baseline'} has val accuracy {percent_text(original.baseline_val or 0.0)} "
            f"with its {original.name}. Run by run, {sum(a > b for a, b in known)} of {len(known)} are above it on val."
        )
    for one in rivals(comparison):
        if one.verdict:
            points = f"{charts.points_text(one.verdict.difference)} points"
            words.append(f"Against {one.theirs.name} ({one.reason}): {one.verdict.words} on test, {points}.")
    late = [f"{one.name} ({one.state})" for one in comparison.entries if one.state != "finished"]
    if late:
        words.append(f"Without a place in the order: {', '.join(late)}.")
    return [one[0].upper() + one[1:] for one in words]


def rivals(comparison: Comparison) -> list[Pair]:
    """The best entry against its parent, against the second on val, and against the best of each other treatment."""
    best, found = comparison.best, dict[str, list[str]]()
    parent = comparison.parent(best)
    if parent:
        found[parent.name] = ["its parent"]
    others = comparison.finished[1:]
    if others:
        found.setdefault(others[0].name, []).append("second on val")
    for treatment in dict.fromkeys(one.treatment for one in others if one.treatment != best.treatment):
        first = next(one for one in others if one.treatment == treatment)
        found.setdefault(first.name, []).append(f"best of {run_treatment(first)}")
    by_name = {one.name: one for one in comparison.entries}
    return [pair(best, by_name[name], ", ".join(why), comparison.seed) for name, why in found.items()]


def groups(comparison: Comparison) -> list[Group]:
    """Entries whose settings are equal but for the dataset, by settings, where photos were treated in several ways.

    Of each treatment the best on val is compared with that of every other.
    """
    alike: dict[str, list[ComparedRun]] = {}
    for one in comparison.entries:
        alike.setdefault(one.recipe, []).append(one)
    found = []
    for entries in alike.values():
        by_treatment: dict[str, ComparedRun] = {}
        for one in sorted(entries, key=lambda one: (one.state != "finished", -one.val)):
            by_treatment.setdefault(one.treatment, one)
        if len(by_treatment) < 2:
            continue
        shown = sorted(by_treatment.values(), key=lambda one: [*TREATMENTS, one.treatment].index(one.treatment))
        pairs = [
            pair(ours, theirs, f"{run_treatment(ours)} against {run_treatment(theirs)}", comparison.seed)
            for i, theirs in enumerate(shown)
            for ours in shown[i + 1 :]
        ]
        found.append(Group(entries, pairs))
    return found


def pair(ours: ComparedRun, theirs: ComparedRun, reason: str, seed: int) -> Pair:
    """Compare two entries on the test photos whose keys both have."""
    if ours.test is None or theirs.test is None:
        return Pair(ours, theirs, reason, None)
    _, i, j = np.intersect1d(ours.test.keys, theirs.test.keys, assume_unique=True, return_indices=True)
    verdict = compare(ours.test.correct[i], theirs.test.correct[j], seed) if len(i) else None
    return Pair(ours, theirs, reason, verdict)


def changes(one: ComparedRun, parent: ComparedRun) -> list[tuple[str, str, str]]:
    """Settings in which an entry differs from its parent: (key, parent's value, own value).

    Where each has a single stage, the settings of the two stages are compared with each other.
    """
    single = len(one.stages) == len(parent.stages) == 1
    ours, theirs = (_flat(entry, single) for entry in (one, parent))
    found = []
    for key in dict.fromkeys([*theirs, *ours]):
        before, after = _setting(theirs, key), _setting(ours, key)
        if before != after and key not in ("name", "parent", "parent_sha256"):
            found.append((key, before, after))
    return found


def _told(pairs: Sequence[Pair]) -> list[tuple[str, Verdict]]:
    """The pairs with a verdict, named, for their chart."""
    return [(f"{one.ours.name} over {one.theirs.name}", one.verdict) for one in pairs if one.verdict]


def run_treatment(one: ComparedRun) -> str:
    """What was done to the photos, in words."""
    return TREATMENTS.get(one.treatment, one.treatment)


def weakest_classes(one: ComparedRun) -> list[dict[str, Any]]:
    """The classes of an entry's test with the lowest F1, the worst first, of those with photos."""
    classes = one.test.metrics["per_class"] if one.test else []
    return sorted((row for row in classes if row["support"]), key=lambda row: row["f1"])[:NUM_CLASSES]


def _flat(one: ComparedRun, single: bool) -> dict[str, Any]:
    """Settings without a stage's `null`; with `single` the only stage's come without its name."""
    if not single:
        return {key: value for key, value in one.settings.items() if key not in STAGES}
    stage = one.stages[0]
    rest = {key: value for key, value in one.settings.items() if key.split(".")[0] not in STAGES}
    own = {key.split(".", 1)[1]: value for key, value in one.settings.items() if key.startswith(f"{stage}.")}
    return {**rest, "stage": stage, **own}


def _setting(settings: dict[str, Any], key: str) -> str:
    """A setting's value as text, a dash where there is none."""
    if key not in settings:
        return charts.DASH
    value = settings[key]
    return value_text(value) if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _optimizers(one: ComparedRun) -> str:
    """Optimizer and learning rate of each stage: `adam 1e-4`."""
    found = [[_setting(one.settings, f"{stage}.{key}") for key in ("optimizer", "lr")] for stage in one.stages]
    return ", then ".join(" ".join(words) for words in found) or charts.DASH


def _best_baseline(comparison: Comparison) -> ComparedRun | None:
    """The entry whose baseline has the highest val accuracy."""
    known = [one for one in comparison.entries if one.baseline_val is not None]
    return max(known, key=lambda one: one.baseline_val or 0.0, default=None)


def _repeats(comparison: Comparison) -> list[list[str]]:
    """Names of runs that differ in nothing but their seed."""
    alike: dict[tuple[str, str, str], dict[Any, str]] = {}
    for one in comparison.entries:
        alike.setdefault((one.recipe, one.dataset, one.parent), {})[one.settings.get("seed")] = one.name
    return [list(found.values()) for found in alike.values() if len(found) > 1]


def _runs(comparison: Comparison) -> list[charts.ChartedRun]:
    return [
        charts.ChartedRun(
            name=one.name,
            parent=one.parent_name,
            start="@" + one.parent.rpartition("@")[2] if "@" in one.parent else "",
            note=", ".join(_about(comparison, one)),
            state=one.state,
            val_accuracy=one.val_accuracy,
            baseline=one.baseline_val,
            values=[row["val_accuracy"] for row in one.epochs],
            is_best=one is comparison.best,
        )
        for one in comparison.entries
    ]


def _about(comparison: Comparison, one: ComparedRun) -> Iterator[str]:
    if comparison.parent(one) is None:
        yield f"from {one.parent}"
    yield f"on {one.dataset}"
    if one.treatment != "none":
        yield run_treatment(one)
