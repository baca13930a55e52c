"""How far each experiment of a tree is, and whether its run is still what its files, parents and data say."""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from carclass import storage
from carclass.data import dataset
from carclass.errors import UserError
from carclass.experiments.tree import Experiment, Tree
from carclass.runs.run import Run, changed_origins, changed_settings, find_run, parse_parent, parse_run_settings
from carclass.training import checkpoint

State = Literal["missing", "begun", "finished", "stale"]
MAX_NAMED = 3
"""Settings that a reason names."""


class RunStatus(NamedTuple):
    """An experiment's run."""

    run: Run
    state: State
    reason: str | None = None  # why it is stale

    @property
    def best(self) -> dict[str, Any] | None:
        """The facts of the last stage's best epoch, once it is published."""
        uri = f"{self.run.model_uri(self.run.stages[-1])}.json"
        return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def tree_status(tree: Tree) -> dict[str, RunStatus]:
    """Every experiment's, by name. UserError when the root can't be read."""
    digests: dict[str, str | None] = {}
    found: dict[str, RunStatus] = {}
    for one in tree.experiments:
        name = one.settings.dataset
        if name not in digests:
            source = dataset.find_dataset(tree.budget.root, name)
            digests[name] = None if source is None else source.digest
        parent = tree.parent(one)
        above = None if parent is None else found[parent.name]
        found[one.name] = _standing(tree.budget.root, one, above, digests[name])
    return found


def _standing(root: str, one: Experiment, above: RunStatus | None, digest: str | None) -> RunStatus:
    planned = Run(root, one.settings)
    config_uri = storage.join(planned.uri, "config.yml")
    if not storage.exists(config_uri):
        return RunStatus(planned, "missing")
    run = Run(root, parse_run_settings(storage.read_bytes(config_uri)))
    reasons = [_settings(changed_settings(run.settings, one.settings))]
    reasons += changed_origins(run, digest or run.lineage()["dataset_digest"], parent_sha256(root, one.settings.parent))
    if above is not None and above.state == "stale":
        reasons.append(f"{above.run.settings.name} is stale")
    if any(reasons):
        return RunStatus(run, "stale", "; ".join(reason for reason in reasons if reason))
    return RunStatus(run, "begun" if run.unfinished_stages else "finished")


def _settings(changed: Sequence[str]) -> str:
    named = ", ".join(changed[:MAX_NAMED]) + (" …" if len(changed) > MAX_NAMED else "")
    return f"other settings: {named}" if changed else ""


def parent_sha256(root: str, parent: str) -> str | None:
    """What a parent's weights hash to, as its run says; None where they aren't those of a run, or aren't there yet."""
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
    return checkpoint.recorded_sha256(storage.join(run.uri, stage, checkpoint.checkpoint_name(epoch)))


def set_aside_run(run: Run) -> str:
    """Removes a run to train it anew; what it said of itself stays in `<root>/replaced/`, weights don't.

    Returns where.
    """
    begun = storage.sha256(storage.read_bytes(storage.join(run.uri, "lineage.json")))[:8]
    number = len({path.split("/")[1] for path in _replaced(run)})
    place = storage.join(run.root, "replaced", run.settings.name, f"{number + 1:03d}-{begun}")
    paths = storage.list_files(run.uri)
    for path in paths:
        if path in ("config.yml", "lineage.json", "metrics.jsonl") or path.startswith("report"):
            storage.write_bytes(storage.join(place, path), storage.read_bytes(storage.join(run.uri, path)))
    # What says that it has begun goes after the models: a new run would take those for its own.
    for folder in sorted({path.split("/")[0] for path in paths if "/" in path}):
        storage.delete_folder(storage.join(run.uri, folder))
    storage.delete(storage.join(run.uri, "config.yml"))
    storage.delete_folder(run.uri)
    return place


def _replaced(run: Run) -> list[str]:
    name = run.settings.name
    found = storage.list_files(storage.join(run.root, "replaced"))
    return [path for path in found if path.startswith(f"{name}/")]
