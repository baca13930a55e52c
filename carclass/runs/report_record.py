"""Reports of evaluations: the folder of each, and the model, dataset and predictions that its metrics are of."""

from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.runs.run import Run

METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"


def report_uri(run: Run, dataset_name: str, split: str, stage: str) -> str:
    """Return the folder of a report: `report` for the run's model on the test photos of its dataset, else its own.

    That has the names of dataset and split, and of the stage if it is not that of the run's model.
    """
    suffix = run.stage_suffix(stage)
    is_default = dataset_name == run.settings.dataset and split == "test" and not suffix
    return storage.join(run.uri, "report" if is_default else f"report-{dataset_name}-{split}{suffix}")


def read_report_metrics(run: Run, stage: str) -> dict[str, Any] | None:
    """Return the metrics of a finished stage's model on the test photos of the run's dataset; None if there are none.

    Those of another split or dataset, as of a report that was moved here, are none. Earlier versions always
    evaluated the last stage and did not record the model.
    """
    try:
        metrics = formats.read(storage.join(own_report_uri(run, stage), METRICS), "evaluation")
    except FileNotFoundError:
        return None
    evaluated = metrics["model_sha256"]
    is_same = stage == run.stages[-1] if evaluated is None else evaluated == run.model_facts(stage)["sha256"]
    own = {"dataset": run.settings.dataset, "split": "test"}
    is_own = all(metrics.get(key, value) == value for key, value in own.items())
    return metrics if is_same and is_own else None


def is_of_training_dataset(run: Run, metrics: dict[str, Any]) -> bool:
    """Return True if metrics are of the version of the dataset that a run was trained on, or it is not recorded."""
    return metrics.get("dataset_digest") in (None, run.lineage()["dataset_digest"])


def read_report_predictions(run: Run, stage: str, metrics: dict[str, Any]) -> pa.Table:
    """Return the predictions that metrics of read_report_metrics are of. Raise UserError if the file has others."""
    uri, expected = storage.join(own_report_uri(run, stage), PREDICTIONS), metrics.get("predictions_sha256")
    with dataset.report_damage(uri):
        if expected is not None and storage.sha256(storage.read_bytes(uri)) != expected:
            raise UserError(
                f"{uri} has other predictions than those that {METRICS} beside it is of (`predictions_sha256`). "
                f"{formats.KINDS['evaluation'].remedy}"
            )
    return dataset.read_part(uri)


def own_report_uri(run: Run, stage: str) -> str:
    """Return the folder of the report of a stage's model on the test photos of the run's dataset."""
    return report_uri(run, run.settings.dataset, "test", stage)
