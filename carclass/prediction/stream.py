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

from carclass import archive, capacity, cluster, config, dataset, ingest, lineage, storage
from carclass.attempts import Attempts
from carclass.errors import UserError
from carclass.evaluation import evaluate
from carclass.inventory import Inventory
from carclass.masking import stream as masking
from carclass.masking.write import cut_batch
from carclass.photo import PhotoError
from carclass.prediction import calibration, preprocessing, table
from carclass.telemetry import Meter
from carclass.training import checkpoint

log = logging.getLogger(__name__)
KEY_ROWS = 4096
"""Keys in a block of the listing."""
DETECTORS_PER_CLASSIFIER = 4
"""On CPUs: finding the vehicle takes some ten times as long as the rest."""
READ = pa.schema([*dataset.ROW, *masking.TROUBLE])
CUT = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),  # encoded, as the run's dataset would have it; null with a reason
        *(table.PREDICTION.field(name) for name in ("outcome", "vehicle_class", "score", "box", "reason", "detail")),
    ]
)


class Outcome(NamedTuple):
    """What a prediction came to."""

    uri: str
    counts: table.Counts
    calibration: calibration.Calibration


class Work(NamedTuple):
    """Everything that the way of a photo depends on."""

    settings: config.Predict
    reading: config.Ingest
    mask: config.Mask | None
    model_uri: str
    classes: list[str]
    temperature: float


def run(root: str, settings: config.Predict) -> Outcome:
    """Writes `<run>/predictions/<name>/`, or finds it written.

    UserError when the run is missing or not finished, there are no photos, the name was used with other settings, or
    what the run's photos went through can't be repeated.
    """
    if settings.run is None:
        raise UserError("`predict.run` is missing: name the run to use, e.g. --run sample.")
    this = lineage.load(root, settings.run)
    _, facts = checkpoint.read_model(this.best(this.stages[-1]))
    with Inventory() as inventory:
        ingest.list_photos(settings.photos, inventory, "predict.photos")
        return _run(root, settings, this, facts, inventory)


def _run(
    root: str, settings: config.Predict, this: lineage.Run, facts: dict[str, Any], inventory: Inventory
) -> Outcome:
    """The same, with the model's facts and all photos found."""
    storage.check_root(root)
    known = preprocessing.of_run(this)
    fitted = calibrate(this, facts, settings.batch_size)
    uri, identity = table.place(this.uri, settings.name), _identity(settings, inventory, facts, known, fitted)
    if table.begin(uri, identity):
        log.info("predict: %s is finished, nothing to do", uri)
        return Outcome(uri, table.counts(uri), fitted)
    work = Work(
        settings,
        known.ingest(settings.photos),
        known.masking(root, settings.detector_weights),
        this.best(this.stages[-1]),
        facts["classes"],
        fitted.temperature,
    )
    cluster.connect()
    dataset.take_stock(uri, inventory, identity)
    if inventory.count_todo():
        _write(uri, inventory, work, identity)
        dataset.take_stock(uri, inventory, identity)
    table.publish(uri, inventory)
    return Outcome(uri, table.counts(uri), fitted)


def calibrate(this: lineage.Run, facts: dict[str, Any], batch_size: int) -> calibration.Calibration:
    """The run's calibration, fitted on its val photos unless it's there; UserError when these are gone."""
    if (kept := calibration.read(this.uri, facts["sha256"])) is not None:
        return kept
    source = preprocessing.dataset_of(this)
    if not source.manifest["splits"]["val"]:
        raise UserError(f"dataset `{source.name}` has no val photos to calibrate run `{this.settings.name}` on.")
    cluster.connect()
    settings = config.Evaluate(run=this.settings.name, split="val", batch_size=batch_size)
    predictions = evaluate.predict(source, settings, this.best(this.stages[-1]))
    fitted = calibration.fit(*evaluate.to_arrays(predictions, facts["classes"]), facts["sha256"])
    calibration.write(this.uri, fitted)
    log.info("predict: temperature %.3f, fitted on %s val photos", fitted.temperature, f"{fitted.num_photos:,}")
    return fitted


def _identity(
    settings: config.Predict,
    inventory: Inventory,
    facts: dict[str, Any],
    known: preprocessing.Preprocessing,
    fitted: calibration.Calibration,
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


def _write(uri: str, inventory: Inventory, work: Work, identity: dict[str, Any]) -> None:
    """Streams the photos through the networks into parts."""
    plan = _plan(work)
    photos = load(work.settings.photos, inventory, plan.block_rows)
    sources = photos.map_batches(partial(read_batch, attempts=Attempts(), settings=work.reading), **plan.task)
    cut = sources.map_batches(to_cut, **plan.task) if work.mask is None else _masked(sources, work.mask, plan)
    classified = cut.map_batches(
        ClassifyPhotos,
        fn_constructor_kwargs={"work": work, "use_gpu": plan.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=plan.classifiers),
        **{**plan.actor, "batch_size": work.settings.batch_size},
    )
    write = partial(table.write_batch, uri=uri, settings=identity)
    written = classified.map_batches(write, **{**plan.task, "batch_size": work.settings.part_rows})
    with Meter("predict", inventory.count_todo()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            outcomes = ["rejected" if found else "accepted" for found in summary["rejected"].drop_null().to_pylist()]
            meter.add(outcomes, summary["reason"].drop_null().to_pylist())


class Plan(NamedTuple):
    """How the work is laid out on the cluster."""

    use_gpu: bool
    detectors: int
    classifiers: int
    block_rows: int  # photos that go together up to the classifier
    task: dict[str, Any]  # options of a task's map_batches
    actor: dict[str, Any]


def _plan(work: Work) -> Plan:
    """UserError when the cluster is too small."""
    use_gpu = capacity.gpus(None, 1, "predict", None)
    count, detects = max(1, capacity.room("GPU" if use_gpu else "CPU", 1)), work.mask is not None
    block_rows, classifiers, gpus = work.settings.batch_size, count, 1.0
    if work.mask is not None:
        block_rows = masking.GPU_BATCHES * work.mask.batch_size if use_gpu else masking.CPU_BATCH
        classifiers = count if use_gpu else -(-count // DETECTORS_PER_CLASSIFIER)
        gpus = 0.5  # a detector and a classifier for each: halves always fit, however they are dealt out
    actors = classifiers + count * detects
    capacity.check_cpus(1 + (actors + 1) * cluster.TASK_CPUS, "jobs/predict.py")  # 1: Ray's own repartitioning
    task = {"batch_size": block_rows, "batch_format": "pyarrow", "num_cpus": cluster.TASK_CPUS}
    return Plan(use_gpu, count, classifiers, block_rows, task, {**task, "num_gpus": gpus if use_gpu else 0})


def load(photos: str, inventory: Inventory, block_rows: int) -> ray.data.Dataset:
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
            partial(ingest.load_batch, photos=photos),
            batch_size=block_rows,
            batch_format="pyarrow",
            num_cpus=cluster.TASK_CPUS,
        )
    )


def read_archive(batch: pa.Table, wanted: ray.ObjectRef, block_rows: int) -> Iterator[pa.Table]:
    """Rows of archive.LOADED. batch: the archive's uri; wanted: inventory.SOURCE."""
    return archive.read(batch["uri"][0].as_py(), ray.get(wanted), block_rows)


def read_batch(batch: pa.Table, attempts: Attempts, settings: config.Ingest) -> pa.Table:
    """Rows of archive.LOADED → rows of READ: as ingest would store them, or with what is wrong with them."""
    sources = batch.to_pylist()
    read = attempts.run("read", batch["key"].to_pylist(), lambda chosen: [_read(sources[i], settings) for i in chosen])
    rows = [
        _troubled(source, item) if isinstance(item, PhotoError) else item
        for source, item in zip(sources, read, strict=True)
    ]
    return pa.Table.from_pylist(rows, READ)


def _read(source: dict[str, Any], settings: config.Ingest) -> dict[str, Any] | PhotoError:
    try:
        return ingest.to_row(source, settings)
    except PhotoError as error:
        return error


def _troubled(source: dict[str, Any], error: PhotoError) -> dict[str, Any]:
    image_id = None if source["data"] is None else storage.sha256(source["data"])
    trouble = {"reason": str(error.reason), "detail": error.detail, "attempts": error.attempts}
    return {"key": source["key"], "image_id": image_id, **trouble}


def _masked(sources: ray.data.Dataset, mask: config.Mask, plan: Plan) -> ray.data.Dataset:
    """Rows of READ → rows of CUT, with the vehicle cut out."""
    attempts = Attempts()
    decoded = sources.map_batches(partial(decode_sound, attempts=attempts), **plan.task)
    detected = decoded.map_batches(
        masking.DetectPhotos,
        fn_constructor_kwargs={"settings": mask, "attempts": attempts, "use_gpu": plan.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=plan.detectors),
        **plan.actor,
    )
    return detected.map_batches(partial(cut_photos, settings=mask), **plan.task)


def decode_sound(batch: pa.Table, attempts: Attempts) -> pa.Table:
    """Rows of READ → rows of masking's DECODED; those with a reason have no pixels."""
    fine = pc.is_null(batch["reason"])
    decoded = masking.decode_rows(batch.filter(fine).select(dataset.ROW.names), attempts)
    troubled = batch.filter(pc.invert(fine))
    return pa.concat_tables([decoded, troubled], promote_options="default")


def cut_photos(batch: pa.Table, settings: config.Mask) -> pa.Table:
    """Rows of masking's DETECTED → rows of CUT."""
    rows, rejected = cut_batch(batch, settings)
    return pa.Table.from_pylist([*rows, *rejected], CUT)


def to_cut(batch: pa.Table) -> pa.Table:
    """Rows of READ → rows of CUT, where nothing is masked."""
    return pa.Table.from_pylist(batch.to_pylist(), CUT)


class ClassifyPhotos:
    """A classifier process: rows of CUT → rows of table.PREDICTION."""

    def __init__(self, work: Work, *, use_gpu: bool) -> None:
        self.work = work
        self.predict = evaluate.PredictPhotos(work.model_uri, use_gpu=use_gpu)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop(["image"]).to_pylist()
        sound = batch.filter(pc.is_null(batch["reason"]))["image"].to_pylist()
        if sound:
            found = self.predict.probabilities(sound, self.work.settings.batch_size)
            calibrated = calibration.apply(found, self.work.temperature)
            columns = iter(table.describe(calibrated, self.work.classes, self.work.settings.threshold))
            rows = [row if row["reason"] else row | next(columns) for row in rows]
        return pa.Table.from_pylist(rows, table.PREDICTION)
