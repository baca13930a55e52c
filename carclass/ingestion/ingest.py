"""Photos and labels → a dataset: listed once, read, checked, hashed, split, published.

keys and labels → inventory → tasks, which read some photos each and write a part → inventory → manifest

The driver has all photos in its inventory, on disk, and a task knows those of its part: memory depends on the cluster
and not on how many photos there are.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import ray

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.tasks import run_tasks
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing
from carclass.data.inventory import WRITTEN, Inventory, chunks
from carclass.data.photo import PhotoError
from carclass.errors import UserError
from carclass.ingestion import archive, label_matching
from carclass.ingestion.label_matching import label_photos
from carclass.ingestion.listing import list_photos
from carclass.ingestion.reading import load_photos, to_row
from carclass.sample import source as sample

log = logging.getLogger(__name__)
MAX_PASSES = 3
"""A second pass over the photos is needed only when parts were written twice, which a lost node may cause."""
QUARANTINE_ROWS = 10_000
"""Rows of quarantine, as they are known without reading a photo, that are written as one file."""
ARCHIVE_PARTS = 4
"""Parts that an archive is read ahead."""
Written = list[tuple[str, pa.Table]]
"""What a task has written: files, with columns of WRITTEN."""


def ingest_photos(root: str, settings: IngestSettings) -> dataset.Dataset:
    """Publishes `<root>/datasets/<dataset>`, or finds it published. UserError for wrong sources or settings."""
    identity = settings.model_dump(mode="json", exclude={"dataset", "part_rows"})
    if (found := dataset.find_same_dataset(root, settings.dataset, identity)) is not None:
        log.info("ingest: dataset %s is published, nothing to do", settings.dataset)
        return found
    storage.check_root(root)
    if settings.photos == "sample":
        drawn = sample.write_once(root)
        settings = settings.model_copy(update={"photos": drawn.photos, "labels": drawn.labels})
    with Inventory() as inventory:
        list_photos(settings.photos, inventory)
        label_photos(settings, inventory)
        classes = inventory.classes()
        _check_classes(classes, settings)
        connection.connect()
        uri = dataset.dataset_uri(root, settings.dataset)
        _write_missing(uri, inventory, settings, identity)
        _quarantine_leaks(uri, inventory, identity)
        facts = {"kind": "photos"}
        published = publishing.publish_manifest(
            publishing.complete_dataset(uri, inventory, settings=identity, classes=classes, facts=facts)
        )
        _warn_of_thin_classes(inventory, classes)
    return published


def write_batch(batch: pa.Table, uri: str, settings: IngestSettings, identity: dict[str, Any]) -> Written:
    """Makes a part (and a part of quarantine) of loaded photos, rows of LOADED."""
    rows, rejected = [], []
    for source in batch.to_pylist():
        try:
            rows.append(to_row(source, settings))
        except PhotoError as error:
            image_id = storage.sha256(source["data"]) if source["data"] is not None else None
            rejected.append(publishing.quarantine_row(source["key"], error.reason, error.detail, image_id, attempts=1))
    tables = [("parts", rows, dataset.ROW), ("quarantine", rejected, dataset.QUARANTINE)]
    return [_write_part(uri, folder, found, schema, identity) for folder, found, schema in tables if found]


def _write_part(
    uri: str, folder: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, identity: dict[str, Any]
) -> tuple[str, pa.Table]:
    table = pa.Table.from_pylist(rows, schema)
    path = publishing.write_part(uri, folder, table, identity)
    return path, table.select([name for name in WRITTEN if name in schema.names])


def write_files(sources: pa.Table, uri: str, settings: IngestSettings, identity: dict[str, Any]) -> Written:
    """Reads photos, rows of SOURCE, and makes a part of them."""
    return write_batch(load_photos(sources, settings.photos), uri, settings, identity)


def _write_missing(uri: str, inventory: Inventory, settings: IngestSettings, identity: dict[str, Any]) -> None:
    """Writes everything that isn't written yet, rows and quarantine."""
    for _ in range(MAX_PASSES):
        publishing.sync_inventory(uri, inventory, identity)
        _finish_withdrawals(uri, inventory, identity)
        publishing.drop_repeated_parts(uri, inventory, identity)
        if not inventory.lost():
            return
        _write_photos(uri, inventory, settings, identity)
        rejected = (publishing.quarantine_row(*row) for row in inventory.rejected())
        for rows in chunks(rejected, QUARANTINE_ROWS):
            inventory.add_part(*_write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity))


def _write_photos(uri: str, inventory: Inventory, settings: IngestSettings, identity: dict[str, Any]) -> None:
    """Streams the photos through the cluster into parts."""
    if not (total := inventory.count_todo()):
        return
    write: Any = write_files
    batches: Iterator[Any] = inventory.todo(settings.part_rows)
    if settings.photos.endswith(archive.SUFFIXES):
        write, batches = write_batch, _read_archive(settings, inventory)
    rejected = 0
    with PhotoMeter("ingest", total) as meter:
        for written in run_tasks(partial(write, uri=uri, settings=settings, identity=identity), batches):
            for path, rows in written:
                inventory.add_part(path, rows)
            reasons = _column("reason", written)
            meter.add(_column("split", written), reasons)
            rejected += len(reasons)
    log.info("ingest: %s photos written, %s quarantined", f"{total - rejected:,}", f"{rejected:,}")


def _column(name: str, written: Written) -> list[str]:
    """A column of those files that have it."""
    return [value for _, rows in written if name in rows.column_names for value in rows[name].to_pylist()]


def _read_archive(settings: IngestSettings, inventory: Inventory) -> Iterator[ray.ObjectRef]:
    """Tables of LOADED in the object store, made by one task, that waits while they are used too slowly."""
    wanted = pa.concat_tables(inventory.todo(settings.part_rows, spread=False))
    # It reserves no CPU, as the only one may be that of a task which uses up what it has read.
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": ARCHIVE_PARTS,
    }
    read: Any = ray.remote(**options)(archive.read)
    yield from read.remote(settings.photos, wanted, settings.part_rows)


def _quarantine_leaks(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Moves the photos that spoil a measurement to quarantine.

    Copies go together: of a job killed between two of them, the next one would find the second without the first.
    """
    rows: list[dict[str, Any]] = []
    last = None
    for image, row in chain(label_matching.find_leaks(inventory), [(None, None)]):
        if rows and (row is None or (len(rows) >= QUARANTINE_ROWS and image != last)):
            _write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity)
            rows = []
        rows += [] if row is None else [row]
        last = image
    publishing.sync_inventory(uri, inventory, identity)
    _finish_withdrawals(uri, inventory, identity)


def _finish_withdrawals(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Takes rows that quarantine names out of their parts."""
    withdraw = partial(publishing.withdraw, uri=uri, settings=identity)
    if list(run_tasks(withdraw, inventory.withdrawn())):
        publishing.sync_inventory(uri, inventory, identity)


def _check_classes(classes: Sequence[str], settings: IngestSettings) -> None:
    where = settings.labels or settings.photos
    if settings.num_classes not in (None, len(classes)):
        raise UserError(
            f"`ingest.num_classes` says {settings.num_classes}, the labelled photos in {where} have {len(classes)} "
            "classes. Correct the number, or look for labels that are misspelt or missing."
        )
    if len(classes) < 2:
        raise UserError(f"{where} gives {len(classes)} class(es) to the photos; at least two are needed to train.")


def _warn_of_thin_classes(inventory: Inventory, classes: Sequence[str]) -> None:
    held = inventory.classes_of("val")
    thin = [name for name in classes if name not in held]
    if thin:
        log.warning("ingest: %d classes have no val photo: %s", len(thin), ", ".join(thin[:10]))
