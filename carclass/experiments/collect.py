"""Results of a tree of experiments, read from storage."""

import logging
from dataclasses import replace

import numpy as np

from carclass import storage
from carclass.config.budget import Baseline, Figures
from carclass.data import dataset
from carclass.data.same_photos import have_same_photos
from carclass.errors import UserError
from carclass.experiments.results import ComparedRun, Comparison, TestResult
from carclass.experiments.status import RunStatus
from carclass.experiments.tree import Experiment, Tree, load_baseline
from carclass.runs.environment import code_version
from carclass.runs.report_record import is_of_training_dataset, read_report_metrics, read_report_predictions
from carclass.runs.run import flatten
from carclass.runs.seen_photos import find_seen_photos

log = logging.getLogger(__name__)
BOOTSTRAP_SEED = 123


def collect_comparison(tree: Tree, statuses: dict[str, RunStatus]) -> Comparison:
    """Return the results of all runs of a tree. statuses: by experiment."""
    baseline = load_baseline(tree.budget)
    num_finished = sum(status.state == "finished" for status in statuses.values())
    facts = [
        ("Experiments", f"{len(statuses)}, {num_finished} of them finished"),
        ("Root", tree.budget.root),
        ("Code", code_version()),
    ]
    unknown = [] if baseline is None else sorted(baseline.figures.keys() - statuses.keys())
    if unknown:
        log.warning("lineage: the baseline has figures of runs that the tree does not have: %s", ", ".join(unknown))
    datasets = {experiment.settings.dataset for experiment in tree.experiments}
    treatments = {name: dataset_treatment(tree, name) for name in datasets}
    val_photos = group_by_val(tree)
    runs = [
        collect_run(tree, experiment, statuses[experiment.name], treatments[experiment.settings.dataset], baseline)
        for experiment in tree.experiments
    ]
    return Comparison(
        title="Experiments",
        facts=facts,
        runs=[
            replace(run, val_photos=val_photos.get(run.dataset), seen_photos=describe_seen(statuses[run.name]))
            for run in runs
        ],
        baseline=None if baseline is None else baseline.name,
        seed=BOOTSTRAP_SEED,
    )


def collect_run(
    tree: Tree, experiment: Experiment, status: RunStatus, treatment: str, baseline: Baseline | None
) -> ComparedRun:
    """Return the results of an experiment. treatment: of its dataset, see dataset_treatment."""
    parent, best = tree.parent(experiment), status.best
    settings = status.run.settings  # those of the run, which may differ from the experiment file
    figures = Figures() if baseline is None else baseline.figures.get(experiment.name, Figures())
    return ComparedRun(
        name=experiment.name,
        parent=tree.parent_label(experiment),
        parent_name=None if parent is None else parent.name,
        dataset=settings.dataset,
        treatment=treatment,
        state=status.state,
        reason=status.reason,
        settings=flatten(settings.model_dump(mode="json")),
        epochs=[] if status.state in ("missing", "unreadable") else status.run.metrics(),
        val_accuracy=None if best is None else best["val_accuracy"],
        baseline_val=figures.val,
        baseline_test=figures.test,
        test=read_test(status),
    )


def describe_seen(status: RunStatus) -> str:
    """Return the number of a finished run's test photos that it or its ancestors were trained on, in words.

    Empty if there are none, or if they can't be known, as of an ancestor whose record is damaged.
    """
    if status.state != "finished":
        return ""
    source = dataset.find_dataset(status.run.root, status.run.settings.dataset)
    try:
        if source is None:
            return ""
        seen = find_seen_photos(status.run, source, "test")
        if seen.unknown:
            log.warning("lineage: test photos of run %s: %s", status.run.settings.name, seen.unknown_text)
        return seen.text
    except storage.StorageError:
        raise
    except UserError as error:
        log.warning("lineage: the train photos of %s are not known: %s", status.run.settings.name, error)
        return ""


def group_by_val(tree: Tree) -> dict[str, str]:
    """Map each published dataset of a tree to the first one with the same val photos."""
    groups: dict[str, str] = {}
    firsts: list[dataset.Dataset] = []
    for name in dict.fromkeys(experiment.settings.dataset for experiment in tree.experiments):
        source = dataset.find_dataset(tree.budget.root, name)
        if source is not None:
            first = next((each for each in firsts if have_same_photos([each, source], "val")), source)
            firsts += [source] if first is source else []
            groups[name] = first.name
    return groups


def dataset_treatment(tree: Tree, name: str) -> str:
    """Return the cutout mode of a dataset's photos; "none" for a dataset that is not masked or not published."""
    source = dataset.find_dataset(tree.budget.root, name)
    if source is None or source.manifest["kind"] != "masked":
        return "none"
    return str(source.manifest["settings"]["cutout"]["mode"])


def read_test(status: RunStatus) -> TestResult | None:
    """Return the evaluation of a run's model on its test photos; None if there is none that can be read.

    One on another version of the run's dataset is none.
    """
    run = status.run
    if status.best is None:
        return None
    try:
        metrics = read_report_metrics(run, run.model_name)
        if metrics is None or not is_of_training_dataset(run, metrics):
            return None
        table = read_report_predictions(run, run.model_name, metrics)
    except storage.StorageError:
        raise
    except UserError:
        return None
    columns = {"key", "label", "predicted", "image_id"}.intersection(table.column_names)
    rows = table.select(sorted(columns)).sort_by("key").to_pydict()
    return TestResult(
        keys=rows["key"],
        image_ids=rows.get("image_id"),
        correct=np.array(rows["label"]) == np.array(rows["predicted"]),
        metrics=metrics,
        report=f"../experiments/{run.settings.name}/report/report.html",
    )
