"""Evaluation job: classify every photo of a split once, with the preprocessing of training, and write a report."""

import logging
import time
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from carclass import storage
from carclass.config.schema import EvaluateSettings
from carclass.data import dataset, formats
from carclass.data.lease import hold_lease
from carclass.evaluation.calibrate import calibrate_if_possible, calibrate_predictions
from carclass.evaluation.classification import predict_split
from carclass.evaluation.collect import collect_report, to_arrays
from carclass.evaluation.metrics import classification_metrics
from carclass.evaluation.report import render
from carclass.evaluation.target import EvaluationTarget, find_target
from carclass.formatting import rate_text
from carclass.runs.calibration_record import Calibration
from carclass.runs.preprocessing_record import masking_difference
from carclass.runs.report_record import METRICS, PREDICTIONS, report_uri
from carclass.runs.run import Run
from carclass.runs.saved_model import read_model
from carclass.runs.seen_photos import find_seen_photos

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Metrics of an evaluation and the URI of its report."""

    accuracy: float
    metrics: dict[str, Any]
    report_uri: str


def evaluate_run(root: str, settings: EvaluateSettings) -> Evaluation:
    """Write `<run>/report/`. Raise UserError if run, dataset and classes do not match."""
    return evaluate_target(find_target(root, settings), settings)


def evaluate_target(target: EvaluationTarget, settings: EvaluateSettings) -> Evaluation:
    """Write the report of a run's stage on a dataset."""
    run, stage, source = target
    model_uri = run.model_uri(stage)
    _, model_facts = read_model(model_uri)
    _warn_about_photos(run, source, settings.split)
    uri = report_uri(run, source.name, settings.split, stage)
    _tell_of_report(uri)
    with hold_lease(uri, "evaluate") as lease:
        calibrated = calibrate_if_possible(run, model_uri, model_facts, settings.batch_size)
        predictions = predict_split(source, settings, model_uri, run.settings.use_gpu)
        if calibrated is not None:
            predictions = calibrate_predictions(predictions, calibrated.temperature)
        metrics = {
            **_describe(source, settings, model_facts, calibrated),
            **classification_metrics(*to_arrays(predictions, source.classes), source.classes),
        }
        html = render(collect_report(run, source, settings, model_facts, metrics, predictions, calibrated))
        sink = pa.BufferOutputStream()
        pq.write_table(predictions, sink, write_page_checksum=True)
        metrics["predictions_sha256"] = storage.sha256(sink.getvalue())
        lease.check()
        _warn_about_other_version(uri, source, metrics)
        storage.write_bytes(storage.join(uri, PREDICTIONS), sink.getvalue().to_pybytes())
        formats.write(storage.join(uri, METRICS), "evaluation", metrics)
        storage.write_bytes(storage.join(uri, "report.html"), html.encode())
    return Evaluation(metrics["accuracy"], metrics, storage.join(uri, "report.html"))


def _tell_of_report(uri: str) -> None:
    """Log the report that will be replaced, if there is one."""
    html = storage.join(uri, "report.html")
    if storage.exists(html):
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(storage.stat(html).modified))
        log.info("evaluate: %s of %s will be replaced", html, written)


def _warn_about_photos(run: Run, source: dataset.Dataset, split: str) -> None:
    """Warn of photos that are masked otherwise than in training, or that the run or its ancestors were trained on."""
    name = run.settings.name
    if (difference := masking_difference(run, source)) is not None:
        log.warning("evaluate: dataset %s is not as run %s was trained: %s", source.name, name, difference)
    seen = find_seen_photos(run, source, split)
    if seen.text:
        log.warning("evaluate: of the %s photos of dataset %s, %s: accuracy is too high", split, source.name, seen.text)
    if seen.unknown:
        log.warning("evaluate: %s photos of dataset %s: %s", split, source.name, seen.unknown_text)


def _warn_about_other_version(uri: str, source: dataset.Dataset, metrics: dict[str, Any]) -> None:
    """Warn if a report that is about to be replaced is of another version of the dataset."""
    try:
        former = formats.read(storage.join(uri, METRICS), "evaluation")
    except (FileNotFoundError, formats.DamagedFileError):
        return
    if former.get("dataset_digest") not in (None, source.digest):
        log.warning(
            "evaluate: the former report in %s was of another version of dataset %s: accuracy %s of %s photos, now %s "
            "of %s. The two are not of the same photos",
            uri, source.name,
            *(text for each in (former, metrics) for text in (rate_text(each["accuracy"]), each["num_photos"])),
        )  # fmt: skip


def _describe(
    source: dataset.Dataset, settings: EvaluateSettings, model_facts: dict[str, Any], calibrated: Calibration | None
) -> dict[str, Any]:
    """Return the photos, the model and the temperature that metrics are of."""
    return {
        "dataset": source.name,
        "dataset_digest": source.digest,
        "split": settings.split,
        **{key: model_facts[key] for key in ("stage", "epoch", "chosen") if key in model_facts},
        "model_sha256": model_facts["sha256"],
        "temperature": None if calibrated is None else calibrated.temperature,
    }
