"""Prediction job: new photos and a finished run → calibrated predictions in one table."""

import logging
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import PredictSettings
from carclass.data import quarantine, streaming
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.data.lease import hold_lease
from carclass.errors import UserError
from carclass.evaluation.calibrate import calibrate_run
from carclass.ingestion.archive import split_folder
from carclass.ingestion.listing import list_photos
from carclass.prediction import predictions
from carclass.prediction.classify import PredictionJob, stream_predictions
from carclass.prediction.detector_weights import mask_settings
from carclass.runs.calibration_record import Calibration
from carclass.runs.preprocessing_record import Preprocessing, load_preprocessing, store_preprocessing
from carclass.runs.run import find_run
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
    model_uri = run.model_uri(run.select_stage(settings.stage))
    _, facts = read_model(model_uri)
    storage.check_root(root)
    connection.check_cluster()
    uri = predictions.predictions_uri(run.uri, settings.name)
    with hold_lease(uri, "predict") as lease, Inventory() as inventory:
        list_photos(settings.photos, inventory, "predict.photos", root=root)
        preprocessing = load_preprocessing(run)
        store_preprocessing(run, preprocessing)
        calibrated = calibrate_run(run, model_uri, facts, settings.batch_size)
        identity = _identity(settings, inventory, facts, preprocessing, calibrated)
        if predictions.begin_predictions(uri, identity) and not predictions.read_counts(uri).reasons.get("unreadable"):
            log.info("predict: %s is finished, nothing to do", uri)
        else:
            reading = preprocessing.ingest_settings(settings.photos)
            mask = mask_settings(preprocessing, root, settings.detector_weights)
            job = PredictionJob(settings, reading, mask, model_uri, facts["classes"], calibrated.temperature)
            _write_predictions(Draft(uri, identity, inventory, lease=lease), job)
    return PredictionResult(uri, predictions.read_counts(uri), calibrated)


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
    connection.connect({"root": draft.uri, "predict.photos": split_folder(job.settings.photos)[0]})
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
