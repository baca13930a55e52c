"""A dataset → a dataset without backgrounds: Ray Data streams the photos through a pool of detectors.

places of rows → fetch and decode (tasks) → detect (actors) → cut, encode and write parts (tasks)

Without GPUs, fetching and decoding happen in the actors, where Ray Data puts work that asks for the same resources.

A photo is worked on alone or beside others with the same result, so a job that was killed and run again makes the
rows that an undisturbed one makes.
"""

import logging
from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from carclass import storage
from carclass.cluster import connection, resources
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import MaskSettings
from carclass.data import dataset, publishing, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.masking import collect, networks, quality
from carclass.masking.detect import DetectPhotos, decode_batch
from carclass.masking.detector import Detector
from carclass.masking.writer import write_batch

log = logging.getLogger(__name__)
CPU_BATCH, GPU_BATCHES = 4, 8
"""Photos an actor takes at a time: a second or two of work on a CPU; on a GPU so many forward passes that photos of
the same shape meet."""
MAX_PASSES = 3
"""A second pass over the photos is needed only when parts were written twice, which a lost node may cause."""


def mask_dataset(root: str, settings: MaskSettings) -> dataset.Dataset:
    """Publishes `<root>/datasets/<dataset>`, or finds it published. UserError for wrong settings or weights."""
    source = dataset.load_dataset(root, settings.source)
    settings = _prepare(root, settings)
    identity = _identity(settings, source)
    if (found := dataset.find_same_dataset(root, settings.dataset, identity)) is not None:
        log.info("mask: dataset %s is published, nothing to do", settings.dataset)
        return found
    draft = _mask(dataset.dataset_uri(root, settings.dataset), source, settings, identity, settings.limit)
    collect.write_report(draft, source, quality.truth(root, settings))
    return publishing.publish_manifest(draft)


def preview_masks(root: str, settings: MaskSettings) -> str:
    """Masks `preview` photos and keeps nothing but their report and contact sheet; returns their place."""
    source = dataset.load_dataset(root, settings.source)
    settings = _prepare(root, settings)
    uri = storage.join(root, "previews", settings.dataset)
    for path in storage.list_files(uri):
        storage.delete(storage.join(uri, path))
    draft = _mask(uri, source, settings, _identity(settings, source), settings.preview)
    collect.write_report(draft, source, quality.truth(root, settings), num_sheet=draft.manifest["rows"])
    for part in draft.part_uris:
        storage.delete(part)
    return uri


def _prepare(root: str, settings: MaskSettings) -> MaskSettings:
    """Settings whose detector names one weights file by its hash; wrong weights are found before any process waits."""
    settings = settings.model_copy(update={"detector": networks.fetch_weights(settings.detector, root)})
    if "mask" in settings.cutout.mode and not Detector(settings.detector).finds_masks:
        raise UserError(
            f"`mask.cutout.mode` is {settings.cutout.mode}, but {settings.detector.model} finds boxes only. "
            "Say `crop`, or choose a detector with masks."
        )
    return settings


def _identity(settings: MaskSettings, source: dataset.Dataset) -> dict[str, Any]:
    """What decides the rows: a dataset with the same identity is the same dataset."""
    compute = {"dataset", "preview", "truth", "num_actors", "use_gpu", "batch_size", "part_rows"}
    known = settings.model_dump(mode="json", exclude=compute)
    known["detector"]["weights"] = known["detector"].pop("weights_sha256")
    known["detector"]["architecture"] = networks.architecture_digest(settings.detector)
    return {**known, "source_digest": source.digest}


def _mask(
    uri: str, source: dataset.Dataset, settings: MaskSettings, identity: dict[str, Any], limit: int | None
) -> dataset.Dataset:
    """The complete dataset at uri, not published yet."""
    connection.connect()
    with Inventory() as inventory:
        inventory.add_rows((row.number, row.key) for row in streaming.select_rows(source, limit))
        for _ in range(MAX_PASSES):
            publishing.sync_inventory(uri, inventory, identity)
            publishing.drop_repeated_parts(uri, inventory, identity)
            if not inventory.count_todo():
                break
            _write(uri, source, inventory, settings, identity)
        outcomes = Counter(publishing.read_written(uri, "parts", ["outcome"])["outcome"].to_pylist())
        facts = {
            "kind": "masked",
            "outcomes": dict(sorted(outcomes.items())),
            # Where they lie, for predictions: the settings have the hash.
            "detector_weights": settings.detector.weights,
        }
        return publishing.complete_dataset(uri, inventory, settings=identity, classes=source.classes, facts=facts)


def _write(
    uri: str, source: dataset.Dataset, inventory: Inventory, settings: MaskSettings, identity: dict[str, Any]
) -> None:
    """Streams the rows that are to do through the detectors into parts."""
    use_gpu = resources.decide_gpus(
        settings.use_gpu, settings.num_actors or 1, "mask.use_gpu", resources.MASK, together=False
    )
    place = resources.node_selector(resources.MASK) if use_gpu else None
    count = settings.num_actors or max(1, resources.count_slots("GPU" if use_gpu else "CPU", 1, place))
    if "batch_size" in settings.model_fields_set and not use_gpu:
        log.warning("mask: `mask.batch_size` has no effect without GPUs: a CPU takes photos one by one")
    resources.check_cpus(1 + (count + 1) * streaming.TASK_CPUS, "mask.num_actors")  # 1: Ray's own repartitioning
    attempts, block_rows = CrashGuard(), GPU_BATCHES * settings.batch_size if use_gpu else CPU_BATCH
    todo = streaming.places_by_part(source, inventory.todo_numbers())
    decoded = streaming.stream_places(todo, block_rows).map_batches(
        partial(decode_batch, attempts=attempts),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    detected = decoded.map_batches(
        DetectPhotos,
        fn_constructor_kwargs={"settings": settings, "attempts": attempts, "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
        label_selector=place,
    )
    written = detected.map_batches(
        partial(write_batch, uri=uri, settings=settings, identity=identity),
        batch_size=settings.part_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    with PhotoMeter("mask", inventory.count_todo()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            meter.add(summary["outcome"].drop_null().to_pylist(), summary["reason"].drop_null().to_pylist())
