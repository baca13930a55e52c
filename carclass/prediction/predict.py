"""Prediction job: new photos and a finished run → calibrated predictions in one table and on a page."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import PredictSettings
from carclass.data import changes, publishing, quarantine, streaming
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.data.lease import hold_lease
from carclass.data.root_check import check_root
from carclass.errors import UserError
from carclass.evaluation.calibrate import calibrate_run
from carclass.ingestion.archive import is_archive, split_folder
from carclass.ingestion.listing import list_photos, spelled_once
from carclass.ingestion.reading import read_image_ids
from carclass.prediction import collect, predictions
from carclass.prediction.classify import PredictionJob, stream_predictions
from carclass.prediction.detector_weights import mask_settings
from carclass.prediction.few_photos import can_predict_here, predict_here
from carclass.prediction.report import render
from carclass.runs.calibration_record import Calibration
from carclass.runs.preprocessing_record import Preprocessing, load_preprocessing, store_preprocessing
from carclass.runs.run import Run, find_run
from carclass.runs.saved_model import read_model

log = logging.getLogger(__name__)


class PredictionResult(NamedTuple):
    """Location, counts and calibration of finished predictions."""

    uri: str
    counts: predictions.Counts
    calibration: Calibration


def predict_photos(root: str, settings: PredictSettings) -> PredictionResult:
    """Write `<run>/predictions/<name>/`; do nothing if it is finished, and predict new photos alone if there are any.

    Another threshold is applied to the stored probabilities.

    Raise UserError if the run is missing or unfinished, there are no photos, the name was used with other settings, or
    the preprocessing of the run's photos cannot be repeated.
    """
    if settings.run is None:
        raise UserError("`predict.run` is missing: name the run to use, e.g. --run first.")
    run = find_run(root, settings.run)
    return predict_by_run(run, run.select_stage(settings.stage), settings)


def predict_by_run(run: Run, stage: str, settings: PredictSettings) -> PredictionResult:
    """Write predictions by a stage's model of a run, as `predict_photos` does."""
    root, model_uri = run.root, run.model_uri(stage)
    _, facts = read_model(model_uri)
    check_root(root)
    connection.check_cluster()
    uri = predictions.predictions_uri(run.uri, settings.name)
    with hold_lease(uri, "predict") as lease, Inventory() as inventory:
        list_photos(settings.photos, inventory, "predict.photos", root=root)
        preprocessing = load_preprocessing(run)
        store_preprocessing(run, preprocessing)
        calibrated = calibrate_run(run, model_uri, facts, settings.batch_size)
        identity = predictions.begin_predictions(uri, _identity(settings, facts, preprocessing, calibrated))
        if predictions.is_finished(uri, identity, inventory.digest(), settings.threshold):
            log.info("predict: %s is finished, nothing to do", uri)
        else:
            reading = preprocessing.ingest_settings(settings.photos)
            mask = mask_settings(preprocessing, root, settings.detector_weights)
            share = collect.shown_share(inventory.count_inputs())
            job = PredictionJob(
                settings,
                reading,
                mask,
                model_uri,
                facts["classes"],
                calibrated.temperature,
                share,
                use_gpu=False if run.settings.use_gpu is False else None,
            )
            _write_predictions(Draft(uri, identity, inventory, lease=lease), job, run)
    return PredictionResult(uri, predictions.read_counts(uri), calibrated)


def _identity(
    settings: PredictSettings, facts: dict[str, Any], preprocessing: Preprocessing, calibrated: Calibration
) -> dict[str, Any]:
    """Return all settings that determine the row of a photo, with the hash of the model."""
    return {
        "photos": spelled_once(settings.photos),
        "threshold": settings.threshold,
        "batch_size": settings.batch_size,
        "model": facts["sha256"],
        "temperature": calibrated.temperature,
        "reading": preprocessing.reading,
        "mask": preprocessing.mask,
    }


def _write_predictions(draft: Draft, job: PredictionJob, run: Run) -> None:
    """Write parts with the photos that are new or have changed, then the tables and the page of all photos."""
    uri, inventory = draft.uri, draft.inventory
    listing = inventory.digest()
    _remove_outdated(draft, job.settings.photos, listing)
    predictions.write_unread(uri, inventory, draft.settings)
    draft.sync()
    if inventory.count_pending():
        _predict_pending(draft, job)
        draft.sync()
    else:
        log.info("predict: no new photos; threshold %g is applied to stored probabilities", job.settings.threshold)
    draft.check_lease()
    num_gone = sum(change.number for change in changes.find_changes(inventory) if change.kind == "removed")
    if num_gone:
        log.info("predict: %s of the predicted photos are gone since; their rows stay", f"{num_gone:,}")
    facts = {"inputs": inventory.count_inputs() + num_gone, "reasons": inventory.reasons()}
    quarantine.check_quarantined(facts, job.settings.max_quarantined, "predict.max_quarantined")
    render_page = partial(_render_page, uri, job, run)
    predictions.publish_predictions(uri, inventory, listing, job.settings.threshold, render_page)
    counts = predictions.read_counts(uri)
    quarantine.log_counts("predict", {"inputs": counts.files, "reasons": counts.reasons})
    if counts.others.number:
        log.info("predict: junk, left out: %s", counts.others.text)


def _remove_outdated(draft: Draft, photos: str, listing: str) -> None:
    """Remove the rows of photos that storage could not deliver, or whose content has changed since.

    Rows of photos that are gone are kept: they may have been moved away after their prediction. listing: digest of the
    inputs.
    """
    draft.sync()
    is_update = storage.exists(storage.join(draft.uri, predictions.TABLE))
    if not is_update:
        draft.log_resumed()
    draft.retry_unreadable()
    if draft.settings.get(predictions.LISTING) == listing:  # format 1, whose parts have no fingerprints
        return
    if not is_archive(photos):
        read = partial(read_image_ids, photos=photos)
        changes.recognize_unchanged(draft.inventory, lambda inputs: chain.from_iterable(map(read, inputs)))
    if is_update and (found := changes.find_changes(draft.inventory)):
        log.info("predict: since the last run: %s", changes.changes_text(found))
    draft.correct(changes.replaced_rows(draft.inventory))


def _predict_pending(draft: Draft, job: PredictionJob) -> None:
    """Write parts with the pending photos."""
    write = partial(predictions.write_batch, uri=draft.uri, settings=draft.settings)
    is_small = can_predict_here(draft, job)
    written = map(write, predict_here(draft, job)) if is_small else _stream_written(draft, job, write)
    with PhotoMeter("predict", draft.inventory.count_pending()) as meter:
        for summary in written:
            draft.record(publishing.from_records(summary))
            rejected = summary["rejected"].drop_null().to_pylist()
            outcomes = ["rejected" if is_rejected else "accepted" for is_rejected in rejected]
            meter.add(outcomes, summary["reason"].drop_null().to_pylist())


def _stream_written(draft: Draft, job: PredictionJob, write: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Predict and write the pending photos on a cluster, and yield what `write` returns for each part."""
    connection.connect({"root": draft.uri, "predict.photos": split_folder(job.settings.photos)[0]})
    written = stream_predictions(draft.inventory, job).map_batches(
        write, batch_size=job.settings.part_rows, batch_format="pyarrow", num_cpus=streaming.TASK_CPUS
    )
    for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert isinstance(summary, pa.Table)
        yield summary


def _render_page(uri: str, job: PredictionJob, run: Run, table: Path) -> str:
    """Return the page of the predictions in a local table."""
    settings = job.settings
    facts = [
        ("Run", run.settings.name),
        ("Model", f"{run.settings.model.architecture}, {run.settings.model.image_size} px"),
        ("Photos", settings.photos),
        ("Masking", "none" if job.mask is None else job.mask.cutout.mode),
        ("Threshold", f"{settings.threshold:g}"),
        ("Temperature", f"{job.temperature:.3f}"),
    ]
    has_report = storage.exists(storage.join(run.uri, "report", "report.html"))
    link = "../../report/report.html#threshold" if has_report else None
    title = f"Run {run.settings.name}: predictions"
    if settings.name != PredictSettings.model_fields["name"].default:
        title += f" {settings.name}"
    return render(
        collect.collect_report(
            uri,
            table,
            title,
            facts,
            threshold=settings.threshold,
            is_calibrated=job.temperature != 1,
            report_link=link,
        )
    )
