"""Status of each experiment's run: its progress, and agreement with its experiment file, parent and dataset."""

from typing import Any, Literal, NamedTuple

from carclass import storage
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.experiments.tree import Experiment, Tree
from carclass.runs import checkpoint_index
from carclass.runs.run import STAGES, Run, changed_inputs, changed_settings, find_run, parse_parent, read_run_settings

State = Literal["missing", "begun", "finished", "stale"]
OF_A_RUN = (
    *(f"{folder}/" for folder in (*STAGES, "steps", "tensorboard", "export", "predictions")), "report", "config.yml",
    "lineage.json", "metrics.jsonl", "preprocessing.json", "calibration.json", "summary.json",
)  # fmt: skip
"""Beginnings of the paths of a run's files; any other file in its folder is the user's."""
MAX_LISTED = 3
"""Largest number of settings listed in a reason."""


class RunStatus(NamedTuple):
    """An experiment's run and its state."""

    run: Run
    state: State
    reason: str | None = None  # for state stale

    @property
    def best(self) -> dict[str, Any] | None:
        """Return the facts of the run's model; None if its last stage is not finished."""
        if self.state == "unreadable" or not self.run.is_finished(self.run.stages[-1]):
            return None
        return self.run.model_facts(self.run.best_stage)


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
    config_uri = storage.join(planned.uri, "config.yml")
    if not storage.exists(config_uri):
        return RunStatus(planned, "missing")
    run = Run(root, read_run_settings(planned.uri))
    reasons = []
    if changed := changed_settings(run.settings, experiment.settings):
        reasons.append(f"other settings: {', '.join(changed[:MAX_LISTED])}{' …' if len(changed) > MAX_LISTED else ''}")
    digest = dataset_digest or run.lineage()["dataset_digest"]
    reasons += changed_inputs(run, digest, parent_sha256(root, experiment.settings.parent))
    if parent_status is not None and parent_status.state == "stale":
        reasons.append(f"{parent_status.run.settings.name} is stale")
    if reasons:
        return RunStatus(run, "stale", "; ".join(reasons))
    return RunStatus(run, "begun" if run.unfinished_stages else "finished")


def parent_sha256(root: str, parent: str) -> str | None:
    """Return the recorded sha256 of a parent epoch's weights; None for a weights file or a missing epoch."""
    start = parse_parent(parent)
    if start is None:
        return None
    try:
        run = find_run(root, start.run)
    except UserError:
        return None
    if start.epoch == "best":
        best = RunStatus(run, "finished").best
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


def set_aside_run(run: Run) -> str:
    """Delete a run to retrain it; keep its records but not its weights in `<root>/replaced/`, and return where."""
    lineage_sha256 = storage.sha256(storage.read_bytes(storage.join(run.uri, "lineage.json")))[:8]
    number = len({path.split("/")[1] for path in _replaced_files(run)})
    target = storage.join(run.root, "replaced", run.settings.name, f"{number + 1:03d}-{lineage_sha256}")
    paths = storage.list_files(run.uri)
    for path in paths:
        if path in ("config.yml", "lineage.json", "metrics.jsonl") or path.startswith("report"):
            storage.write_bytes(storage.join(target, path), storage.read_bytes(storage.join(run.uri, path)))
    # config.yml is deleted after the models: without it, a new run would take old models for its own.
    others = [storage.join(run.uri, path) for path in paths if path.startswith(OF_A_RUN) and path != "config.yml"]
    list(storage.in_parallel(storage.delete, others))
    storage.delete(storage.join(run.uri, "config.yml"))
    return target


def _replaced_files(run: Run) -> list[str]:
    name = run.settings.name
    paths = storage.list_files(storage.join(run.root, "replaced"))
    return [path for path in paths if path.startswith(f"{name}/")]
