"""Report of a tree of experiments: HTML page, table of runs, and summary in sentences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from carclass.errors import UserError
from carclass.experiments import charts
from carclass.experiments.charts import ChartedRun
from carclass.experiments.pairs import Pair, pairs_with_best, recipe_groups, seed_repeats
from carclass.experiments.results import DASH, ComparedRun, Comparison, TestResult, setting_text, settings_diff
from carclass.experiments.significance import AccuracyDifference
from carclass.formatting import percent_text
from carclass.reporting import page
from carclass.reporting.axes import fit_text

NUM_CLASSES, NUM_CONFUSIONS = 10, 8
"""Numbers of the best run's worst classes and most confused pairs on the page."""
LARGE_GAP = 0.1
"""Difference between val and test accuracy above which the best run is warned about."""
FLIPS = {"none": "none", "horizontal": "H", "horizontal+vertical": "H+V"}


def render_comparison(comparison: Comparison) -> str:
    """Return the page as one HTML document. Raise UserError if no run is finished."""
    if not comparison.finished:
        raise UserError(
            f"none of the {len(comparison.runs)} experiments of `{comparison.title}` has finished, so there is "
            "nothing to compare. Run `python jobs/lineage.py run all` with the same `--budget`, then compare again."
        )
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=comparison.title,
        facts=comparison.facts,
        comparison=comparison,
        best=comparison.best,
        best_baseline=comparison.best_baseline,
        sentences=summarise(comparison),
        best_pairs=pairs_with_best(comparison),
        groups=recipe_groups(comparison),
        diffs=[(run, settings_diff(run, parent)) for run in comparison.runs if (parent := comparison.parent(run))],
        seed_repeats=seed_repeats(comparison),
        charted_runs=charted_runs(comparison),
        charts=charts,
        named_results=_named_results,
        worst_classes=worst_classes(comparison.best),
        num_confusions=NUM_CONFUSIONS,
        optimizers=_optimizers,
        setting_text=setting_text,
        flips=FLIPS,
        fit_text=fit_text,
    )


def comparison_table(comparison: Comparison) -> pa.Table:
    """Return a row per run, in the tree's order."""
    runs = comparison.runs
    tests = [run.test for run in runs]
    texts = ("name", "parent", "parent_name", "dataset", "treatment", "state", "reason")
    columns = {name: pa.array([getattr(run, name) for run in runs], pa.string()) for name in texts}
    columns |= {
        "seed": pa.array([run.settings.get("seed") for run in runs], pa.int64()),
        "epochs": pa.array([len(run.epochs) for run in runs], pa.int64()),
        "max_epochs": pa.array([run.max_epochs for run in runs], pa.int64()),
        "best_stage": pa.array([run.best_row.get("stage") for run in runs], pa.string()),
        "best_epoch": pa.array([run.best_row.get("epoch") for run in runs], pa.int64()),
        "seconds": pa.array([sum(row["seconds"] for row in run.epochs) for run in runs], pa.float64()),
        "val_accuracy": pa.array([run.val_accuracy for run in runs], pa.float64()),
        "test_accuracy": pa.array([test and test.accuracy for test in tests], pa.float64()),
        "test_low": pa.array([test and test.interval[0] for test in tests], pa.float64()),
        "test_high": pa.array([test and test.interval[1] for test in tests], pa.float64()),
        "test_photos": pa.array([test and len(test.keys) for test in tests], pa.int64()),
        "baseline_val": pa.array([run.baseline_val for run in runs], pa.float64()),
        "baseline_test": pa.array([run.baseline_test for run in runs], pa.float64()),
    }
    return pa.table(columns)


def summarise(comparison: Comparison) -> list[str]:
    """Return the results in sentences; there must be a finished run."""
    best, baseline = comparison.best, comparison.best_baseline
    accuracy = f"val accuracy {percent_text(best.rank)} in {best.best_epoch_text}"
    sentences = [
        f"The best run is {best.name}, on {best.dataset} ({best.treatment_label}), from {best.parent}: {accuracy}."
    ]
    if comparison.tied:
        names = ", ".join(run.name for run in comparison.tied)
        sentences.append(f"Val does not tell it from {names}, with the same accuracy: it is the first in the tree.")
    if comparison.on_other_photos:
        names = ", ".join(run.name for run in comparison.on_other_photos)
        sentences.append(
            f"These runs have other val photos, so their val accuracies can't be compared with its: {names}."
        )
    if best.test:
        correct, low, high = map(percent_text, (best.test.accuracy, *best.test.interval))
        sentences.append(f"Its test accuracy is {correct} (95 % interval {low} to {high}).")
        sentences += _warn_of_test_gap(best.rank, best.test)
    else:
        sentences.append("It is not evaluated on the test photos yet.")
    if baseline:
        known = [(run.rank, run.baseline_val) for run in comparison.finished if run.baseline_val is not None]
        num_better = sum(ours > theirs for ours, theirs in known)
        sentences.append(
            f"{comparison.baseline or 'The baseline'} has val accuracy {percent_text(baseline.baseline_val or 0.0)} "
            f"with its {baseline.name}. Run by run, {num_better} of {len(known)} are above it on val."
        )
    for pair in pairs_with_best(comparison):
        if pair.result:
            points = f"{charts.points_text(pair.result.difference)} points"
            sentences.append(f"Against {pair.second.name} ({pair.reason}): {pair.result.verdict} on test, {points}.")
    unranked = [f"{run.name} ({run.state})" for run in comparison.runs if run.state != "finished"]
    if unranked:
        sentences.append(f"Not ranked: {', '.join(unranked)}.")
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _warn_of_test_gap(val_accuracy: float, test: TestResult) -> list[str]:
    """Return a warning if the accuracy on test, also its interval's upper end, is far below that on val."""
    if val_accuracy - test.interval[1] < LARGE_GAP:
        return []
    points = f"{(val_accuracy - test.accuracy) * 100:.1f} points"
    return [
        f"Warning: its test accuracy is {points} lower than its val accuracy: it may rely on what train and val share "
        "and test does not, such as backgrounds."
    ]


def worst_classes(run: ComparedRun) -> list[dict[str, Any]]:
    """Return the classes with the lowest F1 on the test photos, worst first; classes without photos are left out."""
    classes = run.test.metrics["per_class"] if run.test else []
    return sorted((row for row in classes if row["support"]), key=lambda row: row["f1"])[:NUM_CLASSES]


def charted_runs(comparison: Comparison) -> list[ChartedRun]:
    """Return the runs as the charts show them."""
    return [
        ChartedRun(
            name=run.name,
            parent=run.parent_name,
            start="@" + run.parent.rpartition("@")[2] if "@" in run.parent else "",
            note=_note(comparison, run),
            state=run.state,
            val_accuracy=run.val_accuracy,
            baseline=run.baseline_val,
            val_accuracies=[row["val_accuracy"] for row in run.epochs],
            is_best=run is comparison.best,
        )
        for run in comparison.runs
    ]


def _note(comparison: Comparison, run: ComparedRun) -> str:
    start = [f"from {run.parent}"] if comparison.parent(run) is None else []
    treatment = [run.treatment_label] if run.treatment != "none" else []
    return ", ".join([*start, f"on {run.dataset}", *treatment])


def _named_results(pairs: Sequence[Pair]) -> list[tuple[str, AccuracyDifference]]:
    """Return the results of pairs by name, for their chart."""
    return [(f"{pair.first.name} over {pair.second.name}", pair.result) for pair in pairs if pair.result]


def _optimizers(run: ComparedRun) -> str:
    """Return optimizer and learning rate of each stage: "adam 1e-4, then sgd 3e-5"."""
    stages = [[setting_text(run.settings, f"{stage}.{key}") for key in ("optimizer", "lr")] for stage in run.stages]
    return ", then ".join(" ".join(words) for words in stages) or DASH
