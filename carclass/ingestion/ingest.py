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
from carclass.data.inventory import WRITTEN, Inventory, chunks
from carclass.data.quarantine import PhotoError
from carclass.errors import UserError
from carclass.ingestion import archive, label_matching
from carclass.ingestion.label_matching import label_photos
from carclass.ingestion.listing import list_photos
from carclass.ingestion.reading import failed_row, load_photos, to_row
from carclass.sample import source as sample

log = logging.getLogger(__name__)
QUARANTINE_ROWS = 10_000
"""Rows per file of quarantine, for rows that need no photo to be read."""
ARCHIVE_PREFETCH_PARTS = 4
WrittenParts = list[tuple[str, pa.Table]]
"""Paths of the files written by a task, with the columns of WRITTEN of their rows."""


def ingest_photos(root: str, settings: IngestSettings) -> dataset.Dataset:
    """Publish the dataset `<root>/datasets/<dataset>`, or return it if it is published already.

    Raise UserError if photos, labels or settings are unusable.
    """
    identity = settings.model_dump(mode="json", exclude={"dataset", "part_rows"})
    if (published := dataset.find_same_dataset(root, settings.dataset, identity)) is not None:
        log.info("ingest: dataset %s is published, nothing to do", settings.dataset)
        return published
    storage.check_root(root)
    if settings.photos == "sample":
        sample_uris = sample.ensure_sample(root)
        settings = settings.model_copy(update={"photos": sample_uris.photos, "labels": sample_uris.labels})
    with Inventory() as inventory:
        list_photos(settings.photos, inventory)
        label_photos(settings, inventory)
        classes = inventory.classes()
        _check_classes(classes, settings)
        connection.connect()
        uri = dataset.dataset_uri(root, settings.dataset)
        publishing.write_missing(
            uri,
            inventory,
            identity,
            write=lambda: _write_inputs(uri, inventory, settings, identity),
            finish_withdrawals=lambda: _finish_withdrawals(uri, inventory, identity),
        )
        _quarantine_leaks(uri, inventory, identity)
        complete = publishing.complete_dataset(
            uri, inventory, settings=identity, classes=classes, facts={"kind": "photos"}
        )
        published = publishing.publish_manifest(complete)
        _warn_about_missing_val(inventory, classes)
    return published


def write_photos(sources: pa.Table, uri: str, settings: IngestSettings, identity: dict[str, Any]) -> WrittenParts:
    """Read photos, rows of INPUT, and write them as a part."""
    return write_loaded(load_photos(sources, settings.photos), uri, settings, identity)


def write_loaded(batch: pa.Table, uri: str, settings: IngestSettings, identity: dict[str, Any]) -> WrittenParts:
    """Write rows of LOADED as a part, and unusable photos as a part of quarantine."""
    rows, rejected = [], []
    for source in batch.to_pylist():
        try:
            rows.append(to_row(source, settings))
        except PhotoError as error:
            rejected.append(failed_row(source, error))
    folders = [("parts", rows, dataset.ROW), ("quarantine", rejected, dataset.QUARANTINE)]
    return [_write_part(uri, folder, rows, schema, identity) for folder, rows, schema in folders if rows]


def _write_part(
    uri: str, folder: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, identity: dict[str, Any]
) -> tuple[str, pa.Table]:
    """Write rows as one file, and return its path and the columns that the inventory records."""
    table = pa.Table.from_pylist(rows, schema)
    path = publishing.write_part(uri, folder, table, identity)
    return path, table.select([name for name in WRITTEN if name in schema.names])


def _write_inputs(uri: str, inventory: Inventory, settings: IngestSettings, identity: dict[str, Any]) -> None:
    """Write all inputs that are not written yet, as rows or in quarantine."""
    _write_pending_photos(uri, inventory, settings, identity)
    rejected = (quarantine.quarantine_row(*row) for row in inventory.rejected_inputs())
    for rows in chunks(rejected, QUARANTINE_ROWS):
        inventory.add_part(*_write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity))


def _write_pending_photos(uri: str, inventory: Inventory, settings: IngestSettings, identity: dict[str, Any]) -> None:
    """Stream the photos through the cluster into parts."""
    if not (total := inventory.count_pending()):
        return
    write: Any = write_photos
    batches: Iterator[Any] = inventory.pending(settings.part_rows)
    if settings.photos.endswith(archive.SUFFIXES):
        write, batches = write_loaded, _read_archive(settings, inventory)
    rejected = 0
    with PhotoMeter("ingest", total) as meter:
        for written in run_tasks(partial(write, uri=uri, settings=settings, identity=identity), batches):
            for path, rows in written:
                inventory.add_part(path, rows)
            reasons = _column(written, "reason")
            meter.add(_column(written, "split"), reasons)
            rejected += len(reasons)
    log.info("ingest: %s photos written, %s quarantined", f"{total - rejected:,}", f"{rejected:,}")


def _column(written: WrittenParts, name: str) -> list[str]:
    """Return the values of a column in the files that have it."""
    return [value for _, rows in written if name in rows.column_names for value in rows[name].to_pylist()]


def _read_archive(settings: IngestSettings, inventory: Inventory) -> Iterator[ray.ObjectRef]:
    """Yield tables of LOADED in the object store, read by one task with backpressure."""
    requested = pa.concat_tables(inventory.pending(settings.part_rows, hash_order=False))
    options: dict[str, Any] = {
        "num_cpus": 0,  # leave the CPU, which may be the only one, to the tasks that consume the tables
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": ARCHIVE_PREFETCH_PARTS,
    }
    read: Any = ray.remote(**options)(archive.read_photos)
    yield from read.remote(settings.photos, requested, settings.part_rows, "ingest.photos")


def _quarantine_leaks(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Move photos with leakage or label conflicts to quarantine.

    Copies are written to the same file: if a job were killed between two of them, the resumed job would not detect
    the second one.
    """
    rows: list[dict[str, Any]] = []
    for _, copies in groupby(label_matching.find_leaks(inventory), key=lambda leak: leak[0]):
        if len(rows) >= QUARANTINE_ROWS:
            _write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity)
            rows = []
        rows += [row for _, row in copies]
    if rows:
        _write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity)
    publishing.sync_inventory(uri, inventory, identity)
    _finish_withdrawals(uri, inventory, identity)


def _finish_withdrawals(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Remove rows that are in quarantine from their parts."""
    withdraw = partial(publishing.withdraw_rows, uri=uri, settings=identity)
    if list(run_tasks(withdraw, inventory.withdrawn_rows())):
        publishing.sync_inventory(uri, inventory, identity)


def _check_classes(classes: Sequence[str], settings: IngestSettings) -> None:
    source = settings.labels or settings.photos
    if settings.num_classes not in (None, len(classes)):
        raise UserError(
            f"`ingest.num_classes` is {settings.num_classes}, but the labelled photos of {source} have {len(classes)} "
            "classes. Correct the number, or check the labels for misspelt or missing classes."
        )
    if len(classes) < 2:
        raise UserError(f"{source}: the photos have {len(classes)} class(es); training needs at least two.")


def _warn_about_missing_val(inventory: Inventory, classes: Sequence[str]) -> None:
    in_val = inventory.classes_in_split("val")
    missing = [name for name in classes if name not in in_val]
    if missing:
        log.warning("ingest: %d classes have no val photo: %s", len(missing), ", ".join(missing[:10]))
