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

from carclass import archive, cluster, config, dataset, labels, listing, matching, photo, storage
from carclass.archive import LOADED
from carclass.errors import UserError
from carclass.inventory import WRITTEN, Inventory, chunks
from carclass.labels import Label
from carclass.photo import PhotoError, Reason
from carclass.progress import Tally
from carclass.sample import source as sample
from carclass.telemetry import Meter

log = logging.getLogger(__name__)
MAX_PASSES = 3
"""A second pass over the photos is needed only when parts were written twice, which a lost node may cause."""
QUARANTINE_ROWS = 10_000
"""Rows of quarantine, as they are known without reading a photo, that are written as one file."""
ARCHIVE_PARTS = 4
"""Parts that an archive is read ahead."""
Written = list[tuple[str, pa.Table]]
"""What a task has written: files, with columns of WRITTEN."""


def run(root: str, settings: config.Ingest) -> dataset.Dataset:
    """Publishes `<root>/datasets/<dataset>`, or finds it published. UserError for wrong sources or settings."""
    identity = settings.model_dump(mode="json", exclude={"dataset", "part_rows"})
    if (found := dataset.find_same(root, settings.dataset, identity)) is not None:
        log.info("ingest: dataset %s is published, nothing to do", settings.dataset)
        return found
    storage.check_root(root)
    if settings.photos == "sample":
        drawn = sample.place(root)
        settings = settings.model_copy(update={"photos": drawn.photos, "labels": drawn.labels})
    with Inventory() as inventory:
        list_photos(settings.photos, inventory)
        label_photos(settings, inventory)
        classes = inventory.classes()
        _check_classes(classes, settings)
        cluster.connect()
        uri = dataset.place(root, settings.dataset)
        _write_all(uri, inventory, settings, identity)
        _set_leaks_aside(uri, inventory, identity)
        facts = {"kind": "photos"}
        published = dataset.publish(dataset.draft(uri, inventory, settings=identity, classes=classes, facts=facts))
        _warn_of_thin_classes(inventory, classes)
    return published


def list_photos(photos: str, inventory: Inventory, setting: str = "ingest.photos") -> None:
    """Enters the keys of all files of a folder, prefix or archive; UserError, naming the setting, without any."""
    if in_archive := photos.endswith(archive.SUFFIXES):
        if not storage.exists(photos):
            raise UserError(f"`{setting}`: no archive {photos}. Give a folder, an s3:// prefix or a .tgz that exists.")
        pages = chunks(archive.names(photos), listing.PAGE_KEYS)
    else:
        pages = listing.pages(photos)
    listed = Tally("list", "keys")
    for page in pages:
        inventory.add_inputs(page)
        listed.add(len(page))
    if not listed.done:
        raise UserError(
            f"`{setting}`: no files in {photos}. Check the path or prefix; an s3:// prefix needs list permission."
        )
    if in_archive and (key := inventory.repeated_input()) is not None:
        raise UserError(f"`{setting}`: {photos} holds {key} more than once. Pack it again.")


def label_photos(settings: config.Ingest, inventory: Inventory) -> None:
    """Gives the inventory's photos their labels; UserError when two say different things of one photo."""
    inventory.add_labels(label for _, label in read_labels(settings, inventory))
    if (name := matching.repeated_label(inventory)) is not None:
        labels.refuse_contradiction(read_labels(settings, inventory), name)
    matching.match(inventory)


def read_labels(settings: config.Ingest, inventory: Inventory) -> Iterator[tuple[str, Label]]:
    """Labels in whichever form they come: CSV, Stanford's devkit, or a folder per class; each with where it is."""
    source = settings.labels
    if source is None:
        yield from labels.parse_folders(inventory.keys, source=settings.photos)
    elif source.endswith(".csv"):
        try:
            with storage.open_stream(source) as stream:
                yield from labels.parse_csv(stream, source=source)
        except OSError as error:
            raise _no_labels(source, error) from error
    else:
        yield from _read_devkit(source)


def _read_devkit(source: str) -> Iterator[tuple[str, Label]]:
    uri = storage.join(source, "cars_meta.mat")
    try:
        meta = storage.read_bytes(uri)
    except OSError as error:
        raise _no_labels(uri, error) from error
    subsets: list[tuple[labels.Subset, str]] = [
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ]
    for subset, name in subsets:
        uri = storage.join(source, name)
        if storage.exists(uri):
            for where, row in labels.parse_devkit(storage.read_bytes(uri), meta, subset=subset, source=uri):
                yield where, row._replace(key=f"cars_{subset}/{row.key}")


def _no_labels(uri: str, error: OSError) -> UserError:
    return UserError(
        f"`ingest.labels`: {uri} cannot be read ({error}). Give a .csv, or the folder of Stanford's devkit "
        "(cars_meta.mat and cars_train_annos.mat), or leave it out for photos in a folder per class."
    )


def held_out(image_id: str, seed: int, fraction: float) -> bool:
    """Whether a train photo belongs to val.

    Decided by seed and content alone: copies stay together, and adding photos moves none. Every class is split
    in the same proportion, up to chance.
    """
    return int(storage.sha256(f"{seed}:{image_id}".encode())[:12], 16) / 16**12 < fraction


def to_row(source: dict[str, Any], settings: config.Ingest) -> dict[str, Any]:
    """One loaded photo (a row of LOADED) as a dataset row; PhotoError when it isn't one."""
    data = source["data"]
    if data is None:
        raise PhotoError(Reason.UNREADABLE, source["error"])
    image, width, height = photo.normalise(
        data, min_side=settings.min_side, max_pixels=settings.max_pixels,
        max_side=settings.max_side, quality=settings.quality,
    )  # fmt: skip
    image_id = storage.sha256(data)
    held = source["subset"] == "train" and held_out(image_id, settings.seed, settings.val_fraction)
    return {
        "image_id": image_id,
        "key": source["key"],
        "label": source["label"],
        "split": "val" if held else source["subset"],
        "width": width,
        "height": height,
        "image": image,
    }


def write_batch(batch: pa.Table, uri: str, settings: config.Ingest, identity: dict[str, Any]) -> Written:
    """Makes a part (and a part of quarantine) of loaded photos, rows of LOADED."""
    rows, rejected = [], []
    for source in batch.to_pylist():
        try:
            rows.append(to_row(source, settings))
        except PhotoError as error:
            image_id = storage.sha256(source["data"]) if source["data"] is not None else None
            rejected.append(dataset.quarantine_row(source["key"], error.reason, error.detail, image_id, attempts=1))
    tables = [("parts", rows, dataset.ROW), ("quarantine", rejected, dataset.QUARANTINE)]
    return [_write_part(uri, folder, found, schema, identity) for folder, found, schema in tables if found]


def _write_part(
    uri: str, folder: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, identity: dict[str, Any]
) -> tuple[str, pa.Table]:
    table = pa.Table.from_pylist(rows, schema)
    path = dataset.write_part(uri, folder, table, identity)
    return path, table.select([name for name in WRITTEN if name in schema.names])


def load_batch(batch: pa.Table, photos: str) -> pa.Table:
    """Adds the bytes of each photo, or the error that stands for them."""
    contents = list(storage.read_many(storage.join(photos, key) for key in batch["key"].to_pylist()))
    data = [None if isinstance(content, OSError) else content for content in contents]
    errors = [str(content) if isinstance(content, OSError) else None for content in contents]
    columns = [*batch.columns, pa.array(data, pa.large_binary()), pa.array(errors, pa.string())]
    return pa.Table.from_arrays(columns, schema=LOADED)


def write_files(sources: pa.Table, uri: str, settings: config.Ingest, identity: dict[str, Any]) -> Written:
    """Reads photos, rows of SOURCE, and makes a part of them."""
    return write_batch(load_batch(sources, settings.photos), uri, settings, identity)


def _write_all(uri: str, inventory: Inventory, settings: config.Ingest, identity: dict[str, Any]) -> None:
    """Writes everything that isn't written yet, rows and quarantine."""
    for _ in range(MAX_PASSES):
        dataset.take_stock(uri, inventory, identity)
        _finish_withdrawals(uri, inventory, identity)
        dataset.drop_repeats(uri, inventory, identity)
        if not inventory.lost():
            return
        _write_photos(uri, inventory, settings, identity)
        rejected = (dataset.quarantine_row(*row) for row in inventory.rejected())
        for rows in chunks(rejected, QUARANTINE_ROWS):
            inventory.add_part(*_write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity))


def _write_photos(uri: str, inventory: Inventory, settings: config.Ingest, identity: dict[str, Any]) -> None:
    """Streams the photos through the cluster into parts."""
    if not (total := inventory.count_todo()):
        return
    write: Any = write_files
    batches: Iterator[Any] = inventory.todo(settings.part_rows)
    if settings.photos.endswith(archive.SUFFIXES):
        write, batches = write_batch, _read_archive(settings, inventory)
    rejected = 0
    with Meter("ingest", total) as meter:
        for written in cluster.run_tasks(partial(write, uri=uri, settings=settings, identity=identity), batches):
            for path, rows in written:
                inventory.add_part(path, rows)
            reasons = _column("reason", written)
            meter.add(_column("split", written), reasons)
            rejected += len(reasons)
    log.info("ingest: %s photos written, %s quarantined", f"{total - rejected:,}", f"{rejected:,}")


def _column(name: str, written: Written) -> list[str]:
    """A column of those files that have it."""
    return [value for _, rows in written if name in rows.column_names for value in rows[name].to_pylist()]


def _read_archive(settings: config.Ingest, inventory: Inventory) -> Iterator[ray.ObjectRef]:
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


def _set_leaks_aside(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Moves the photos that spoil a measurement to quarantine.

    Copies go together: of a job killed between two of them, the next one would find the second without the first.
    """
    rows: list[dict[str, Any]] = []
    last = None
    for image, row in chain(matching.find_leaks(inventory), [(None, None)]):
        if rows and (row is None or (len(rows) >= QUARANTINE_ROWS and image != last)):
            _write_part(uri, "quarantine", rows, dataset.QUARANTINE, identity)
            rows = []
        rows += [] if row is None else [row]
        last = image
    dataset.take_stock(uri, inventory, identity)
    _finish_withdrawals(uri, inventory, identity)


def _finish_withdrawals(uri: str, inventory: Inventory, identity: dict[str, Any]) -> None:
    """Takes rows that quarantine names out of their parts."""
    withdraw = partial(dataset.withdraw, uri=uri, settings=identity)
    if list(cluster.run_tasks(withdraw, inventory.withdrawn())):
        dataset.take_stock(uri, inventory, identity)


def _check_classes(classes: Sequence[str], settings: config.Ingest) -> None:
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
