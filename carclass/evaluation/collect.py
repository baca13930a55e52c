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
from carclass.runs.calibration_record import Calibration
from carclass.runs.preprocessing_record import masking_difference
from carclass.runs.run import Run, model_text
from carclass.runs.seen_photos import find_seen_photos

NUM_MISTAKES, NUM_MASKING_SAMPLES = 24, 12


def collect_report(
    run: Run,
    source: dataset.Dataset,
    settings: EvaluateSettings,
    model_facts: dict[str, Any],
    metrics: dict[str, Any],
    predictions: pa.Table,
    calibrated: Calibration | None,
) -> Report:
    """Gather the report: lineage, training history, masked photos and worst mistakes.

    calibrated: the calibration of the predictions; None if they are not calibrated.
    """
    labels, probabilities = to_arrays(predictions, source.classes)
    history: dict[str, list[dict[str, Any]]] = {}
    for row in run.metrics():
        history.setdefault(row["stage"], []).append(row)
    return Report(
        title=f"Run {run.settings.name}: {settings.split} photos of {source.name}",
        facts=[*_facts(run, source, settings, model_facts), *_copies(predictions)],
        split=settings.split,
        model=(model_facts["stage"], model_facts["epoch"]),
        metrics=metrics,
        calibration=_calibration_text(run, source, settings, calibrated),
        val_coverage=[] if calibrated is None or settings.split == "val" else calibrated.coverage,
        class_names=source.classes,
        confusion=confusion_matrix(labels, probabilities.argmax(1), len(source.classes)),
        history=history,
        masking=_masking_samples(source, settings.split),
        mistakes=_mistakes(source, predictions),
        quarantined=quarantined(source),
        dataset_pages=_dataset_pages(source),
        missing_source=_source_name(source) if _is_masked(source) and _find_source(source) is None else None,
    )


def _facts(
    run: Run, source: dataset.Dataset, settings: EvaluateSettings, model_facts: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return (name, value) pairs for the head of the report."""
    lineage, difference = run.lineage(), masking_difference(run, source)
    seen = find_seen_photos(run, source, settings.split)
    return [
        ("Run", run.settings.name),
        ("Model", f"{run.settings.model.architecture}, {run.settings.model.image_size} px"),
        ("Checkpoint", model_text(model_facts)),
        ("Parent", f"{lineage['parent']} (sha256 {lineage['parent_sha256'][:12]}…)"),
        ("Trained on", f"{run.settings.dataset} (sha256 {lineage['dataset_digest'][:12]}…)"),
        ("Evaluated on", _photos_text(run, source, settings.split)),
        *([("Masking", f"differs: {difference}")] if difference is not None else []),
        *([("Sampling", "balanced: each class equally often")] if run.settings.sampling == "balanced" else []),
        *([("Seen in training", f"{seen.text}: the accuracy is too high")] if seen.text else []),
        *([("Train photos", seen.unknown_text)] if seen.unknown else []),
        ("Seed", str(run.settings.seed)),
        ("Code", lineage["code"]),
    ]


def _photos_text(run: Run, source: dataset.Dataset, split: str) -> str:
    """Return the evaluated photos in words."""
    text = f"{source.name}, {split}: {source.manifest['splits'][split]:,} photos"
    is_same_version = source.digest == run.lineage()["dataset_digest"]
    if source.name != run.settings.dataset or is_same_version:
        return text
    return f"{text}, of another version of it than the run was trained on"


def _copies(predictions: pa.Table) -> list[tuple[str, str]]:
    """Return a remark on photos that are copies of others, which count as independent in the metrics."""
    copies = len(predictions) - pc.count_distinct(predictions["image_id"]).as_py()
    if not copies:
        return []
    return [("Copies", f"{copies:,} of the photos have the bytes of another: the interval is too narrow")]


def _calibration_text(
    run: Run, source: dataset.Dataset, settings: EvaluateSettings, calibrated: Calibration | None
) -> str:
    """Return a sentence on the probabilities in a report."""
    if calibrated is None:
        return "Probabilities are the network's own, not calibrated: the run's val photos are no longer available."
    if run.settings.refit and settings.stage is None:
        return (
            f"Probabilities are as those of predictions, at temperature {calibrated.text}, by the model before the "
            "refit, which has seen the val photos. The accuracies on val below are of that model too."
        )
    is_used = calibrated.temperature == calibrated.fitted_temperature
    is_fitted_here = is_used and settings.split == "val" and source.digest == run.lineage()["dataset_digest"]
    here = " It was fitted on these very photos, which flatters the calibration." if is_fitted_here else ""
    return f"Probabilities are as those of predictions, at temperature {calibrated.text}.{here}"


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


def _is_masked(source: dataset.Dataset) -> bool:
    return bool(source.manifest["kind"] == "masked")


def _source_name(source: dataset.Dataset) -> str:
    """Return the name of the dataset that a masked dataset was made from."""
    return str(source.manifest["settings"]["source"])


def _find_source(source: dataset.Dataset) -> dataset.Dataset | None:
    """Return the dataset that a masked dataset was made from; None if it is gone or has changed since."""
    found = dataset.find_dataset(source.uri.rsplit("/", 2)[0], _source_name(source))
    return found if found is not None and found.digest == source.source_digest else None


def quarantined(source: dataset.Dataset) -> dict[str, dict[str, int]]:
    """Return the quarantine, reason → photos, of a dataset and of those it was masked from, the first one first."""
    if not _is_masked(source):
        return {f"{source.name} (ingest)": source.manifest["reasons"]}
    before = _find_source(source)
    earlier = {} if before is None else quarantined(before)
    return {**earlier, f"{source.name} (masking)": source.manifest["reasons"]}


def _dataset_pages(source: dataset.Dataset) -> list[tuple[str, str]]:
    """Return (name, link from a run's report) of the pages of a dataset and of the one it was masked from."""
    before = _find_source(source) if _is_masked(source) else None
    return [
        (each.name, f"../../../datasets/{each.name}/report.html")
        for each in (before, source)
        if each is not None and storage.exists(storage.join(each.uri, "report.html"))
    ]


def _masking_samples(source: dataset.Dataset, split: str) -> list[MaskingSample]:
    """Return photos before and after masking, chosen by hash; none if the photos before masking are not available."""
    if not _is_masked(source) or (unmasked := _find_source(source)) is None:
        return []
    index = source.read(["image_id", "key", "split"]).filter(pc.field("split") == split).sort_by("image_id")
    keys = index["key"].to_pylist()[:NUM_MASKING_SAMPLES]
    before = {row["key"]: row["image"] for row in unmasked.rows(keys, ["image"])}
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
    """Return (int64 (N,) labels, float32 (N,C) probabilities) of a table of predictions.

    Raise UserError if a label is none of the classes.
    """
    labels = dataset.class_indices(predictions["label"], classes)
    return labels, np.stack(predictions["probabilities"].to_numpy())
