"""Masking job: a dataset → a dataset without backgrounds, streamed through a pool of detectors by Ray Data.

positions of rows → fetch and decode (tasks) → detect (actors) → cut, encode and write parts (tasks)

Without GPUs, Ray Data fuses fetching and decoding into the actors, as both request the same resources. The result of a
photo does not depend on its batch, so a resumed job writes the same rows as an uninterrupted one.
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
from carclass.masking.detect import DetectPhotos, detector_batch_size, fetch_and_decode
from carclass.masking.detector import Detector
from carclass.masking.writer import write_batch

log = logging.getLogger(__name__)


def mask_dataset(root: str, settings: MaskSettings) -> dataset.Dataset:
    """Publish `<root>/datasets/<dataset>` with its report, and return it; do nothing if it is published.

    Raise UserError for wrong settings or weights, or if the name is used by a dataset with other settings.
    """
    source = dataset.load_dataset(root, settings.source)
    settings = _pin_detector(root, settings)
    identity = _identity(settings, source)
    if (published := dataset.find_same_dataset(root, settings.dataset, identity)) is not None:
        log.info("mask: dataset %s is published, nothing to do", settings.dataset)
        return published
    draft = _write_draft(dataset.dataset_uri(root, settings.dataset), source, settings, identity, settings.limit)
    collect.write_report(draft, source, quality.resolve_truth(root, settings))
    return publishing.publish_manifest(draft)


def preview_masks(root: str, settings: MaskSettings, num_photos: int) -> str:
    """Mask some photos, chosen by content, keep only their report and contact sheet, and return the folder's URI."""
    source = dataset.load_dataset(root, settings.source)
    settings = _pin_detector(root, settings)
    uri = storage.join(root, "previews", settings.dataset)
    for path in storage.list_files(uri):
        storage.delete(storage.join(uri, path))
    draft = _write_draft(uri, source, settings, _identity(settings, source), num_photos)
    collect.write_report(draft, source, quality.resolve_truth(root, settings), num_sheet=draft.manifest["rows"])
    for part in draft.part_uris:
        storage.delete(part)
    return uri


def _pin_detector(root: str, settings: MaskSettings) -> MaskSettings:
    """Return the settings with pinned detector weights; raise UserError if the cutout mode needs masks it lacks."""
    settings = settings.model_copy(update={"detector": networks.pin_weights(settings.detector, root)})
    if "mask" in settings.cutout.mode and not Detector(settings.detector).finds_masks:
        raise UserError(
            f"`mask.cutout.mode` is {settings.cutout.mode}, but {settings.detector.model} detects boxes only. "
            "Set it to `crop`, or choose a detector with masks."
        )
    return settings


def _identity(settings: MaskSettings, source: dataset.Dataset) -> dict[str, Any]:
    """Return all settings that determine the rows, with hashes of weights, network and source."""
    irrelevant = {"dataset", "truth", "num_actors", "use_gpu", "batch_size", "part_rows"}
    identity = settings.model_dump(mode="json", exclude=irrelevant)
    identity["detector"]["weights"] = identity["detector"].pop("weights_sha256")
    identity["detector"]["architecture"] = networks.architecture_digest(settings.detector)
    return {**identity, "source_digest": source.digest}


def _write_draft(
    uri: str, source: dataset.Dataset, settings: MaskSettings, identity: dict[str, Any], limit: int | None
) -> dataset.Dataset:
    """Write all parts at uri and return the complete dataset, which is not published yet."""
    connection.connect()
    with Inventory() as inventory:
        inventory.add_numbered_keys((row.number, row.key) for row in streaming.select_rows(source, limit))
        publishing.write_missing(
            uri, inventory, identity, lambda: _write_pending(uri, source, inventory, settings, identity)
        )
        outcomes = Counter(publishing.read_written(uri, "parts", ["outcome"])["outcome"].to_pylist())
        facts = {
            "kind": "masked",
            "outcomes": dict(sorted(outcomes.items())),
            # For predictions: the identity holds only their hash.
            "detector_weights": settings.detector.weights,
        }
        return publishing.complete_dataset(uri, inventory, settings=identity, classes=source.classes, facts=facts)


def _write_pending(
    uri: str, source: dataset.Dataset, inventory: Inventory, settings: MaskSettings, identity: dict[str, Any]
) -> None:
    """Stream the pending rows through the detectors into parts."""
    use_gpu = resources.decide_gpus(
        settings.use_gpu, settings.num_actors or 1, "mask.use_gpu", resources.MASK, all_at_once=False
    )
    node_selector = resources.node_selector(resources.MASK) if use_gpu else None
    num_actors = settings.num_actors or max(1, resources.count_slots("GPU" if use_gpu else "CPU", 1, node_selector))
    if "batch_size" in settings.model_fields_set and not use_gpu:
        log.warning("mask: `mask.batch_size` has no effect without GPUs: on a CPU photos are processed one by one")
    resources.check_cpus(1 + (num_actors + 1) * streaming.TASK_CPUS, "mask.num_actors")  # 1: Ray's own repartitioning
    crash_guard, block_rows = CrashGuard(), detector_batch_size(settings, use_gpu=use_gpu)
    pending = streaming.positions_by_part(source, inventory.pending_numbers())
    decoded = streaming.stream_positions(pending, block_rows).map_batches(
        partial(fetch_and_decode, crash_guard=crash_guard),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    detected = decoded.map_batches(
        DetectPhotos,
        fn_constructor_kwargs={"settings": settings, "crash_guard": crash_guard, "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
        label_selector=node_selector,
    )
    written = detected.map_batches(
        partial(write_batch, uri=uri, settings=settings, identity=identity),
        batch_size=settings.part_rows,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    with PhotoMeter("mask", inventory.count_pending()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            meter.add(summary["outcome"].drop_null().to_pylist(), summary["reason"].drop_null().to_pylist())
