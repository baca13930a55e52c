"""Status of each experiment's run: its progress, and agreement with its experiment file, parent and dataset."""

from typing import Any, Literal, NamedTuple

from carclass import storage
from carclass.data import dataset
from carclass.errors import UserError
from carclass.experiments.tree import Experiment, Tree
from carclass.runs import checkpoint_index
from carclass.runs.divergence_record import divergence_text
from carclass.runs.run import (
    ParentEpoch,
    Run,
    changed_inputs,
    changed_settings,
    find_run,
    parse_parent,
    read_run_settings,
)

State = Literal["missing", "begun", "diverged", "finished", "stale", "unreadable"]
UNFINISHED: tuple[State, ...] = ("missing", "begun", "diverged")
"""States of experiments that training goes on with."""
MAX_LISTED = 3
"""Largest number of settings listed in a reason."""


class RunStatus(NamedTuple):
    """An experiment's run and its state."""

    run: Run
    state: State
    reason: str | None = None  # for the states stale, diverged and unreadable
    best: dict[str, Any] | None = None  # facts of the run's model, see find_model


def tree_status(tree: Tree) -> dict[str, RunStatus]:
    """Return the status of every experiment by name. Raise UserError if the root can't be read."""
    root, statuses = tree.budget.root, dict[str, RunStatus]()
    names = dict.fromkeys(experiment.settings.dataset for experiment in tree.experiments)
    sources = {name: dataset.find_dataset(root, name) for name in names}
    for experiment in tree.experiments:
        parent = tree.parent(experiment)
        parent_status = None if parent is None else statuses[parent.name]
        source = sources[experiment.settings.dataset]
        digest = None if source is None else source.digest
        statuses[experiment.name] = _run_status(root, experiment, parent_status, digest)
    return statuses


def _run_status(
    root: str, experiment: Experiment, parent_status: RunStatus | None, dataset_digest: str | None
) -> RunStatus:
    planned = Run(root, experiment.settings)
    if not storage.exists(storage.join(planned.uri, "config.yml")):
        return RunStatus(planned, "missing")
    try:
        status = _compare_run(Run(root, read_run_settings(planned.uri)), experiment, parent_status, dataset_digest)
        status.run.metrics()  # read once here: one damaged run does not end a listing of all
        return status._replace(best=find_model(status.run))
    except storage.StorageError:
        raise
    except UserError as error:
        return RunStatus(planned, "unreadable", str(error))


def find_model(run: Run) -> dict[str, Any] | None:
    """Return the facts of a run's model; None if its last stage is not finished, or while the run is moved aside."""
    if not run.is_finished(run.stages[-1]):
        return None
    best = run.best_stage
    return run.model_facts(best) if run.is_finished(best) else None


def _compare_run(
    run: Run, experiment: Experiment, parent_status: RunStatus | None, dataset_digest: str | None
) -> RunStatus:
    """Return the status of a run that was begun. Raise UserError if its files can't be read."""
    reasons = []
    if changed := changed_settings(run.settings, experiment.settings):
        reasons.append(f"other settings: {', '.join(changed[:MAX_LISTED])}{' …' if len(changed) > MAX_LISTED else ''}")
    digest = dataset_digest or run.lineage()["dataset_digest"]
    reasons += changed_inputs(run, digest, parent_sha256(run.root, experiment.settings.parent))
    if parent_status is not None and parent_status.state == "stale":
        reasons.append(f"{parent_status.run.settings.name} is stale")
    if reasons:
        return RunStatus(run, "stale", "; ".join(reasons))
    if not run.unfinished_stages:
        return RunStatus(run, "finished")
    place = divergence_text(run)
    return RunStatus(run, "begun" if place is None else "diverged", place)


def parent_sha256(root: str, parent: str) -> str | None:
    """Return the recorded sha256 of a parent epoch's weights; None for a weights file or a missing epoch."""
    start = parse_parent(parent)
    try:
        return None if start is None else _epoch_sha256(find_run(root, start.run), start)
    except storage.StorageError:
        raise
    except UserError:
        return None


def _epoch_sha256(run: Run, start: ParentEpoch) -> str | None:
    if start.epoch == "best":
        best = find_model(run)
        return None if best is None else str(best["sha256"])
    stage = run.stages[-1]
    if start.epoch == "last":
        epochs = [row["epoch"] for row in run.metrics() if row["stage"] == stage]
        if run.unfinished_stages or not epochs:
            return None
        epoch = max(epochs)
    else:
        epoch = int(start.epoch)
    return checkpoint_index.recorded_sha256(storage.join(run.uri, stage, checkpoint_index.checkpoint_name(epoch)))
