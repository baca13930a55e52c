"""Stream of new photos through the networks of a run, by Ray Data, with the preprocessing of its training photos.

keys → fetch and read (tasks) → classify (actors)
keys → fetch, read, decode (tasks) → detect, cut out, classify (actors with a GPU each), for a run on masked photos
keys → fetch, read, decode (tasks) → detect (actors) → cut out (tasks) → classify (actors), the same without GPUs

Without GPUs, Ray Data fuses the tasks before an actor into it, as both request the same resources. Queued blocks are
small: thousands of keys, or one batch of photos. Classifier batches are padded to one size, so that the result of a
photo does not depend on its batch, and a resumed job predicts the same as an uninterrupted one.
"""

import logging
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from carclass import storage
from carclass.cluster import actor_pools, resources
from carclass.cluster.actor_pools import ActorPool, plan_pool
from carclass.config.schema import IngestSettings, MaskSettings, PredictSettings
from carclass.data import dataset, publishing, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.inventory import Inventory
from carclass.data.quarantine import PhotoError
from carclass.data.thumbnail import thumbnail
from carclass.evaluation import calibration
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
CUT_ROWS = 4
"""Photos that a thread cuts out at a time."""
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
    use_gpu: bool | None = None  # False: no; None: if available


class ActorPools(NamedTuple):
    """Actor pools, and the options of map_batches for the tasks before them."""

    detectors: ActorPool | None  # None: photos are not masked, or each classifier has a detector on its GPU
    classifiers: ActorPool
    task_options: dict[str, Any]

    def describe(self) -> str:
        """Return the numbers of actors in words."""
        detectors = "" if self.detectors is None else f"{self.detectors.describe('detector')} and "
        return detectors + self.classifiers.describe("classifier")


def stream_predictions(inventory: Inventory, job: PredictionJob) -> ray.data.Dataset:
    """Stream rows of PREDICTED for the pending photos. Raise UserError if the cluster is too small."""
    pools = _plan_actor_pools(job, inventory.count_pending())
    log.info("predict: starting %s", pools.describe())
    photos = stream_photos(job.settings.photos, inventory, pools.task_options["batch_size"])
    read = photos.map_batches(partial(read_batch, crash_guard=CrashGuard(), settings=job.reading), **pools.task_options)
    return pools.classifiers.configure(_classify(read, job, pools))


def _plan_actor_pools(job: PredictionJob, num_photos: int) -> ActorPools:
    """Return the actor pools that fit the cluster; raise UserError if it is too small."""
    use_gpu = resources.decide_gpus(job.use_gpu, 1, "predict", resources.MASK)
    plan = partial(plan_pool, work=resources.MASK, use_gpu=use_gpu, task_cpus=streaming.TASK_CPUS)
    block_rows, detectors = job.settings.batch_size, None
    if job.mask is not None:
        block_rows = detect.detector_batch_size(job.mask, job.reading.max_side, use_gpu=use_gpu)
    num_batches = -(-num_photos // block_rows)
    classifiers = plan(None, num_batches)
    if job.mask is not None and not use_gpu:
        detectors = classifiers
        classifiers = plan(-(-detectors.smallest // DETECTORS_PER_CLASSIFIER), num_batches)
    actor_pools.check_cpus("jobs/predict.py", *([classifiers] if detectors is None else [detectors, classifiers]))
    task_options = {"batch_size": block_rows, "batch_format": "pyarrow", "num_cpus": streaming.TASK_CPUS}
    return ActorPools(detectors, classifiers, task_options)


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


def _classify(read: ray.data.Dataset, job: PredictionJob, pools: ActorPools) -> ray.data.Dataset:
    """Convert a stream of READ to PREDICTED: through the detectors and without backgrounds, if so trained."""
    use_gpu, tasks = pools.classifiers.use_gpu, pools.task_options
    crash_guard = CrashGuard()
    guards = {"crash_guard": crash_guard, "use_gpu": use_gpu}
    options = {**pools.classifiers.options(), "batch_format": "pyarrow", "batch_size": job.settings.batch_size}
    if job.mask is None:
        inputs = read.map_batches(partial(select_input, shown_share=job.shown_share), **tasks)
        return inputs.map_batches(ClassifyPhotos, fn_constructor_kwargs={"job": job, **guards}, **options)
    decoded = read.map_batches(partial(decode_valid, crash_guard=crash_guard), **tasks)
    if pools.detectors is None:
        options["batch_size"] = tasks["batch_size"]
        return decoded.map_batches(DetectAndClassifyPhotos, fn_constructor_kwargs={"job": job, **guards}, **options)
    detected = decoded.map_batches(
        DetectNewPhotos,
        fn_constructor_kwargs={"settings": job.mask, **guards},
        **{**tasks, **pools.detectors.options()},
    )
    cut = detected.map_batches(partial(cut_photos, settings=job.mask, shown_share=job.shown_share), **tasks)
    return cut.map_batches(ClassifyPhotos, fn_constructor_kwargs={"job": job, **guards}, **options)


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
        size = self.job.settings.batch_size
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        probabilities = np.concatenate([self.predictor.probabilities(batch, size) for batch in batches])
        calibrated = calibration.apply_temperature(probabilities, self.job.temperature)
        return prediction_columns(calibrated, self.job.classes, self.job.settings.threshold)


class DetectAndClassifyPhotos:
    """An actor with both networks of a run on masked photos on one GPU: what decode_valid returns → rows of PREDICTED.

    Two actors on halves of GPUs are packed, so that a GPU could get two detectors and another one none.
    """

    def __init__(self, job: PredictionJob, crash_guard: CrashGuard, *, use_gpu: bool) -> None:
        assert job.mask is not None
        self.detector = DetectNewPhotos(job.mask, crash_guard, use_gpu=use_gpu)
        self.classifier = ClassifyPhotos(job, crash_guard, use_gpu=use_gpu)
        self.cut = partial(cut_photos, settings=job.mask, shown_share=job.shown_share)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Detect in the whole batch; cut out in threads, while the GPU waits; classify."""
        detected = self.detector(batch)
        slices = [detected.slice(start, CUT_ROWS) for start in range(0, len(detected), CUT_ROWS)]
        groups = storage.in_parallel(lambda rows: list(self.cut(rows)), slices)
        yield self.classifier(pa.concat_tables([CLASSIFIER_INPUT.empty_table(), *chain.from_iterable(groups)]))


def _add_columns(row: dict[str, Any], result: dict[str, Any] | PhotoError) -> dict[str, Any]:
    """Return a row of CLASSIFIER_INPUT with the columns of its class, or those of a failed photo alone."""
    if isinstance(result, PhotoError):
        return {name: row[name] for name in ("key", "image_id", "fingerprint")} | result.columns()
    return row | result
