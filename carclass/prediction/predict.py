"""New photos and a run → predictions: Ray Data streams the photos to the run's network as training saw its own.

list keys → fetch and read (tasks) → where the run's dataset is masked: detect (actors), cut out (tasks)
→ classify (actors) → write parts (tasks)

Every function on the way is that of ingest, masking or evaluation. Without GPUs, what comes before an actor happens in
its process, where Ray Data puts work that asks for the same resources.

What waits between two steps is small: keys by the thousand, photos by the block. A photo is classified in batches of
one size, whoever else is in them, so that a job that was killed and run again predicts what an undisturbed one does.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from carclass import storage
from carclass.cluster import connection, resources
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import EvaluateSettings, IngestSettings, MaskSettings, PredictSettings
from carclass.data import dataset, publishing, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.inventory import Inventory
from carclass.data.photo import PhotoError
from carclass.errors import UserError
from carclass.evaluation.evaluate import predict_split, to_arrays
from carclass.ingestion import archive
from carclass.ingestion.listing import list_photos
from carclass.ingestion.reading import load_photos, to_row
from carclass.masking import detect
from carclass.masking import mask as masking
from carclass.masking.writer import cut_batch
from carclass.prediction import calibration, run_preprocessing
from carclass.prediction.calibration import Calibration
from carclass.prediction.predictions import (
    PREDICTION,
    Counts,
    begin_predictions,
    describe_predictions,
    predictions_uri,
    publish_predictions,
    read_counts,
    write_batch,
)
from carclass.runs.predictor import PredictPhotos
from carclass.runs.run import Run, find_run
from carclass.runs.saved_model import read_model

log = logging.getLogger(__name__)
KEY_ROWS = 4096
"""Keys in a block of the listing."""
DETECTORS_PER_CLASSIFIER = 4
"""On CPUs: finding the vehicle takes some ten times as long as the rest."""
READ = pa.schema([*dataset.ROW, *detect.FAILURE])
CUT = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),  # encoded, as the run's dataset would have it; null with a reason
        *(PREDICTION.field(name) for name in ("outcome", "vehicle_class", "score", "box", "reason", "detail")),
    ]
)


class PredictionResult(NamedTuple):
    """What a prediction came to."""

    uri: str
    counts: Counts
    calibration: Calibration


class PredictionJob(NamedTuple):
    """Everything that the way of a photo depends on."""

    settings: PredictSettings
    reading: IngestSettings
    mask: MaskSettings | None
    model_uri: str
    classes: list[str]
    temperature: float


def predict_photos(root: str, settings: PredictSettings) -> PredictionResult:
    """Writes `<run>/predictions/<name>/`, or finds it written.

    UserError when the run is missing or not finished, there are no photos, the name was used with other settings, or
    what the run's photos went through can't be repeated.
    """
    if settings.run is None:
        raise UserError("`predict.run` is missing: name the run to use, e.g. --run sample.")
    this = find_run(root, settings.run)
    _, facts = read_model(this.best(this.stages[-1]))
    with Inventory() as inventory:
        list_photos(settings.photos, inventory, "predict.photos")
        return _run(root, settings, this, facts, inventory)


def _run(
    root: str, settings: PredictSettings, this: Run, facts: dict[str, Any], inventory: Inventory
) -> PredictionResult:
    """The same, with the model's facts and all photos found."""
    storage.check_root(root)
    known = run_preprocessing.run_preprocessing(this)
    fitted = calibrate_run(this, facts, settings.batch_size)
    uri, identity = predictions_uri(this.uri, settings.name), _identity(settings, inventory, facts, known, fitted)
    if begin_predictions(uri, identity):
        log.info("predict: %s is finished, nothing to do", uri)
        return PredictionResult(uri, read_counts(uri), fitted)
    work = PredictionJob(
        settings,
        known.ingest(settings.photos),
        known.masking(root, settings.detector_weights),
        this.best(this.stages[-1]),
        facts["classes"],
        fitted.temperature,
    )
    connection.connect()
    publishing.sync_inventory(uri, inventory, identity)
    if inventory.count_todo():
        _write(uri, inventory, work, identity)
        publishing.sync_inventory(uri, inventory, identity)
    publish_predictions(uri, inventory)
    return PredictionResult(uri, read_counts(uri), fitted)


def calibrate_run(this: Run, facts: dict[str, Any], batch_size: int) -> Calibration:
    """The run's calibration, fitted on its val photos unless it's there; UserError when these are gone."""
    if (kept := calibration.read(this.uri, facts["sha256"])) is not None:
        return kept
    source = run_preprocessing.training_dataset(this)
    if not source.manifest["splits"]["val"]:
        raise UserError(f"dataset `{source.name}` has no val photos to calibrate run `{this.settings.name}` on.")
    connection.connect()
    settings = EvaluateSettings(run=this.settings.name, split="val", batch_size=batch_size)
    predictions = predict_split(source, settings, this.best(this.stages[-1]))
    fitted = calibration.fit(*to_arrays(predictions, facts["classes"]), facts["sha256"])
    calibration.write(this.uri, fitted)
    log.info("predict: temperature %.3f, fitted on %s val photos", fitted.temperature, f"{fitted.num_photos:,}")
    return fitted


def _identity(
    settings: PredictSettings,
    inventory: Inventory,
    facts: dict[str, Any],
    known: run_preprocessing.Preprocessing,
    fitted: Calibration,
) -> dict[str, Any]:
    """What decides the rows."""
    return {
        "photos": settings.photos,
        "list of photos": inventory.digest(),
        "threshold": settings.threshold,
        "batch_size": settings.batch_size,
        "model": facts["sha256"],
        "temperature": fitted.temperature,
        "reading": known.reading,
        "mask": known.mask,
    }


def _write(uri: str, inventory: Inventory, work: PredictionJob, identity: dict[str, Any]) -> None:
    """Streams the photos through the networks into parts."""
    plan = _place_actors(work)
    photos = stream_photos(work.settings.photos, inventory, plan.block_rows)
    sources = photos.map_batches(partial(read_batch, attempts=CrashGuard(), settings=work.reading), **plan.task)
    cut = sources.map_batches(to_cut, **plan.task) if work.mask is None else _masked(sources, work.mask, plan)
    classified = cut.map_batches(
        ClassifyPhotos,
        fn_constructor_kwargs={"work": work, "use_gpu": plan.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=plan.classifiers),
        **{**plan.actor, "batch_size": work.settings.batch_size},
    )
    write = partial(write_batch, uri=uri, settings=identity)
    written = classified.map_batches(write, **{**plan.task, "batch_size": work.settings.part_rows})
    with PhotoMeter("predict", inventory.count_todo()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            outcomes = ["rejected" if found else "accepted" for found in summary["rejected"].drop_null().to_pylist()]
            meter.add(outcomes, summary["reason"].drop_null().to_pylist())


class Placement(NamedTuple):
    """How the work is laid out on the cluster."""

    use_gpu: bool
    detectors: int
    classifiers: int
    block_rows: int  # photos that go together up to the classifier
    task: dict[str, Any]  # options of a task's map_batches
    actor: dict[str, Any]


def _place_actors(work: PredictionJob) -> Placement:
    """UserError when the cluster is too small."""
    use_gpu = resources.decide_gpus(None, 1, "predict", None)
    count, detects = max(1, resources.count_slots("GPU" if use_gpu else "CPU", 1)), work.mask is not None
    block_rows, classifiers, gpus = work.settings.batch_size, count, 1.0
    if work.mask is not None:
        block_rows = masking.GPU_BATCHES * work.mask.batch_size if use_gpu else masking.CPU_BATCH
        classifiers = count if use_gpu else -(-count // DETECTORS_PER_CLASSIFIER)
        gpus = 0.5  # a detector and a classifier for each: halves always fit, however they are dealt out
    actors = classifiers + count * detects
    resources.check_cpus(1 + (actors + 1) * streaming.TASK_CPUS, "jobs/predict.py")  # 1: Ray's own repartitioning
    task = {"batch_size": block_rows, "batch_format": "pyarrow", "num_cpus": streaming.TASK_CPUS}
    return Placement(use_gpu, count, classifiers, block_rows, task, {**task, "num_gpus": gpus if use_gpu else 0})


def stream_photos(photos: str, inventory: Inventory, block_rows: int) -> ray.data.Dataset:
    """Rows of archive.LOADED, without labels, in blocks of block_rows: of the photos that are to do."""
    if photos.endswith(archive.SUFFIXES):
        listing = pa.concat_tables(inventory.todo(KEY_ROWS, spread=False))
        read = partial(read_archive, wanted=ray.put(listing), block_rows=block_rows)
        # It waits for storage most of the time, and may not hold the CPU that repartitioning needs.
        return (
            ray.data.from_items([{"uri": photos}])
            .map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0)
            .repartition(target_num_rows_per_block=block_rows)
        )
    return (
        ray.data.from_arrow(list(inventory.todo(KEY_ROWS)))
        .repartition(target_num_rows_per_block=block_rows)
        .map_batches(
            partial(load_photos, photos=photos),
            batch_size=block_rows,
            batch_format="pyarrow",
            num_cpus=streaming.TASK_CPUS,
        )
    )


def read_archive(batch: pa.Table, wanted: ray.ObjectRef, block_rows: int) -> Iterator[pa.Table]:
    """Rows of archive.LOADED. batch: the archive's uri; wanted: inventory.SOURCE."""
    return archive.read(batch["uri"][0].as_py(), ray.get(wanted), block_rows)


def read_batch(batch: pa.Table, attempts: CrashGuard, settings: IngestSettings) -> pa.Table:
    """Rows of archive.LOADED → rows of READ: as ingest would store them, or with what is wrong with them."""
    sources = batch.to_pylist()
    read = attempts.run(
        "read", batch["key"].to_pylist(), lambda chosen: [_read_photo(sources[i], settings) for i in chosen]
    )
    rows = [
        _failed_row(source, item) if isinstance(item, PhotoError) else item
        for source, item in zip(sources, read, strict=True)
    ]
    return pa.Table.from_pylist(rows, READ)


def _read_photo(source: dict[str, Any], settings: IngestSettings) -> dict[str, Any] | PhotoError:
    try:
        return to_row(source, settings)
    except PhotoError as error:
        return error


def _failed_row(source: dict[str, Any], error: PhotoError) -> dict[str, Any]:
    image_id = None if source["data"] is None else storage.sha256(source["data"])
    trouble = {"reason": str(error.reason), "detail": error.detail, "attempts": error.attempts}
    return {"key": source["key"], "image_id": image_id, **trouble}


def _masked(sources: ray.data.Dataset, mask: MaskSettings, plan: Placement) -> ray.data.Dataset:
    """Rows of READ → rows of CUT, with the vehicle cut out."""
    attempts = CrashGuard()
    decoded = sources.map_batches(partial(decode_sound, attempts=attempts), **plan.task)
    detected = decoded.map_batches(
        detect.DetectPhotos,
        fn_constructor_kwargs={"settings": mask, "attempts": attempts, "use_gpu": plan.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=plan.detectors),
        **plan.actor,
    )
    return detected.map_batches(partial(cut_photos, settings=mask), **plan.task)


def decode_sound(batch: pa.Table, attempts: CrashGuard) -> pa.Table:
    """Rows of READ → rows of masking's DECODED; those with a reason have no pixels."""
    fine = pc.is_null(batch["reason"])
    decoded = detect.decode_rows(batch.filter(fine).select(dataset.ROW.names), attempts)
    troubled = batch.filter(pc.invert(fine))
    return pa.concat_tables([decoded, troubled], promote_options="default")


def cut_photos(batch: pa.Table, settings: MaskSettings) -> pa.Table:
    """Rows of masking's DETECTED → rows of CUT."""
    rows, rejected = cut_batch(batch, settings)
    return pa.Table.from_pylist([*rows, *rejected], CUT)


def to_cut(batch: pa.Table) -> pa.Table:
    """Rows of READ → rows of CUT, where nothing is masked."""
    return pa.Table.from_pylist(batch.to_pylist(), CUT)


class ClassifyPhotos:
    """A classifier process: rows of CUT → rows of table.PREDICTION."""

    def __init__(self, work: PredictionJob, *, use_gpu: bool) -> None:
        self.work = work
        self.predict = PredictPhotos(work.model_uri, use_gpu=use_gpu)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop(["image"]).to_pylist()
        sound = batch.filter(pc.is_null(batch["reason"]))["image"].to_pylist()
        if sound:
            found = self.predict.probabilities(sound, self.work.settings.batch_size)
            calibrated = calibration.apply(found, self.work.temperature)
            columns = iter(describe_predictions(calibrated, self.work.classes, self.work.settings.threshold))
            rows = [row if row["reason"] else row | next(columns) for row in rows]
        return pa.Table.from_pylist(rows, PREDICTION)
