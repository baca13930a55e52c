"""Results of a sweep read from storage, and its published report. Neither needs a cluster or a finished sweep."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq

from carclass import storage
from carclass.config import yaml_file
from carclass.data.formats import DamagedFileError
from carclass.runs.environment import code_version
from carclass.runs.run import Run
from carclass.tuning import report, trial_records
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import SearchSpace, get_setting
from carclass.tuning.trial_records import Trial

LOSS_REMEDY = (
    "Restore the trial's folder from a copy; or delete it and run the same command again, which trains it anew."
)


def collect_sweep(root: str, name: str) -> SweepResult:
    """Return the results of a sweep. Raise UserError if there is none of this name."""
    space, records = trial_records.load_records(root, name)
    return SweepResult(
        name=name,
        facts=_facts(space),
        stage=space.stage,
        device=records.trials[0].device if records.trials else "CPU",
        dimensions=space.dimensions,
        trials=[_collect_trial(space, trial) for trial in records.trials.values()],
        seed=space.search.seed,
        num_seeds=space.search.num_seeds,
    )


def publish_sweep(root: str, sweep: SweepResult) -> list[str]:
    """Write a sweep's best settings, table and page; return their URIs. Raise UserError if no trial is complete."""
    uri = trial_records.sweep_uri(root, sweep.name)
    page = report.render_analysis(sweep)
    table = io.BytesIO()
    pq.write_table(report.trials_table(sweep), table, write_page_checksum=True)
    files = {"best.yml": _best_config(root, sweep), "trials.parquet": table.getvalue(), "analysis.html": page.encode()}
    for file, data in files.items():
        storage.write_bytes(storage.join(uri, file), data)
    return [storage.join(uri, file) for file in files]


def _collect_trial(space: SearchSpace, trial: Trial) -> TrialResult:
    run = trial_records.trial_run(space, trial)
    try:
        rows = [row for row in run.metrics() if row["stage"] == space.stage]
        reason = _loss_reason(run, space.stage, rows) if trial.state in ("complete", "pruned") else None
    except DamagedFileError as error:  # of one trial, which is shown beside the others
        rows, reason = [], str(error)
    if reason is not None:
        trial, rows = replace(trial, state="lost" if trial.is_over else "failed", reason=reason), []
    return TrialResult(
        trial=trial,
        epochs=rows,
        max_epochs=get_setting(run.settings, f"train.{space.stage}.epochs"),
        devices=trial.devices,
        end_time=rows[-1]["time"] if rows else None,
    )


def _loss_reason(run: Run, stage: str, rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the reason why the metrics of a complete or pruned trial are lost; None if they are not.

    rows: metrics of the stage. Those of a published model must have its epoch.
    """
    uri = storage.join(run.uri, "metrics.jsonl")
    if not rows:
        return f"{uri} is missing or has no epoch of the stage {stage}. {LOSS_REMEDY}"
    if not run.is_finished(stage):
        return None
    epoch = run.model_facts(stage)["epoch"]
    if any(row["epoch"] == epoch for row in rows):
        return None
    return f"{uri} is cut short: it lacks epoch {epoch}, the trial's best. {LOSS_REMEDY}"


def _facts(space: SearchSpace) -> list[tuple[str, str]]:
    search, train = space.search, space.base_settings
    pruning: str = search.scheduler
    if pruning == "asha":
        pruning = f"ASHA: from epoch {space.min_epochs}, one trial in {search.reduction_factor} continues"
    return [
        ("Experiment", train.name),
        ("Dataset", train.dataset),
        ("Stage", f"{space.stage}, {space.max_epochs} epochs"),
        ("Sampler", f"{search.sampler}, seed {search.seed}"),
        ("Pruning", pruning),
        ("Root", space.root),
        ("Code", code_version()),
    ]


def _best_config(root: str, sweep: SweepResult) -> bytes:
    """Return an experiment file with the best trial's settings."""
    space, _ = trial_records.load_records(root, sweep.name)
    best = sweep.best
    settings = trial_records.trial_run(space, best.trial).settings.model_copy(update={"name": f"{sweep.name}-best"})
    config = yaml_file.dump({"root": root, "train": settings.model_dump(mode="json")})
    comments = f"# Trial {best.trial.number} of sweep {sweep.name}: {best.trial.title}\n"
    comments += f"# val accuracy {best.accuracy:.4f} in the search\n"
    return comments.encode() + config
