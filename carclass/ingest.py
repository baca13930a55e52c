"""Photos and labels → a dataset: listed once, read, checked, hashed, split, published."""

import logging
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import ray

from carclass import cluster, config, dataset, labels, photo, storage
from carclass.errors import UserError
from carclass.labels import Label
from carclass.photo import PhotoError, Reason
from carclass.progress import Progress
from carclass.sample import source as sample

log = logging.getLogger(__name__)
ARCHIVES = (".tgz", ".tar.gz", ".tar")
SOURCE = pa.schema([("key", pa.string()), ("label", pa.string()), ("subset", pa.string())])
LOADED = pa.schema([*SOURCE, ("data", pa.large_binary()), ("error", pa.string())])


class Plan(NamedTuple):
    """What comes in: labelled photos, and inputs that can't become rows, with their reason."""

    photos: list[Label]
    rejected: list[dict[str, Any]]


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
    keys = list_photos(settings.photos)
    plan = match(keys, read_labels(settings, keys))
    classes = sorted({item.label for item in plan.photos})
    _check_classes(classes, settings)
    cluster.connect()
    uri = dataset.place(root, settings.dataset)
    done = dataset.finished(uri, identity)
    todo = [item for item in plan.photos if item.key not in done]
    _write(uri, todo, settings, identity)
    rejected = [row for row in plan.rejected if row["key"] not in done]
    if rejected:
        dataset.write_part(uri, "quarantine", pa.Table.from_pylist(rejected, dataset.QUARANTINE), identity)
    dataset.withdraw(uri, [], identity)
    dataset.withdraw(uri, find_leaks(dataset.written(uri, "parts", ["key", "image_id", "label", "split"])), identity)
    inputs = [*(item.key for item in plan.photos), *(row["key"] for row in plan.rejected)]
    facts = {"kind": "photos"}
    published = dataset.publish(dataset.draft(uri, inputs=inputs, settings=identity, classes=classes, facts=facts))
    _warn_of_thin_classes(published)
    return published


def list_photos(photos: str, setting: str = "ingest.photos") -> list[str]:
    """Keys of all files of a folder, prefix or archive; UserError, naming the setting, when there are none."""
    if photos.endswith(ARCHIVES):
        if not storage.exists(photos):
            raise UserError(f"`{setting}`: no archive {photos}. Give a folder, an s3:// prefix or a .tgz that exists.")
        with storage.open_stream(photos) as stream:
            keys = [member.name.removeprefix("./") for member in _members(stream, photos)]
        if doubled := [key for key, count in Counter(keys).items() if count > 1]:
            raise UserError(f"`{setting}`: {photos} holds {doubled[0]} more than once. Pack it again.")
    else:
        keys = storage.list_files(photos)
    if not keys:
        raise UserError(
            f"`{setting}`: no files in {photos}. Check the path or prefix; an s3:// prefix needs list permission."
        )
    return keys


def read_labels(settings: config.Ingest, keys: Sequence[str]) -> list[Label]:
    """Labels in whichever form they come: CSV, Stanford's devkit, or a folder per class."""
    source = settings.labels
    if source is None:
        return labels.parse_folders(list(keys), source=settings.photos)
    if source.endswith(".csv"):
        return labels.parse_csv(_read_labels_file(source), source=source)
    meta = _read_labels_file(storage.join(source, "cars_meta.mat"))
    found = []
    subsets: list[tuple[labels.Subset, str]] = [
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ]
    for subset, name in subsets:
        uri = storage.join(source, name)
        if storage.exists(uri):
            rows = labels.parse_devkit(storage.read_bytes(uri), meta, subset=subset, source=uri)
            found += [row._replace(key=f"cars_{subset}/{row.key}") for row in rows]
    return found


def _read_labels_file(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise UserError(
            f"`ingest.labels`: {uri} cannot be read ({error}). Give a .csv, or the folder of Stanford's devkit "
            "(cars_meta.mat and cars_train_annos.mat), or leave it out for photos in a folder per class."
        ) from error


def match(keys: Sequence[str], found: Sequence[Label]) -> Plan:
    """Gives each photo its label: a label names a photo by its key, or by the end of exactly one key's path.

    Photos without a label and labels without a photo are kept as rejected inputs. UserError when two labels
    that say different things name one photo.
    """
    by_end = defaultdict(list)
    for key in keys:
        by_end[key.rsplit("/", 1)[-1]].append(key)
    labelled: dict[str, Label] = {}
    rejected = []
    for item in found:
        ends = [key for key in by_end[item.key.rsplit("/", 1)[-1]] if key == item.key or key.endswith("/" + item.key)]
        exact = [item.key] if item.key in ends else ends
        if len(exact) == 1:
            photo_label = item._replace(key=exact[0])
            if (earlier := labelled.setdefault(exact[0], photo_label)) != photo_label:
                raise UserError(
                    f"`ingest.labels`: {item.key} is {item.label} ({item.subset}), but another label for the photo "
                    f"{exact[0]} says {earlier.label} ({earlier.subset}); keep the right one."
                )
        else:
            detail = f"{len(exact)} photos have this name" if exact else f"labelled {item.label}, no such photo"
            rejected.append(dataset.quarantine_row(item.key, Reason.MISSING_FILE, detail))
    without = [key for key in keys if key not in labelled]
    rejected += [dataset.quarantine_row(key, Reason.NO_LABEL, "no label names this photo") for key in without]
    return Plan(sorted(labelled.values()), rejected)


def held_out(image_id: str, seed: int, fraction: float) -> bool:
    """Whether a train photo belongs to val.

    Decided by seed and content alone: copies stay together, and adding photos moves none. Every class is split
    in the same proportion, up to chance.
    """
    return int(storage.sha256(f"{seed}:{image_id}".encode())[:12], 16) / 16**12 < fraction


def find_leaks(rows: pa.Table) -> list[dict[str, Any]]:
    """Quarantine rows for train photos that spoil a measurement: bytes also in test, or under two labels.

    rows: key, image_id, label, split of everything written. Test photos are never touched.
    """
    groups = defaultdict(list)
    for row in rows.select(["key", "image_id", "label", "split"]).to_pylist():
        groups[row["image_id"]].append(row)
    found = []
    for group in groups.values():
        trained = [row for row in group if row["split"] != "test"]
        tested = [row["key"] for row in group if row["split"] == "test"]
        for row in trained:
            others = ", ".join(other["key"] for other in group if other is not row)
            if tested:
                detail = f"same bytes as the test photo {tested[0]}"
                found.append(dataset.quarantine_row(row["key"], Reason.LEAKAGE, detail))
            elif len({other["label"] for other in trained}) > 1:
                detail = f"same bytes as {others}, other label"
                found.append(dataset.quarantine_row(row["key"], Reason.LABEL_CONFLICT, detail))
    return found


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


def write_batch(batch: pa.Table, uri: str, settings: config.Ingest, identity: dict[str, Any]) -> pa.Table:
    """Makes a part (and a part of quarantine) of loaded photos; returns how many of each."""
    rows, rejected = [], []
    for source in batch.to_pylist():
        try:
            rows.append(to_row(source, settings))
        except PhotoError as error:
            image_id = storage.sha256(source["data"]) if source["data"] is not None else None
            rejected.append(dataset.quarantine_row(source["key"], error.reason, error.detail, image_id, attempts=1))
    if rows:
        dataset.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), identity)
    if rejected:
        dataset.write_part(uri, "quarantine", pa.Table.from_pylist(rejected, dataset.QUARANTINE), identity)
    return pa.table({"rows": [len(rows)], "rejected": [len(rejected)]})


def _write(uri: str, todo: Sequence[Label], settings: config.Ingest, identity: dict[str, Any]) -> None:
    """Streams the photos through the cluster into parts."""
    if not todo:
        return
    write = partial(write_batch, uri=uri, settings=settings, identity=identity)
    if settings.photos.endswith(ARCHIVES):
        loaded = load_archive(settings.photos, todo, settings.part_rows)
    else:
        loaded = _load_files(settings, todo)
    summaries = loaded.map_batches(write, batch_size=settings.part_rows, batch_format="pyarrow")
    progress, rejected = Progress("ingest", len(todo)), 0
    for summary in summaries.iter_rows():
        rejected += summary["rejected"]
        progress.add(summary["rows"] + summary["rejected"])
    log.info("ingest: %s photos written, %s quarantined", f"{len(todo) - rejected:,}", f"{rejected:,}")


def _load_files(settings: config.Ingest, todo: Sequence[Label]) -> ray.data.Dataset:
    table = pa.Table.from_pylist([item._asdict() for item in todo], SOURCE)
    blocks = [table.slice(start, settings.part_rows) for start in range(0, len(table), settings.part_rows)]
    load = partial(load_batch, photos=settings.photos)
    return ray.data.from_arrow(blocks).map_batches(load, batch_size=settings.part_rows, batch_format="pyarrow")


def load_batch(batch: pa.Table, photos: str) -> pa.Table:
    """Adds the bytes of each photo, or the error that stands for them."""
    contents = list(storage.read_many(storage.join(photos, key) for key in batch["key"].to_pylist()))
    data = [None if isinstance(content, OSError) else content for content in contents]
    errors = [str(content) if isinstance(content, OSError) else None for content in contents]
    columns = [*batch.columns, pa.array(data, pa.large_binary()), pa.array(errors, pa.string())]
    return pa.Table.from_arrays(columns, schema=LOADED)


def load_archive(photos: str, todo: Sequence[Label], part_rows: int, num_cpus: float | None = None) -> ray.data.Dataset:
    """Rows of LOADED of an archive's photos, read by one task. num_cpus: what that reserves, by default Ray's one."""
    wanted = ray.put({item.key: item for item in todo})
    read = partial(read_archive, wanted=wanted, part_rows=part_rows)
    archive = ray.data.from_items([{"uri": photos}])
    return archive.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=num_cpus)


def read_archive(batch: pa.Table, wanted: Any, part_rows: int) -> Iterator[pa.Table]:
    """An archive's photos in the order in which they lie there, part_rows at a time."""
    labelled = ray.get(wanted)
    rows: list[dict[str, Any]] = []
    uri = batch["uri"][0].as_py()
    with storage.open_stream(uri) as stream:
        for member in _members(stream, uri):
            if (item := labelled.get(member.name.removeprefix("./"))) is not None:
                rows.append({**item._asdict(), "data": member.read(), "error": None})
            if len(rows) == part_rows:
                yield pa.Table.from_pylist(rows, LOADED)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows, LOADED)


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """Its content; only while the archive stands at it."""
        file = self.archive.extractfile(self.info)
        assert file is not None
        return file.read()


def _members(stream: BinaryIO, uri: str) -> Iterable[Member]:
    """The regular files of an archive, read once from front to back; UserError when it is damaged."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for info in archive:
                if info.isfile():
                    yield Member(info.name, archive, info)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"`ingest.photos`: {uri} is no readable tar archive ({error}). Copy it again.") from error


def _check_classes(classes: Sequence[str], settings: config.Ingest) -> None:
    where = settings.labels or settings.photos
    if settings.num_classes not in (None, len(classes)):
        raise UserError(
            f"`ingest.num_classes` says {settings.num_classes}, the labelled photos in {where} have {len(classes)} "
            "classes. Correct the number, or look for labels that are misspelt or missing."
        )
    if len(classes) < 2:
        raise UserError(f"{where} gives {len(classes)} class(es) to the photos; at least two are needed to train.")


def _warn_of_thin_classes(published: dataset.Dataset) -> None:
    table = published.read(["label", "split"]).to_pydict()
    held = Counter(label for label, split in zip(table["label"], table["split"], strict=True) if split == "val")
    thin = [name for name in published.classes if not held[name]]
    if thin:
        log.warning("ingest: %d classes have no val photo: %s", len(thin), ", ".join(thin[:10]))
