"""Masking job: a dataset → a dataset without backgrounds, streamed through a pool of detectors by Ray Data.

positions of rows → fetch and decode (tasks) → detect (actors) → cut, encode and write parts (tasks)

Without GPUs, Ray Data fuses fetching and decoding into the actors, as both request the same resources. The result of a
photo does not depend on its batch, so a resumed job writes the same rows as an uninterrupted one.
"""

import logging
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.cluster import actor_pools, connection, resources
from carclass.cluster.actor_pools import ActorPool, plan_pool
from carclass.cluster.tasks import run_tasks
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import MaskSettings
from carclass.data import dataset, publishing, quarantine, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.draft import Draft, find_version
from carclass.data.inventory import Inventory
from carclass.data.lease import hold_lease
from carclass.errors import UserError
from carclass.masking import collect, networks, quality, selection
from carclass.masking.detect import DetectPhotos, detector_batch_size, fetch_and_decode, reading_window
from carclass.masking.detector import Detector
from carclass.masking.overview import Overview, read_overview, warn_of_small_vehicles
from carclass.masking.writer import write_batch

log = logging.getLogger(__name__)
READING = ("min_side", "max_side", "max_pixels", "quality")
"""Settings of the source that determine its photos."""


def mask_dataset(root: str, settings: MaskSettings, *, update: bool = False) -> dataset.Dataset:
    """Publish `<root>/datasets/<dataset>` with its report, or return it if its source is the one it was made from.

    update: publish a new version if the source has changed, masking only photos that are new. Raise UserError for wrong
    settings or weights, if the name is used by a dataset with other settings, or if the source has changed.
    """
    source = dataset.load_dataset(root, settings.source)
    settings = _check_settings(root, settings, source)
    identity = _identity(settings, source)
    find_version(root, settings.dataset, identity)
    uri = dataset.dataset_uri(root, settings.dataset)
    with hold_lease(uri, "mask") as lease, Inventory() as inventory:
        published = find_version(root, settings.dataset, identity)
        draft = Draft(uri, identity, inventory, published, run_tasks, lease)
        _add_inputs(inventory, source, settings.limit)
        if draft.is_current(update=update):
            assert published is not None
            log.info("mask: dataset %s is published, nothing to do", settings.dataset)
            return published
        complete, overview = _write_dataset(root, draft, source, settings)
        quarantine.check_quarantined(complete.manifest, settings.max_quarantined, "mask.max_quarantined")
        collect.write_report(complete, overview, _find_places(inventory, source, overview.places))
        published = draft.publish(complete)
        quarantine.log_counts("mask", published.manifest)
        warn_of_small_vehicles(overview, storage.join(uri, "contact_sheet.jpg"))
        return published


def preview_masks(root: str, settings: MaskSettings, num_photos: int) -> str:
    """Mask some photos, chosen by content, keep only their report and contact sheet, and return the folder's URI."""
    source = dataset.load_dataset(root, settings.source)
    settings = _check_settings(root, settings, source)
    uri = storage.join(root, "previews", settings.dataset)
    with hold_lease(uri, "mask") as lease, Inventory() as inventory:
        draft = Draft(uri, _identity(settings, source), inventory, lease=lease)
        draft.delete_outdated([])
        _add_inputs(inventory, source, num_photos)
        complete, overview = _write_dataset(root, draft, source, settings, num_photos)
        collect.write_report(complete, overview, _find_places(inventory, source, overview.places))
        draft.delete_outdated([])
    return uri


def _check_settings(root: str, settings: MaskSettings, source: dataset.Dataset) -> MaskSettings:
    """Return the settings with pinned detector weights.

    Raise UserError as pin_detector does, or if the true masks are not those of the source's photos.
    """
    connection.check_cluster()
    settings = pin_detector(root, settings)
    quality.check_truth(root, settings, source)
    return settings


def check_target(root: str, settings: MaskSettings, source: dataset.Dataset) -> None:
    """Raise UserError if the name of the dataset is used by one with other settings.

    settings: see pin_detector. source: only its settings are used, so that it may be one that is yet to be made.
    """
    find_version(root, settings.dataset, _identity(settings, source))


def plan_detectors(settings: MaskSettings, num_photos: int | None = None, max_side: int | None = None) -> ActorPool:
    """Return the pool of detectors. Raise UserError if the cluster has too few devices.

    num_photos: pending ones, by default many; max_side: of the photos, None without a limit.
    """
    use_gpu = resources.decide_gpus(
        settings.use_gpu, settings.num_actors or 1, "mask.use_gpu", resources.MASK, all_at_once=False
    )
    photos = sys.maxsize if num_photos is None else num_photos
    num_batches = -(-photos // detector_batch_size(settings, max_side, use_gpu=use_gpu))
    pool = plan_pool(settings.num_actors, num_batches, resources.MASK, use_gpu=use_gpu, task_cpus=streaming.TASK_CPUS)
    actor_pools.check_cpus("mask.num_actors", pool)
    return pool


def pin_detector(root: str, settings: MaskSettings) -> MaskSettings:
    """Return the settings with pinned detector weights, which are fetched and checked.

    Raise UserError if they are unusable, or the cutout mode or the true masks need masks that the detector lacks.
    """
    settings = settings.model_copy(update={"detector": networks.pin_weights(settings.detector, root)})
    model, mode = settings.detector.model, settings.cutout.mode
    finds_masks = Detector(settings.detector).finds_masks
    if ("mask" in mode or settings.truth is not None) and not finds_masks:
        if "mask" in mode:
            raise UserError(
                f"`mask.cutout.mode` is {mode}, but {model} detects boxes only. Set it to `crop`, or choose a detector "
                "with masks."
            )
        raise UserError(
            f"`mask.truth` is compared with masks, but {model} detects boxes only. Leave it out, or choose a detector "
            "with masks."
        )
    return settings


def _identity(settings: MaskSettings, source: dataset.Dataset) -> dict[str, Any]:
    """Return all settings that determine the rows, with hashes of weights and network, and the source's settings.

    Labels and the list of photos are no part of it: a masked photo depends on its own bytes.
    """
    irrelevant = {"dataset", "truth", "num_actors", "use_gpu", "batch_size", "max_quarantined", "part_rows"}
    identity = settings.model_dump(mode="json", exclude=irrelevant)
    identity["detector"]["weights"] = identity["detector"].pop("weights_sha256")
    identity["detector"]["architecture"] = networks.architecture_digest(settings.detector)
    if selection.VERSION > 1:
        identity["choice_version"] = selection.VERSION
    reading = {name: source.manifest["settings"].get(name) for name in READING}
    return {**identity, "source_settings": reading}


def _add_inputs(inventory: Inventory, source: dataset.Dataset, limit: int | None) -> None:
    """Add the source's rows to the inventory, all or the first `limit` in the order of their content's hash."""
    rows = streaming.select_rows(source, limit)
    inventory.add_numbered_inputs((row.number, row.key, row.image_id, row.label, row.split) for row in rows)


def _write_dataset(
    root: str, draft: Draft, source: dataset.Dataset, settings: MaskSettings, num_sheet: int = collect.NUM_SHEET
) -> tuple[dataset.Dataset, Overview]:
    """Write what is missing in the draft, and return the complete dataset, not published yet, with its overview.

    num_sheet: photos on the contact sheet.
    """
    connection.connect({"root": draft.uri})
    draft.begin()
    draft.reconcile()
    draft.write_missing(lambda: _write_pending(draft, source, settings))
    facts = {
        "kind": "masked",
        "source_digest": source.digest,
        # For predictions: the identity holds only their hash.
        "detector_weights": settings.detector.weights,
    }
    complete = draft.complete(source.classes, facts)
    truth = quality.resolve_truth(root, settings)
    ious = {} if truth is None else quality.ious(complete, truth, source=source)
    overview = read_overview(complete, num_sheet, ious, run_tasks)
    outcomes = {"outcomes": dict(sorted(overview.outcomes.items()))}
    return dataset.Dataset(complete.uri, complete.manifest | outcomes), overview


def _find_places(inventory: Inventory, source: dataset.Dataset, keys: Iterable[str]) -> dict[str, dataset.Place]:
    """Return the places of photos in the source by key, without reading it again."""
    numbers = {inventory.number(key): key for key in keys}
    places = streaming.positions_by_part(source, sorted(numbers))
    ordered = (dataset.Place(part, position) for part, positions in places for position in positions)
    return dict(zip((numbers[number] for number in sorted(numbers)), ordered, strict=True))


def _write_pending(draft: Draft, source: dataset.Dataset, settings: MaskSettings) -> None:
    """Stream the pending rows through the detectors into parts."""
    inventory = draft.inventory
    max_side = source.manifest["settings"].get("max_side")
    pool = plan_detectors(settings, inventory.count_pending(), max_side)
    use_gpu = pool.use_gpu
    if "batch_size" in settings.model_fields_set and not use_gpu:
        log.warning("mask: `mask.batch_size` has no effect without GPUs: on a CPU photos are processed one by one")
    log.info("mask: starting %s", pool.describe("detector"))
    crash_guard, block_rows = CrashGuard(), detector_batch_size(settings, max_side, use_gpu=use_gpu)
    pending = streaming.positions_by_part(source, inventory.pending_numbers())
    window = reading_window(block_rows, max_side, use_gpu=use_gpu)
    decoded = streaming.stream_positions(pending, window).map_batches(
        partial(fetch_and_decode, crash_guard=crash_guard, settings=settings.detector, batch_size=block_rows),
        batch_size=window,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    detected = decoded.map_batches(
        DetectPhotos,
        fn_constructor_kwargs={"settings": settings, "crash_guard": crash_guard, "use_gpu": use_gpu},
        batch_size=block_rows,
        batch_format="pyarrow",
        **pool.options(),
    )
    written = detected.map_batches(
        partial(write_batch, uri=draft.uri, settings=settings, identity=draft.settings),
        batch_size=streaming.rows_per_write(source, settings.part_rows),
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
    )
    written = pool.configure(written)
    with PhotoMeter("mask", inventory.count_pending()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            draft.record(publishing.from_records(summary))
            meter.add(summary["outcome"].drop_null().to_pylist(), summary["reason"].drop_null().to_pylist())
