"""Run and dataset of an evaluation, found and compared before the libraries that classify photos are loaded."""

from collections.abc import Sequence
from typing import NamedTuple

from carclass.config.schema import EvaluateSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.runs.run import REFIT, Run, find_run


class EvaluationTarget(NamedTuple):
    """A stage of a run, and the dataset to evaluate its model on."""

    run: Run
    stage: str
    source: dataset.Dataset


def find_target(root: str, settings: EvaluateSettings) -> EvaluationTarget:
    """Return the run and the dataset of an evaluation. Raise UserError if run, dataset and classes do not match."""
    if settings.run is None:
        raise UserError("`evaluate.run` is missing: name the run to evaluate, e.g. --run first.")
    run = find_run(root, settings.run)
    stage = run.select_stage(settings.stage)
    classes = run.model_facts(stage)["classes"]
    source = dataset.load_dataset(root, settings.dataset or run.settings.dataset)
    if source.classes != classes:
        raise UserError(
            f"run `{settings.run}` and dataset `{source.name}` have different classes: "
            f"{describe_difference(classes, source.classes)}. Evaluate on the run's training dataset, or on one masked "
            "from it."
        )
    if stage == REFIT and settings.split == "val":
        raise UserError(
            f"`evaluate.split`: the model of run `{settings.run}` is a refit, which was trained on the val photos too. "
            f"Evaluate the one that was chosen on them by `evaluate.stage: {run.best_stage}`, or evaluate on test."
        )
    if not source.manifest["splits"][settings.split]:
        raise UserError(f"dataset `{source.name}` has no {settings.split} photos. Choose another `evaluate.split`.")
    return EvaluationTarget(run, stage, source)


def describe_difference(of_run: Sequence[str], of_dataset: Sequence[str]) -> str:
    """Return how two lists of classes differ, with an example of each."""
    only = {"run": sorted({*of_run} - {*of_dataset}), "dataset": sorted({*of_dataset} - {*of_run})}
    parts = [f"only the {owner} has {names[0]!r}" for owner, names in only.items() if names]
    return "; ".join(parts) or "the same ones in another order"
