"""Survey of a source of photos before its ingestion: layout, classes, subsets, odd files, and a sample of photos."""

import io
import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from carclass import progress, storage
from carclass.config.ingest_settings import IngestSettings
from carclass.config.section import NAMED_PARENTS, CommandLineText, validate
from carclass.data.dataset import SPLITS
from carclass.data.inventory import Inventory
from carclass.data.quarantine import PhotoError, Reason
from carclass.errors import UserError
from carclass.ingestion import archive, label_table, labelling
from carclass.ingestion.folder_labels import NoClassFoldersError, find_classes
from carclass.ingestion.inputs import check_classes, list_inputs
from carclass.ingestion.listing import list_pages
from carclass.ingestion.reading import load_photos, to_row
from carclass.ingestion.split import count_held_out

log = logging.getLogger(__name__)
SAMPLE_PHOTOS, MIN_SAMPLE_PHOTOS, SAMPLE_SECONDS = 48, 8, 3.0
"""Limits of the sample: after its seconds it ends, if it has the fewest photos."""
OPTIONS = {"photos": "PHOTOS", "labels": "--labels", "columns": "--columns"}
"""Settings that the command line gives → its arguments."""
FEW_PHOTOS_SHARE = 0.25
"""Share to hold out where the default gives no photo: of two photos of a class it is one."""
MAX_EXAMPLES = 3
"""Files that are named for each reason of quarantine."""
CLASSES = "SELECT label, subset, count(*) FROM input WHERE label NOT NULL AND reason IS NULL GROUP BY label, subset"
REJECTED = (
    "SELECT reason, key, count(*) OVER (PARTITION BY reason) FROM input WHERE reason NOT NULL AND detail IS NOT ? "
    "ORDER BY reason, id"
)


JUNK = f"SELECT key FROM input WHERE reason = '{Reason.JUNK}' ORDER BY key"  # noqa: S608 - constant
INGESTION = "carclass.ingestion"
"""Logger of the lines on a layout."""


class PhotoSample(NamedTuple):
    """Photos that were read as ingestion reads them."""

    sides: list[tuple[int, int]]  # (shorter, longer) in pixels, before photos are shrunk
    stored_bytes: int  # of a photo in the dataset, on average; 0 if no photo is usable
    problems: dict[str, str]  # key → reason and detail of an unusable photo
    seconds: float  # of a core to convert a photo, on average

    @property
    def number(self) -> int:
        """Return the number of photos that were read, usable or not."""
        return len(self.sides) + len(self.problems)


class Survey(NamedTuple):
    """A source of photos as ingestion will list and label it."""

    settings: IngestSettings
    layout: str
    subsets: dict[str, dict[str, int]]  # class → subset of the source → photos
    shares: dict[str, float]  # splits to hold out from train
    rejected: dict[str, tuple[int, list[str]]]  # reason → (inputs, the first of them)
    sample: PhotoSample

    @property
    def class_sizes(self) -> dict[str, int]:
        """Return the photos of each class."""
        return {name: sum(counts.values()) for name, counts in self.subsets.items()}

    @property
    def class_splits(self) -> dict[str, dict[str, int]]:
        """Return the photos of each class by split, if all are usable and none is a copy of another."""
        return {
            name: {**dict.fromkeys(SPLITS, 0), **counts, **count_held_out(counts.get("train", 0), self.shares)}
            for name, counts in self.subsets.items()
        }

    @property
    def splits(self) -> dict[str, int]:
        """Return the photos of each split, as `class_splits`."""
        return {split: sum(counts[split] for counts in self.class_splits.values()) for split in SPLITS}


def survey_source(root: str, photos: str, labels: str | None, columns: Any = None) -> Survey:
    """Return the survey of a source. root: of the results, whose files in the source are no photos.

    labels: a table or the folder of a devkit; None: the folders of photos are their classes, or the only table beside
    or among the photos has their labels. columns: as `ingest.columns`, of a table; those that are missing there are
    recognised. Raise UserError if the source cannot be ingested.
    """
    if columns is not None and labels is None:
        labels = find_table(make_settings(photos, None).photos)
        if labels is None:
            raise UserError(
                f"`--columns` has no effect: no table of labels is in or beside {photos}. Add `--labels FILE`."
            )
    settings = make_settings(photos, labels, columns)
    if labels is not None:
        return _survey(root, settings)
    with progress.hold_lines(INGESTION) as held:
        found = _survey_folders(root, settings)
    if isinstance(found, Survey):
        held.write()
        return found
    try:
        table = find_table(settings.photos)
    except UserError as several:
        raise several if isinstance(found, NoClassFoldersError) else found from None
    if table is None:
        held.write()
        raise found
    # The lines on the folders are not written: they are not used.
    if isinstance(found, NoClassFoldersError):
        log.info("init: no folders of classes; the labels are read from %s", table)
    else:
        log.warning("init: the labels are read from %s, as the folders cannot be the classes: %s", table, found)
    return _survey(root, make_settings(photos, table))


def _survey_folders(root: str, settings: IngestSettings) -> "Survey | UserError":
    """Return the survey of photos whose folders are their classes, or the error if they cannot be."""
    try:
        return _survey(root, settings)
    except UserError as error:
        return error


def make_settings(photos: str, labels: str | None, columns: Any = None) -> IngestSettings:
    """Return the settings of a source, given as on the command line. Raise UserError if they are wrong."""
    place = os.path.abspath(photos) if photos in NAMED_PARENTS else photos  # a folder with the name of weights
    values: dict[str, Any] = {"photos": CommandLineText(place)}
    if labels is not None:
        values |= {"labels": CommandLineText(labels)}
    if columns is not None:
        values |= {"columns": columns}
    settings = validate(values, IngestSettings, source="command line", base=Path.cwd(), options=OPTIONS)
    if settings.labels is None or not label_table.is_table(settings.labels):
        return settings
    try:
        with storage.open_stream(settings.labels) as stream:
            names = label_table.read_column_names(stream, source=settings.labels)
    except OSError:
        return settings  # an error of ingestion, with a remedy
    found = label_table.guess_columns(names, settings.columns, source=settings.labels)
    return settings.model_copy(update={"columns": found}) if found else settings


def find_table(photos: str) -> str | None:
    """Return the URI of the only table of labels among the photos, or else beside their folder; None if there is none.

    Tables in folders below the first level do not count. Raise UserError if there are several.
    """
    path = storage.local_path(photos)
    if archive.is_archive(photos) or (path is not None and not os.path.isdir(path)):
        return None
    keys = [file.key for page in list_pages(photos) for file in page if file.key.count("/") <= 1]
    if not keys:
        return None  # tables beside an empty folder are of other photos
    tables = [storage.join(photos, key) for key in keys if label_table.is_table(key)]
    if not tables and path is not None:
        folder = os.path.dirname(path)
        tables = [os.path.join(folder, name) for name in os.listdir(folder) if label_table.is_table(name)]
    if len(tables) > 1:
        raise UserError(
            f"several tables are in or beside {photos}: {', '.join(sorted(tables)[:5])}. Name the one with the labels: "
            "`--labels FILE`."
        )
    return tables[0] if tables else None


def _survey(root: str, settings: IngestSettings) -> Survey:
    with Inventory() as inventory:
        shares = list_inputs(root, settings, inventory).shares
        subsets: dict[str, dict[str, int]] = {}
        for label, subset, number in inventory.query(CLASSES):
            subsets.setdefault(label, {})[subset] = number
        check_classes(sorted(subsets), settings, "usable photos")
        if settings.labels is None:
            _name_tables(settings.photos, inventory)
        rejected: dict[str, tuple[int, list[str]]] = {}
        for reason, key, number in inventory.query(REJECTED, labelling.TABLE_OF_LABELS):
            examples = rejected.setdefault(reason, (number, []))[1]
            if len(examples) < MAX_EXAMPLES:
                examples.append(key)
        return Survey(
            settings,
            _describe_layout(settings, inventory),
            subsets,
            _fill_splits(subsets, shares),
            rejected,
            _read_sample(settings, inventory),
        )


def _fill_splits(subsets: dict[str, dict[str, int]], shares: dict[str, float]) -> dict[str, float]:
    """Return the shares, larger for splits that would get no photo, if all splits get some by that."""

    def total(split: str, chosen: dict[str, float]) -> int:
        return sum(count_held_out(counts.get("train", 0), chosen)[split] for counts in subsets.values())

    filled = dict(shares)
    for split in shares:
        if not total(split, filled):
            filled[split] = FEW_PHOTOS_SHARE
    return filled if all(total(split, filled) for split in filled) else shares


def _name_tables(photos: str, inventory: Inventory) -> None:
    """Name the tables among photos whose folders are their classes: they may have labels too, which are not read."""
    keys = [key for (key,) in inventory.query(JUNK) if label_table.is_table(key) and key.count("/") <= 1]
    if keys and not archive.is_archive(photos):
        more = f" (one of {len(keys)} tables)" if len(keys) > 1 else ""
        table = shlex.quote(storage.join(photos, keys[0]))
        log.warning("init: the folders are the classes; to read labels from a table: --labels %s%s", table, more)


def _describe_layout(settings: IngestSettings, inventory: Inventory) -> str:
    """Return the layout of a source in words."""
    place = " in an archive" if archive.is_archive(settings.photos) else ""
    if settings.labels is not None:
        return f"photos{place}, labels in {'a table' if label_table.is_table(settings.labels) else 'a devkit'}"
    return f"{find_classes(inventory.keys, source=settings.photos).text}{',' if place else ''}{place}"


def _read_sample(settings: IngestSettings, inventory: Inventory) -> PhotoSample:
    """Read some photos, those of an archive from its start."""
    sides: list[tuple[int, int]] = []
    problems: dict[str, str] = {}
    stored, seconds, started = 0, 0.0, time.monotonic()
    for row in _load_sample(settings, inventory):
        before = time.thread_time()
        try:
            stored += len(to_row(row, settings)["image"])
        except PhotoError as error:
            problems[row["key"]] = str(error)
        else:
            seconds += time.thread_time() - before
            shorter, longer = sorted(Image.open(io.BytesIO(row["data"])).size)
            sides.append((shorter, longer))
        is_late = time.monotonic() - started > SAMPLE_SECONDS
        if is_late and len(sides) + len(problems) >= MIN_SAMPLE_PHOTOS:
            break
    number = max(1, len(sides))
    return PhotoSample(sides, stored // number, problems, seconds / number)


def _load_sample(settings: IngestSettings, inventory: Inventory) -> Iterator[dict[str, Any]]:
    """Yield rows of LOADED."""
    in_order = archive.is_archive(settings.photos)
    for sources in inventory.pending(SAMPLE_PHOTOS, hash_order=not in_order):
        if in_order:
            for table in archive.read_photos(settings.photos, sources, 1, "ingest.photos"):
                yield from table.to_pylist()
        else:
            yield from load_photos(sources, settings.photos, range(len(sources)))
        return
