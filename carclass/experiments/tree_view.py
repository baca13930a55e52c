"""A tree of experiments in words: the tree with what became of each run, and one run with what it changes."""

from typing import Any

from carclass.evaluation.charts import best_epoch
from carclass.experiments import report, status
from carclass.experiments.collect import collect_run
from carclass.experiments.tree import Experiment, Tree
from carclass.progress import table
from carclass.runs.run import STAGES, Run

SHOWN_EPOCHS = 5


def draw_tree(tree: Tree) -> str:
    """The tree, a line per experiment: where it starts, its data, its state and its best val accuracy."""
    found = status.tree_status(tree)
    return tree.draw(lambda one: _line(tree, one, found[one.name]))


def _line(tree: Tree, one: Experiment, found: status.RunStatus) -> str:
    start = f"@{one.start.epoch}" if one.start else tree.origin(one)
    words = [start, one.settings.dataset, found.state]
    if found.best is not None:
        words.append(f"val {found.best['val_accuracy']:.3f} (epoch {found.best['epoch']})")
    return "  ".join(words) + (f"  ({found.reason})" if found.reason else "")


def describe_run(tree: Tree, name: str) -> str:
    """A run: where it comes from, what it changes against its parent, and its best and last epochs."""
    one = tree[name]
    found = status.tree_status(tree)[name]
    rows = [("state", found.state + (f": {found.reason}" if found.reason else "")), ("file", one.file)]
    rows += [("run", found.run.uri), ("dataset", one.settings.dataset), ("parent", one.settings.parent)]
    if found.state != "missing":
        origin = found.run.lineage()
        rows += [(key.replace("_", " "), str(origin[key])) for key in ("parent_sha256", "dataset_digest", "code")]
    parent = tree.parent(one)
    if parent is not None:
        rows += [("", ""), (f"against {parent.name}", "")]
        pair = [_planned(tree, node) for node in (one, parent)]
        rows += [(f"  {key}", f"{old} → {new}") for key, old, new in report.changes(*pair)]
    epochs = found.run.metrics() if found.state != "missing" else []
    if epochs:
        rows += [("", ""), ("epochs", str(len(epochs)))]
        best = best_epoch({stage: [row for row in epochs if row["stage"] == stage] for stage in STAGES})
        shown = {} if best is None else {id(best[2]): best[2]}
        shown |= {id(row): row for row in epochs[-SHOWN_EPOCHS:]}
        rows += [(f"  {row['stage']} {row['epoch']}", _epoch(row)) for row in shown.values()]
    return table(rows, title=name)


def _planned(tree: Tree, one: Experiment) -> report.ComparedRun:
    """An experiment as its file has it, whether it was run or not."""
    planned = status.RunStatus(Run(tree.budget.root, one.settings), "missing")
    return collect_run(tree, one, planned, "none", None)


def _epoch(row: dict[str, Any]) -> str:
    return f"train loss {row['train_loss']:.3f}, val loss {row['val_loss']:.3f}, val accuracy {row['val_accuracy']:.3f}"
