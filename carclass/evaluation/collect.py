"""Contents of an evaluation report, read from storage."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carclass import storage
from carclass.config.schema import EvaluateSettings
from carclass.data import dataset
from carclass.evaluation.metrics import confusion_matrix
from carclass.evaluation.report import MaskingSample, Mistake, Report
from carclass.runs.run import Run

NUM_MISTAKES, NUM_MASKING_SAMPLES = 24, 12


def report_uri(run: Run, source: dataset.Dataset, settings: EvaluateSettings) -> str:
    """Return the report's folder: `report` for the run's model on the test split of its dataset, else one of its own.

    That has the names of dataset and split, and of the stage if it is not that of the run's model.
    """
    stage = run.stage_suffix(run.select_stage(settings.stage))
    is_default = source.name == run.settings.dataset and settings.split == "test" and not stage
    return storage.join(run.uri, "report" if is_default else f"report-{source.name}-{settings.split}{stage}")


def collect_report(
    run: Run,
    source: dataset.Dataset,
    settings: EvaluateSettings,
    model_facts: dict[str, Any],
    metrics: dict[str, Any],
    predictions: pa.Table,
) -> Report:
    """Gather the report: lineage, training history, masked photos and worst mistakes."""
    labels, probabilities = to_arrays(predictions, source.classes)
    history: dict[str, list[dict[str, Any]]] = {}
    for row in run.metrics():
        history.setdefault(row["stage"], []).append(row)
    return Report(
        title=f"{run.settings.name} on {source.name} {settings.split}",
        facts=_facts(run, source, settings, model_facts),
        metrics=metrics,
        class_names=source.classes,
        confusion=confusion_matrix(labels, probabilities.argmax(1), len(source.classes)),
        history=history,
        masking=_masking_samples(source, settings.split),
        mistakes=_mistakes(source, predictions),
        quarantined=source.manifest["reasons"] or _parent(source).manifest["reasons"],
    )


def _facts(
    run: Run, source: dataset.Dataset, settings: EvaluateSettings, model_facts: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return (name, value) pairs for the head of the report."""
    lineage = run.lineage()
    checkpoint = f"{model_facts['stage']} epoch {model_facts['epoch']}, val accuracy {model_facts['val_accuracy']:.3f}"
    return [
        ("Run", run.settings.name),
        ("Model", f"{run.settings.model.architecture}, {run.settings.model.image_size} px"),
        ("Checkpoint", checkpoint),
        ("Parent", f"{lineage['parent']} (sha256 {lineage['parent_sha256'][:12]}…)"),
        ("Trained on", f"{run.settings.dataset} (sha256 {lineage['dataset_digest'][:12]}…)"),
        ("Evaluated on", f"{source.name}, {settings.split}: {source.manifest['splits'][settings.split]:,} photos"),
        ("Seed", str(run.settings.seed)),
        ("Code", lineage["code"]),
    ]


def _mistakes(source: dataset.Dataset, predictions: pa.Table) -> list[Mistake]:
    """Return the misclassified photos with the highest confidence."""
    wrong = predictions.filter(pc.not_equal(predictions["label"], predictions["predicted"]))
    rows = wrong.drop(["probabilities"]).sort_by([("confidence", "descending")]).slice(0, NUM_MISTAKES).to_pylist()
    photos = {row["key"]: row["image"] for row in source.rows([row["key"] for row in rows], ["image"])}
    return [
        Mistake(
            photo=photos[row["key"]],
            key=row["key"],
            label=row["label"],
            predicted=row["predicted"],
            confidence=row["confidence"],
        )
        for row in rows
    ]


def _parent(source: dataset.Dataset) -> dataset.Dataset:
    """Return the source of a masked dataset; an unmasked dataset is its own source."""
    name = source.manifest["settings"].get("source")
    return dataset.load_dataset(source.uri.rsplit("/", 2)[0], name) if name else source


def _masking_samples(source: dataset.Dataset, split: str) -> list[MaskingSample]:
    """Return photos before and after masking, chosen by hash; none for an unmasked dataset."""
    if source.manifest["kind"] != "masked":
        return []
    index = source.read(["image_id", "key", "split"]).filter(pc.field("split") == split).sort_by("image_id")
    keys = index["key"].to_pylist()[:NUM_MASKING_SAMPLES]
    before = {row["key"]: row["image"] for row in _parent(source).rows(keys, ["image"])}
    columns = ["image", "outcome", "vehicle_class", "score"]
    return [
        MaskingSample(caption=_caption(row), before=before[row["key"]], after=row["image"])
        for row in source.rows(keys, columns)
    ]


def _caption(row: dict[str, Any]) -> str:
    """Return a masked photo's key and detection."""
    if row["outcome"] == "no_vehicle":
        return f"{row['key']}: no vehicle found"
    return f"{row['key']}: {row['vehicle_class']}, score {row['score']:.2f}"


def to_arrays(predictions: pa.Table, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64 (N,) labels, float32 (N,C) probabilities) of a table of predictions."""
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[label] for label in predictions["label"].to_pylist()])
    return labels, np.stack(predictions["probabilities"].to_numpy())
