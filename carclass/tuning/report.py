"""Report of a sweep: HTML page, table of trials, and summary in sentences."""

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
    """Return the page as one HTML document. Raise UserError if no trial is complete."""
    _check_complete(sweep)
    ranked = importances(sweep)
    spent, saved = sweep.device_seconds, sweep.saved_device_seconds
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=f"Sweep {sweep.name}",
        facts=sweep.facts,
        sweep=sweep,
        best=sweep.best,
        baseline=next((result for result in sweep.complete if result.trial.number == 0), None),
        results=sorted(sweep.trials, key=_table_order),
        seed_rows=_seed_rows(sweep),
        seeds=sorted({result.trial.seed for result in sweep.counted}),
        sentences=findings.describe_results(sweep),
        recommendations=findings.recommend(sweep, ranked),
        ranked=ranked,
        spent=device_time_text(spent, sweep.device),
        saved_share=saved / (spent + saved) if saved else 0.0,
        names=short_names([dimension.key for dimension in sweep.dimensions]),
        charts=charts,
        marks=marks,
        findings=findings,
        value_text=value_text,
    )


def summarise(sweep: SweepResult) -> list[str]:
    """Return results and recommendations in sentences. Raise UserError if no trial is complete."""
    _check_complete(sweep)
    return [*findings.describe_results(sweep), *findings.recommend(sweep, importances(sweep))]


def trials_table(sweep: SweepResult) -> pa.Table:
    """Return a row per trial, repeats with other seeds included, with a column per varied setting."""
    results = sweep.trials
    columns: dict[str, pa.Array] = {
        "number": pa.array([result.trial.number for result in results], pa.int64()),
        "name": pa.array([result.trial.name for result in results], pa.string()),
        "title": pa.array([result.trial.title for result in results], pa.string()),
        "state": pa.array([result.trial.state for result in results], pa.string()),
        "reason": pa.array([result.trial.reason for result in results], pa.string()),
        "repeats": pa.array([result.trial.repeats for result in results], pa.int64()),
        "seed": pa.array([result.trial.seed for result in results], pa.int64()),
    }
    for dimension in sweep.dimensions:
        columns[dimension.key] = _setting_column([result.trial.values[dimension.key] for result in results])
    columns |= {
        "accuracy": pa.array(
            [None if result.best_epoch is None else result.accuracy for result in results], pa.float64()
        ),
        "best_epoch": pa.array([result.best_epoch for result in results], pa.int64()),
        "epochs": pa.array([len(result.epochs) for result in results], pa.int64()),
        "max_epochs": pa.array([result.max_epochs for result in results], pa.int64()),
        "device_seconds": pa.array([result.device_seconds for result in results], pa.float64()),
        "saved_device_seconds": pa.array([result.saved_device_seconds for result in results], pa.float64()),
        "finished": pa.array([result.end_time for result in results], pa.float64()),
        "val_accuracies": _metric_column(results, "val_accuracy"),
        "val_losses": _metric_column(results, "val_loss"),
        "train_losses": _metric_column(results, "train_loss"),
    }
    return pa.table(columns)


def _table_order(result: TrialResult) -> tuple[bool, float, int]:
    """Return the key by which the page sorts trials: best first, those without an accuracy last."""
    has_none = result.best_epoch is None
    return has_none, 0.0 if has_none else -result.accuracy, result.trial.number


def _check_complete(sweep: SweepResult) -> None:
    if sweep.complete:
        return
    failed = [result.trial for result in sweep.searched if result.trial.state == "failed"]
    if failed and len(failed) == len(sweep.searched):
        raise UserError(
            f"all {len(failed)} trials of sweep `{sweep.name}` failed, the first as follows. {failed[0].reason}"
        )
    lost = [result.trial for result in sweep.searched if result.trial.state == "lost"]
    if lost:
        raise UserError(
            f"no trial of sweep `{sweep.name}` can be ranked: {len(lost)} of {len(sweep.searched)} have lost their "
            f"metrics, the first as follows. {lost[0].reason}"
        )
    raise UserError(f"no trial of sweep `{sweep.name}` has finished yet. Run the same command again to resume it.")


def _setting_column(values: Sequence[Value]) -> pa.Array:
    """Return values in their own type; integers mixed with floats become floats, other mixtures text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds in ({bool}, {int}, {float}, {str}):
        return pa.array(values)
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else value_text(value) for value in values], pa.string())


def _metric_column(results: Sequence[TrialResult], name: str) -> pa.Array:
    """Return a metric of all epochs, a list per trial."""
    return pa.array([[row[name] for row in result.epochs] for result in results], pa.list_(pa.float64()))


def _seed_rows(sweep: SweepResult) -> list[dict[str, Any]]:
    """Return a row per repeated trial: its record, its accuracies by seed, and their SeedRepeats."""
    rows = []
    for repeated in sweep.repeated:
        number = repeated.trial.number
        group = [result for result in sweep.counted if number in (result.trial.number, result.trial.repeats)]
        by_seed = {result.trial.seed: result.accuracy for result in group if result.has_result}
        rows.append({"trial": repeated.trial, "by_seed": by_seed, "repeats": sweep.seed_repeats(number)})
    return rows
