"""Stream of new photos through the networks of a run, by Ray Data, with the preprocessing of its training photos.

keys → fetch and read (tasks) → for a run on masked photos: detect (actors), cut out (tasks) → classify (actors)

Without GPUs, Ray Data fuses the tasks before an actor into it, as both request the same resources. Queued blocks are
small: thousands of keys, or one batch of photos. Classifier batches are padded to one size, so that the result of a
photo does not depend on its batch, and a resumed job predicts the same as an uninterrupted one.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from carclass.cluster import resources
from carclass.config.schema import IngestSettings, MaskSettings, PredictSettings
from carclass.data import dataset, publishing, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.inventory import Inventory
from carclass.data.quarantine import PhotoError
from carclass.data.thumbnail import thumbnail
from carclass.evaluation import calibration
from carclass.formatting import count_text
from carclass.ingestion import archive
from carclass.ingestion.reading import read_groups
from carclass.masking import detect
from carclass.masking.writer import FAILURE, cut_rows
from carclass.prediction.collect import THUMBNAIL_SIDE, is_shown
from carclass.prediction.predictions import PREDICTED, PREDICTION, prediction_columns
from carclass.runs.predictor import Predictor

log = logging.getLogger(__name__)
KEY_ROWS = 4096
"""Keys per block of the listing."""
DETECTORS_PER_CLASSIFIER = 4
"""On CPUs, where detection takes about ten times as long as everything else."""
READ = pa.schema([*dataset.ROW, *FAILURE, publishing.FINGERPRINT])
CLASSIFIER_INPUT = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),  # encoded as in the run's dataset; null if there is a reason
        *(PREDICTION.field(name) for name in ("outcome", "vehicle_class", "score", "box", "reason", "detail")),
        publishing.FINGERPRINT,
        ("photo", pa.binary()),  # thumbnails, see predictions.THUMBNAIL
        ("cutout", pa.binary()),
    ]
)


class PredictionJob(NamedTuple):
    """Settings and model that determine the predictions."""

    settings: PredictSettings
    reading: IngestSettings
    mask: MaskSettings | None  # None: photos are not masked
    model_uri: str
    classes: list[str]
    temperature: float
    shown_share: float  # of the photos, which get thumbnails


class ActorPools(NamedTuple):
    """Sizes of the actor pools, and the options of map_batches."""

    use_gpu: bool
    num_detectors: int
    num_classifiers: int
    block_rows: int  # photos per batch before the classifier
    task_options: dict[str, Any]
    actor_options: dict[str, Any]


def stream_predictions(inventory: Inventory, job: PredictionJob) -> ray.data.Dataset:
    """Stream rows of PREDICTED for the pending photos. Raise UserError if the cluster is too small."""
    pools = _plan_actor_pools(job)
    detectors = f"{count_text(pools.num_detectors, 'detector')} and " if pools.num_detectors else ""
    log.info("predict: starting %s%s", detectors, count_text(pools.num_classifiers, "classifier"))
    photos = stream_photos(job.settings.photos, inventory, pools.block_rows)
    read = photos.map_batches(partial(read_batch, crash_guard=CrashGuard(), settings=job.reading), **pools.task_options)
    return _to_inputs(read, job, pools).map_batches(
        ClassifyPhotos,
        fn_constructor_kwargs={"job": job, "crash_guard": CrashGuard(), "use_gpu": pools.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=pools.num_classifiers),
        **{**pools.actor_options, "batch_size": job.settings.batch_size},
    )


def _plan_actor_pools(job: PredictionJob) -> ActorPools:
    """Return the actor pools that fit the cluster; raise UserError if it is too small."""
    use_gpu = resources.decide_gpus(None, 1, "predict", None)
    slots = max(1, resources.count_slots("GPU" if use_gpu else "CPU", 1))
    block_rows, num_detectors, num_classifiers, gpus = job.settings.batch_size, 0, slots, 1.0
    if job.mask is not None:
        block_rows, num_detectors = detect.detector_batch_size(job.mask, job.reading.max_side, use_gpu=use_gpu), slots
        num_classifiers = slots if use_gpu else -(-slots // DETECTORS_PER_CLASSIFIER)
        gpus = 0.5  # a detector and a classifier per GPU; halves fit in any order of placement
    num_actors = num_classifiers + num_detectors
    resources.check_cpus(1 + (num_actors + 1) * streaming.TASK_CPUS, "jobs/predict.py")  # 1: Ray's own repartitioning
    task_options = {"batch_size": block_rows, "batch_format": "pyarrow", "num_cpus": streaming.TASK_CPUS}
    actor_options = {**task_options, "num_gpus": gpus if use_gpu else 0}
    return ActorPools(use_gpu, num_detectors, num_classifiers, block_rows, task_options, actor_options)


def stream_photos(photos: str, inventory: Inventory, block_rows: int) -> ray.data.Dataset:
    """Stream the pending photos in blocks of block_rows, with null labels: rows of INPUT, or LOADED from an archive."""
    if archive.is_archive(photos):
        listing = pa.concat_tables(inventory.pending(KEY_ROWS, hash_order=False))
        read = partial(read_archive, requested=ray.put(listing), block_rows=block_rows)
        # num_cpus=0: it mostly waits for storage and must not hold the CPU that repartitioning needs.
        return (
            ray.data.from_items([{"uri": photos}])
            .map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0)
            .repartition(target_num_rows_per_block=block_rows)
        )
    keys = ray.data.from_arrow(list(inventory.pending(KEY_ROWS)))
    return keys.repartition(target_num_rows_per_block=block_rows)


def read_archive(batch: pa.Table, requested: ray.ObjectRef, block_rows: int) -> Iterator[pa.Table]:
    """Yield rows of archive.LOADED. batch: the archive's URI; requested: rows of inventory.INPUT."""
    return archive.read_photos(batch["uri"][0].as_py(), ray.get(requested), block_rows, "predict.photos")


def read_batch(batch: pa.Table, crash_guard: CrashGuard, settings: IngestSettings) -> Iterator[pa.Table]:
    """Convert rows of INPUT or LOADED to rows of READ, as ingestion would store them, or with the reason of failure."""
    for rows in read_groups(batch, settings, crash_guard.run):
        yield pa.Table.from_pylist(rows, READ)


def _to_inputs(read: ray.data.Dataset, job: PredictionJob, pools: ActorPools) -> ray.data.Dataset:
    """Convert a stream of READ to CLASSIFIER_INPUT: through the detectors and without backgrounds, if so trained."""
    if job.mask is None:
        return read.map_batches(partial(select_input, shown_share=job.shown_share), **pools.task_options)
    crash_guard = CrashGuard()
    decoded = read.map_batches(partial(decode_valid, crash_guard=crash_guard), **pools.task_options)
    detected = decoded.map_batches(
        DetectNewPhotos,
        fn_constructor_kwargs={"settings": job.mask, "crash_guard": crash_guard, "use_gpu": pools.use_gpu},
        compute=ray.data.ActorPoolStrategy(size=pools.num_detectors),
        **pools.actor_options,
    )
    cut = partial(cut_photos, settings=job.mask, shown_share=job.shown_share)
    return detected.map_batches(cut, **pools.task_options)


def decode_valid(batch: pa.Table, crash_guard: CrashGuard) -> pa.Table:
    """Convert rows of READ to rows of detect.DECODED with fingerprints; those with a reason get no pixels."""
    valid = pc.is_null(batch["reason"])
    readable, failed = batch.filter(valid), batch.filter(pc.invert(valid))
    decoded = detect.decode_rows(readable.select(dataset.ROW.names), crash_guard)
    decoded = decoded.append_column(publishing.FINGERPRINT, readable["fingerprint"])
    return pa.concat_tables([decoded, failed], promote_options="default")


class DetectNewPhotos(detect.DetectPhotos):
    """A detector actor: rows of DECODED → rows of DETECTED, both with fingerprints."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return super().__call__(batch).append_column(publishing.FINGERPRINT, batch["fingerprint"])


def cut_photos(batch: pa.Table, settings: MaskSettings, shown_share: float) -> Iterator[pa.Table]:
    """Convert rows of writer.DETECTED with fingerprints to rows of CLASSIFIER_INPUT."""
    rows = zip(cut_rows(batch, settings), batch["fingerprint"].to_pylist(), batch["image"], strict=True)
    described = (
        row | {"fingerprint": fingerprint} | _thumbnails(row, image.as_py(), shown_share)
        for row, fingerprint, image in rows
    )
    for group in publishing.split_by_bytes(described):
        yield pa.Table.from_pylist(group, CLASSIFIER_INPUT)


def select_input(batch: pa.Table, shown_share: float) -> pa.Table:
    """Convert rows of READ to rows of CLASSIFIER_INPUT without masking."""
    rows = (row | _thumbnails(row, row["image"], shown_share) for row in batch.to_pylist())
    return pa.Table.from_pylist(list(rows), CLASSIFIER_INPUT)


def _thumbnails(row: dict[str, Any], image: bytes, shown_share: float) -> dict[str, bytes | None]:
    """Return the thumbnails of a photo and, if it differs, of the row's image, for a share of the photos."""
    if row["reason"] is not None or not is_shown(row["key"], shown_share):
        return {}
    is_whole = row["image"] == image
    return {
        "photo": thumbnail(image, THUMBNAIL_SIDE),
        "cutout": None if is_whole else thumbnail(row["image"], THUMBNAIL_SIDE),
    }


class ClassifyPhotos:
    """A classifier actor: rows of CLASSIFIER_INPUT → rows of PREDICTED."""

    def __init__(self, job: PredictionJob, crash_guard: CrashGuard, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        self.job, self.crash_guard = job, crash_guard
        self.predictor = Predictor(job.model_uri, use_gpu=use_gpu)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop(["image"]).to_pylist()
        valid = batch.filter(pc.is_null(batch["reason"])).select(["key", "image"]).to_pylist()
        classified = self.crash_guard.run(
            "classify",
            [row["key"] for row in valid],
            lambda indices: self._classify([valid[i]["image"] for i in indices]),
        )
        columns = iter(list(classified))
        rows = [row if row["reason"] else _add_columns(row, next(columns)) for row in rows]
        return pa.Table.from_pylist(rows, PREDICTED)

    def _classify(self, images: list[bytes]) -> list[dict[str, Any]]:
        if not images:
            return []
        probabilities = self.predictor.probabilities(images, self.job.settings.batch_size)
        calibrated = calibration.apply_temperature(probabilities, self.job.temperature)
        return prediction_columns(calibrated, self.job.classes, self.job.settings.threshold)


def _add_columns(row: dict[str, Any], result: dict[str, Any] | PhotoError) -> dict[str, Any]:
    """Return a row of CLASSIFIER_INPUT with the columns of its class, or those of a failed photo alone."""
    if isinstance(result, PhotoError):
        return {name: row[name] for name in ("key", "image_id", "fingerprint")} | result.columns()
    return row | result
