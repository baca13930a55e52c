"""The results of a tree of experiments, read from storage."""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from carclass import storage
from carclass.data import dataset
from carclass.experiments import tree as trees
from carclass.experiments.report import ComparedRun, Comparison, TestResult
from carclass.experiments.status import RunStatus
from carclass.experiments.tree import Experiment, Tree
from carclass.runs.run import code_version, flatten

SEED = 123
"""Of the bootstrap."""


def collect_comparison(tree: Tree, found: dict[str, RunStatus]) -> Comparison:
    """All that is known of a tree's runs."""
    baseline = trees.baseline(tree.budget)
    finished = sum(one.state == "finished" for one in found.values())
    facts = [
        ("experiments", f"{len(found)}, of which {finished} are finished"),
        ("root", tree.budget.root),
        ("code", code_version()),
    ]
    treatments = {name: dataset_treatment(tree, name) for name in {one.settings.dataset for one in tree.experiments}}
    return Comparison(
        title="Experiments",
        facts=facts,
        entries=[
            collect_run(tree, one, found[one.name], treatments[one.settings.dataset], baseline)
            for one in tree.experiments
        ],
        baseline=None if baseline is None else baseline.name,
        seed=SEED,
    )


def collect_run(
    tree: Tree, one: Experiment, found: RunStatus, treatment: str, baseline: trees.Baseline | None
) -> ComparedRun:
    """What is known of an experiment. treatment: what was done to its photos."""
    parent, best = tree.parent(one), found.best
    settings = found.run.settings  # of what was run, where that isn't what the file says now
    figures = trees.Figures() if baseline is None else baseline.figures.get(one.name, trees.Figures())
    return ComparedRun(
        name=one.name,
        parent=tree.origin(one),
        parent_name=None if parent is None else parent.name,
        dataset=settings.dataset,
        treatment=treatment,
        state=found.state,
        reason=found.reason,
        settings=flatten(settings.model_dump(mode="json")),
        epochs=[] if found.state == "missing" else found.run.metrics(),
        val_accuracy=None if best is None else best["val_accuracy"],
        baseline_val=figures.val,
        baseline_test=figures.test,
        test=_test(found),
    )


def dataset_treatment(tree: Tree, name: str) -> str:
    """What was done to a dataset's photos."""
    source = dataset.find_dataset(tree.budget.root, name)
    if source is None or source.manifest["kind"] != "masked":
        return "none"
    return str(source.manifest["settings"]["cutout"]["mode"])


def evaluation_uri(found: RunStatus) -> str:
    """The figures of a run's test."""
    return storage.join(found.run.uri, "report", "metrics.json")


def _test(found: RunStatus) -> TestResult | None:
    if not storage.exists(evaluation_uri(found)):
        return None
    metrics: dict[str, Any] = json.loads(storage.read_bytes(evaluation_uri(found)))
    with storage.open_file(storage.join(found.run.uri, "report", "predictions.parquet")) as file:
        rows = pq.read_table(file, columns=["key", "label", "predicted"]).sort_by("key").to_pydict()
    return TestResult(
        keys=rows["key"],
        correct=np.array(rows["label"]) == np.array(rows["predicted"]),
        metrics=metrics,
        report=f"../experiments/{found.run.settings.name}/report/report.html",
    )
