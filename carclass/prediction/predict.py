"""Prediction job: new photos and a finished run → calibrated predictions in one table."""

import logging
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import EvaluateSettings, PredictSettings
from carclass.data import quarantine, streaming
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.data.lease import hold_lease
from carclass.errors import UserError
from carclass.evaluation.evaluate import predict_split, to_arrays
from carclass.ingestion.listing import list_photos
from carclass.prediction import calibration, predictions
from carclass.prediction.calibration import Calibration
from carclass.prediction.classify import PredictionJob, stream_predictions
from carclass.prediction.run_preprocessing import Preprocessing, load_preprocessing, training_dataset
from carclass.runs.run import Run, find_run
from carclass.runs.saved_model import read_model

log = logging.getLogger(__name__)


class PredictionResult(NamedTuple):
    """Location, counts and calibration of finished predictions."""

    uri: str
    counts: predictions.Counts
    calibration: Calibration


def predict_photos(root: str, settings: PredictSettings) -> PredictionResult:
    """Write `<run>/predictions/<name>/`; do nothing if it is finished.

    Raise UserError if the run is missing or unfinished, there are no photos, the name was used with other settings, or
    the preprocessing of the run's photos cannot be repeated.
    """
    if settings.run is None:
        raise UserError("`predict.run` is missing: name the run to use, e.g. --run sample.")
    run = find_run(root, settings.run)
    model_uri = run.model_uri(run.stages[-1])
    _, facts = read_model(model_uri)
    storage.check_root(root)
    uri = predictions.predictions_uri(run.uri, settings.name)
    with hold_lease(uri, "predict") as lease, Inventory() as inventory:
        list_photos(settings.photos, inventory, "predict.photos", root=root)
        preprocessing = load_preprocessing(run)
        calibrated = calibrate_run(run, facts, settings.batch_size)
        identity = _identity(settings, inventory, facts, preprocessing, calibrated)
        if predictions.begin_predictions(uri, identity) and not predictions.read_counts(uri).reasons.get("unreadable"):
            log.info("predict: %s is finished, nothing to do", uri)
        else:
            reading = preprocessing.ingest_settings(settings.photos)
            mask = preprocessing.mask_settings(root, settings.detector_weights)
            job = PredictionJob(settings, reading, mask, model_uri, facts["classes"], calibrated.temperature)
            _write_predictions(Draft(uri, identity, inventory, lease=lease), job)
    return PredictionResult(uri, predictions.read_counts(uri), calibrated)


def calibrate_run(run: Run, facts: dict[str, Any], batch_size: int) -> Calibration:
    """Return the run's calibration, fitted on its val photos at the first call; raise UserError if these are gone."""
    if (stored := calibration.read_calibration(run.uri, facts["sha256"])) is not None:
        return stored
    source = training_dataset(run)
    if not source.manifest["splits"]["val"]:
        raise UserError(
            f"dataset `{source.name}` has no val photos to calibrate run `{run.settings.name}` on. "
            "Choose a run whose dataset has a val split."
        )
    connection.connect({"root": run.uri})
    settings = EvaluateSettings(run=run.settings.name, split="val", batch_size=batch_size)
    table = predict_split(source, settings, run.model_uri(run.stages[-1]))
    fitted = calibration.fit_calibration(*to_arrays(table, facts["classes"]), facts["sha256"])
    calibration.write_calibration(run.uri, fitted)
    log.info("predict: temperature %.3f, fitted on %s val photos", fitted.temperature, f"{fitted.num_photos:,}")
    return fitted


def _identity(
    settings: PredictSettings,
    inventory: Inventory,
    facts: dict[str, Any],
    preprocessing: Preprocessing,
    calibrated: Calibration,
) -> dict[str, Any]:
    """Return all settings that determine the rows, with hashes of the listing and the model."""
    return {
        "photos": settings.photos,
        "list of photos": inventory.digest(),
        "threshold": settings.threshold,
        "batch_size": settings.batch_size,
        "model": facts["sha256"],
        "temperature": calibrated.temperature,
        "reading": preprocessing.reading,
        "mask": preprocessing.mask,
    }


def _write_predictions(draft: Draft, job: PredictionJob) -> None:
    """Write parts with the pending photos, then the tables of all photos."""
    connection.connect({"root": draft.uri, "predict.photos": job.settings.photos})
    uri, inventory = draft.uri, draft.inventory
    draft.sync()
    draft.retry_unreadable()
    predictions.write_unread(uri, inventory, draft.settings)
    draft.sync()
    if num_pending := inventory.count_pending():
        written = stream_predictions(inventory, job).map_batches(
            partial(predictions.write_batch, uri=uri, settings=draft.settings),
            batch_size=job.settings.part_rows,
            batch_format="pyarrow",
            num_cpus=streaming.TASK_CPUS,
        )
        with PhotoMeter("predict", num_pending) as meter:
            for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                assert isinstance(summary, pa.Table)
                rejected = summary["rejected"].drop_null().to_pylist()
                outcomes = ["rejected" if is_rejected else "accepted" for is_rejected in rejected]
                meter.add(outcomes, summary["reason"].drop_null().to_pylist())
        draft.sync()
    draft.check_lease()
    facts = {"inputs": inventory.count_inputs(), "reasons": inventory.reasons()}
    quarantine.check_quarantined(facts, job.settings.max_quarantined, "predict.max_quarantined")
    predictions.publish_predictions(uri, inventory)
    quarantine.log_counts("predict", facts)
