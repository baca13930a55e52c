"""One sweep as one HTML file, one table and a few sentences: what was tried, what came of it, and what to try next."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from carclass.errors import UserError
from carclass.formatting import Value, device_time_text, value_text
from carclass.reporting import page
from carclass.tuning import charts, findings, marks
from carclass.tuning.importance import importances
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import short_names


def render_analysis(sweep: SweepResult) -> str:
    """Return the page as one HTML document. UserError when no trial has finished."""
    _check(sweep)
    ranked = importances(sweep)
    ordered = sorted(sweep.outcomes, key=lambda one: (not one.epochs, -one.accuracy, one.trial.number))
    spent = sum(one.device_seconds for one in sweep.searched)
    saved = sum(one.saved_device_seconds for one in sweep.searched)
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=f"Sweep {sweep.name}",
        facts=sweep.facts,
        sweep=sweep,
        best=sweep.best,
        baseline=next((one for one in sweep.complete if one.trial.number == 0), None),
        outcomes=ordered,
        seeds=_seed_rows(sweep),
        all_seeds=sorted({one.trial.seed for one in sweep.outcomes}),
        found=findings.found(sweep),
        advice=findings.advice(sweep, ranked),
        ranked=ranked,
        spent=spent,
        saved_share=saved / (spent + saved) if saved else 0.0,
        names=short_names([one.key for one in sweep.dimensions]),
        plots=charts,
        setting_plots=charts,
        axes=marks,
        text_of=value_text,
        time_text=device_time_text,
        words=findings,
    )


def summarise(sweep: SweepResult) -> list[str]:
    """What was found and what to try next, in plain sentences. UserError when no trial has finished."""
    _check(sweep)
    return [*findings.found(sweep), *findings.advice(sweep, importances(sweep))]


def trials_table(sweep: SweepResult) -> pa.Table:
    """Everything that is known of each trial, repetitions with other seeds too, a row each."""
    outcomes = sweep.outcomes
    columns: dict[str, pa.Array] = {
        "number": pa.array([one.trial.number for one in outcomes], pa.int64()),
        "name": pa.array([one.trial.name for one in outcomes], pa.string()),
        "title": pa.array([one.trial.title for one in outcomes], pa.string()),
        "state": pa.array([one.trial.state for one in outcomes], pa.string()),
        "reason": pa.array([one.trial.reason for one in outcomes], pa.string()),
        "repeats": pa.array([one.trial.repeats for one in outcomes], pa.int64()),
        "seed": pa.array([one.trial.seed for one in outcomes], pa.int64()),
    }
    for dimension in sweep.dimensions:
        columns[dimension.key] = _column([one.trial.values[dimension.key] for one in outcomes])
    columns |= {
        "accuracy": pa.array([one.accuracy if one.epochs else None for one in outcomes], pa.float64()),
        "best_epoch": pa.array([findings.best_epoch(one) for one in outcomes], pa.int64()),
        "epochs": pa.array([len(one.epochs) for one in outcomes], pa.int64()),
        "max_epochs": pa.array([one.max_epochs for one in outcomes], pa.int64()),
        "device_seconds": pa.array([one.device_seconds for one in outcomes], pa.float64()),
        "saved_device_seconds": pa.array([one.saved_device_seconds for one in outcomes], pa.float64()),
        "finished": pa.array([one.finished for one in outcomes], pa.float64()),
        "val_accuracies": _lists(outcomes, "val_accuracy"),
        "val_losses": _lists(outcomes, "val_loss"),
        "train_losses": _lists(outcomes, "train_loss"),
    }
    return pa.table(columns)


def _check(sweep: SweepResult) -> None:
    if not sweep.complete:
        raise UserError(f"no trial of sweep `{sweep.name}` has finished yet. The same command goes on with it.")


def _column(values: Sequence[Value]) -> pa.Array:
    """In the values' own type, whole and real numbers together as real ones; anything else that is mixed as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds in ({bool}, {int}, {float}, {str}):
        return pa.array(values)
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else value_text(value) for value in values], pa.string())


def _lists(outcomes: Sequence[TrialResult], name: str) -> pa.Array:
    return pa.array([[row[name] for row in one.epochs] for one in outcomes], pa.list_(pa.float64()))


def _seed_rows(sweep: SweepResult) -> list[dict[str, Any]]:
    """A row for each setting trained with more seeds: the trial, its accuracy by seed, and over all of them."""
    rows = []
    for one in findings.compared(sweep):
        same = [other for other in sweep.outcomes if one.trial.number in (other.trial.number, other.trial.repeats)]
        by_seed = {other.trial.seed: other.accuracy for other in same if other.trial.state == "complete"}
        rows.append({"trial": one.trial, "by_seed": by_seed, "seeds": sweep.seeds(one.trial.number)})
    return rows
