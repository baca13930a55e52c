"""Trees of experiments and single runs as text, with their states and results."""

from typing import Any

from carclass.experiments.collect import collect_run
from carclass.experiments.results import ComparedRun, settings_diff
from carclass.experiments.status import RunStatus, tree_status
from carclass.experiments.tree import Experiment, Tree
from carclass.formatting import rate_text
from carclass.progress import table
from carclass.runs.environment import environment_text
from carclass.runs.run import Run, best_epoch_row

NUM_LAST_EPOCHS = 5


def draw_tree(tree: Tree) -> str:
    """Return a line per experiment: parent, dataset, state and best val accuracy."""
    statuses = tree_status(tree)
    return tree.draw(lambda experiment: _describe(tree, experiment, statuses[experiment.name]))


def _describe(tree: Tree, experiment: Experiment, status: RunStatus) -> str:
    start = experiment.parent_epoch
    words = [f"@{start.epoch}" if start else tree.parent_label(experiment), experiment.settings.dataset, status.state]
    if status.best is not None:
        stage = f"{status.best['stage']} " if len(status.run.stages) > 1 else ""
        words.append(f"val {rate_text(status.best['val_accuracy'])} ({stage}epoch {status.best['epoch']})")
    return "  ".join(words) + (f"  ({status.reason})" if status.reason else "")


def describe_run(tree: Tree, name: str) -> str:
    """Return a run's state, origin, changes against its parent, and its best and last epochs."""
    experiment = tree[name]
    status = tree_status(tree)[name]
    rows = [("state", status.state + (f": {status.reason}" if status.reason else "")), ("file", experiment.file)]
    rows += [("run", status.run.uri), ("dataset", experiment.settings.dataset), ("parent", experiment.settings.parent)]
    is_readable = status.state not in ("missing", "unreadable")
    if is_readable:
        lineage = status.run.lineage()
        keys = ("parent_sha256", "dataset_digest", "code", "started")
        rows += [(key.replace("_", " "), str(lineage[key])) for key in keys]
        rows += [(each["stage"], environment_text(each)) for each in lineage["environments"]]
    parent = tree.parent(experiment)
    if parent is not None:
        rows += [("", ""), (f"against {parent.name}", "")]
        diff = settings_diff(_planned_run(tree, experiment), _planned_run(tree, parent))
        rows += [(f"  {key}", f"{old} → {new}") for key, old, new in diff]
    epochs = status.run.metrics() if is_readable else []
    if epochs:
        rows += [("", ""), ("epochs", str(len(epochs)))]
        best = best_epoch_row(epochs)
        last = [row for row in epochs[-NUM_LAST_EPOCHS:] if row is not best]
        shown = last if best is None else [best, *last]
        rows += [(f"  {row['stage']} {row['epoch']}", _epoch_text(row)) for row in shown]
    return table(rows, title=name)


def _planned_run(tree: Tree, experiment: Experiment) -> ComparedRun:
    """Return an experiment with the settings of its file, whether it was run or not."""
    planned = RunStatus(Run(tree.budget.root, experiment.settings), "missing")
    return collect_run(tree, experiment, planned, "none", None)


def _epoch_text(row: dict[str, Any]) -> str:
    losses = f"train loss {row['train_loss']:.3f}, val loss {row['val_loss']:.3f}"
    return f"{losses}, val accuracy {rate_text(row['val_accuracy'])}"
