"""Ingestion of photos and labels into a dataset: list, read, check, hash, split, publish.

keys and labels → inventory → tasks, each of which reads photos and writes a part → inventory → manifest

The driver keeps all keys in an inventory on disk, and a task receives only those of its part: memory depends on the
size of the cluster, not on the number of photos.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa
import ray

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.tasks import run_tasks
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing, quarantine
from carclass.data.crash_guard import CrashGuard
from carclass.data.draft import Draft, find_version
from carclass.data.inventory import Inventory, chunks
from carclass.data.lease import hold_lease
from carclass.data.publishing import WrittenPart
from carclass.data.root_check import check_root
from carclass.ingestion import archive, collect, leakage, listing
from carclass.ingestion.folder_labels import find_classes
from carclass.ingestion.inputs import ListedInputs, check_classes, list_inputs
from carclass.ingestion.reading import GuardedRun, read_groups, read_image_ids
from carclass.ingestion.split import MIN_VAL_PHOTOS, check_shares, hold_out

log = logging.getLogger(__name__)
QUARANTINE_ROWS = 10_000
"""Rows per file of quarantine, for rows that need no photo to be read."""
ARCHIVE_PREFETCH_PARTS = 4
IRRELEVANT = {
    "columns",
    "corrections",
    "dataset",
    "labels",
    "max_quarantined",
    "num_classes",
    "part_rows",
    "test_fraction",
}
"""Settings that change no row by themselves: labels are compared photo by photo, and so are held-out splits."""


def ingest_photos(
    root: str, settings: IngestSettings, *, update: bool = False, listed: ListedInputs | None = None
) -> dataset.Dataset:
    """Publish the dataset `<root>/datasets/<dataset>`, or return it if photos and labels are those it was made from.

    update: publish a new version if they have changed, reading only photos that are new. listed: the inputs, if they
    are listed already. Raise UserError if photos, labels or settings are unusable, or have changed.
    """
    identity = identify_settings(settings)
    find_version(root, settings.dataset, identity)
    check_root(root)
    connection.check_cluster()
    uri = dataset.dataset_uri(root, settings.dataset)
    with hold_lease(uri, "ingest") as lease, Inventory() as new:
        published = find_version(root, settings.dataset, identity)
        settings, inventory, shares = listed or list_inputs(root, settings, new)
        check_shares(published, shares)
        draft = Draft(uri, identity, inventory, published, run_tasks, lease)
        if draft.is_current(update=update, read_image_ids=partial(_read_image_ids, root=root, settings=settings)):
            assert published is not None
            log.info("ingest: dataset %s is published, nothing to do", settings.dataset)
            return published
        _connect(root, settings)
        return _write_dataset(draft, settings, shares)


def identify_settings(settings: IngestSettings) -> dict[str, Any]:
    """Return the settings that determine the rows of a dataset."""
    irrelevant = IRRELEVANT | ({"group"} if settings.group is None else set())
    return {**settings.model_dump(mode="json", exclude=irrelevant), "photos": listing.spelled_once(settings.photos)}


def _connect(root: str, settings: IngestSettings) -> None:
    connection.connect({"root": root, "ingest.photos": archive.split_folder(settings.photos)[0]})


def _read_image_ids(
    inputs: Iterator[pa.Table], root: str, settings: IngestSettings
) -> Iterator[tuple[str, str | None]]:
    """Yield (key, image_id) of inputs, read on the cluster."""
    _connect(root, settings)
    for image_ids in run_tasks(partial(read_image_ids, photos=settings.photos), _to_batches(inputs, settings)):
        yield from image_ids


def _write_dataset(draft: Draft, settings: IngestSettings, shares: dict[str, float]) -> dataset.Dataset:
    """Write what is missing in the draft and publish it. shares: see `split.find_shares`."""
    inventory, classes = draft.inventory, draft.inventory.classes()
    draft.begin()
    draft.reconcile()
    draft.write_missing(lambda: _write_inputs(draft, settings))
    _quarantine_leaks(draft)
    hold_out(draft, shares, settings.seed)
    facts = {"kind": "photos", "held_out": shares}
    if settings.corrections is not None:
        facts["corrections"] = storage.sha256(storage.read_bytes(settings.corrections))
    complete = draft.complete(classes, facts)
    quarantine.check_quarantined(complete.manifest, settings.max_quarantined, "ingest.max_quarantined")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in complete.manifest["reasons"].items())
    check_classes(complete.classes, settings, f"photos that are not in quarantine ({reasons})")
    labels = settings.labels or find_classes(inventory.keys, source=settings.photos).text
    collect.write_report(complete, settings, labels)
    before = () if draft.published is None else draft.published.classes
    published = draft.publish(complete)
    for name in sorted({*before} - {*complete.classes}):
        log.warning("ingest: class %s has no photos any more; dataset %s is without it", name, settings.dataset)
    quarantine.log_counts("ingest", published.manifest)
    _warn_about_few_val(inventory, complete.classes)
    _warn_about_test_conflicts(inventory)
    return published


def write_photos(
    sources: pa.Table, uri: str, settings: IngestSettings, identity: dict[str, Any], run: GuardedRun
) -> list[WrittenPart]:
    """Read photos, rows of INPUT or LOADED, and write them as a part, unusable ones as a part of quarantine.

    run: CrashGuard.run. There are several parts if photos are large.
    """
    written = []
    for group in read_groups(sources, settings, run):
        photos = [row for row in group if "reason" not in row]
        rejected = [row for row in group if "reason" in row]
        folders = {"parts": photos, "quarantine": rejected}
        written += [publishing.write_rows(uri, folder, rows, identity) for folder, rows in folders.items() if rows]
    return written


def _write_inputs(draft: Draft, settings: IngestSettings) -> None:
    """Write all inputs that are not written yet, as rows or in quarantine."""
    _write_pending_photos(draft, settings)
    rejected = (quarantine.quarantine_row(*row) for row in draft.inventory.rejected_inputs())
    for rows in chunks(rejected, QUARANTINE_ROWS):
        part = publishing.write_rows(draft.uri, "quarantine", rows, draft.settings)
        draft.record([part])


def _write_pending_photos(draft: Draft, settings: IngestSettings) -> None:
    """Stream the photos through the cluster into parts."""
    inventory = draft.inventory
    if not (total := inventory.count_pending()):
        return
    in_order = archive.is_archive(settings.photos)
    batches = _to_batches(inventory.pending(settings.part_rows, hash_order=not in_order), settings)
    crash_guard = CrashGuard()
    write = partial(write_photos, uri=draft.uri, settings=settings, identity=draft.settings, run=crash_guard.run)
    with PhotoMeter("ingest", total) as meter:
        for written in run_tasks(write, batches, crash_guard.count_crashes):
            draft.record(written)
            meter.add(_column(written, "split"), _column(written, "reason"))


def _column(written: Sequence[WrittenPart], name: str) -> list[str]:
    """Return the values of a column in the files that have it."""
    return [value for part in written if name in part.rows.column_names for value in part.rows[name].to_pylist()]


def _to_batches(inputs: Iterator[pa.Table], settings: IngestSettings) -> Iterator[Any]:
    """Return the items of tasks that load photos: rows of INPUT, or those of LOADED in the object store."""
    return _read_archive(inputs, settings) if archive.is_archive(settings.photos) else inputs


def _read_archive(inputs: Iterator[pa.Table], settings: IngestSettings) -> Iterator[ray.ObjectRef]:
    """Yield tables of LOADED in the object store, read by one task with backpressure."""
    requested = pa.concat_tables(inputs)
    options: dict[str, Any] = {
        "num_cpus": 0,  # leave the CPU, which may be the only one, to the tasks that consume the tables
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": ARCHIVE_PREFETCH_PARTS,
    }
    read: Any = ray.remote(**options)(archive.read_photos)
    yield from read.remote(settings.photos, requested, settings.part_rows, "ingest.photos")


def _quarantine_leaks(draft: Draft) -> None:
    """Move photos with leakage or label conflicts to quarantine.

    Copies are written to the same file: if a job were killed between two of them, the resumed job would not detect
    the second one.
    """
    rows: list[dict[str, Any]] = []
    for _, copies in groupby(leakage.find_leaks(draft.inventory), key=lambda leak: leak[0]):
        if len(rows) >= QUARANTINE_ROWS:
            draft.restore([publishing.write_rows(draft.uri, "quarantine", rows, draft.settings).path])
            rows = []
        rows += [row for _, row in copies]
    if rows:
        draft.restore([publishing.write_rows(draft.uri, "quarantine", rows, draft.settings).path])
    draft.sync()
    draft.finish_withdrawals()


def _warn_about_few_val(inventory: Inventory, classes: Sequence[str]) -> None:
    """Warn about classes with so few val photos that their accuracy says little."""
    counts = inventory.class_counts("val")
    few = {name: counts.get(name, 0) for name in classes if counts.get(name, 0) < MIN_VAL_PHOTOS}
    if few:
        is_held_out = inventory.scalar("SELECT 1 FROM held_out WHERE split = 'val'") is not None
        names = [f"{name} {number}" for name, number in sorted(few.items(), key=lambda item: item[1])[:10]]
        log.warning(
            "ingest: %d of %d classes have fewer than %d val photos (%s): of n photos, each moves the val accuracy of "
            "its class by 1/n. Compare models by the accuracy over all classes, or %s",
            len(few), len(classes), MIN_VAL_PHOTOS, ", ".join(names) + (", …" if len(few) > len(names) else ""),
            "add photos, or set a larger `ingest.val_fraction`" if is_held_out else "add val photos to the source",
        )  # fmt: skip


def _warn_about_test_conflicts(inventory: Inventory) -> None:
    """Warn about test photos under two labels, which stay: at most one of the two can be predicted."""
    if conflicts := list(leakage.find_test_conflicts(inventory)):
        number, (first, last) = f"{len(conflicts):,}", conflicts[0]
        log.warning("ingest: %s photos are in test under two labels, such as %r and %r", number, first, last)
