"""Labels of an ingestion: read and checked before the photos are listed, then assigned to them."""

import logging
import os
from collections.abc import Iterator
from functools import partial

from carclass import storage
from carclass.config.ingest_settings import TABLE_SUFFIXES, IngestSettings
from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError, suggest_beside
from carclass.formatting import count_text
from carclass.ingestion import label_matching, label_table, labels, names
from carclass.ingestion.corrections import apply_corrections
from carclass.ingestion.devkit import read_devkit
from carclass.ingestion.folder_labels import ClassFolders, find_classes
from carclass.ingestion.grouping import find_group_column, group_photos
from carclass.ingestion.own_files import key_below

log = logging.getLogger(__name__)
TABLE_OF_LABELS = "the table of labels"
"""Detail of quarantine of `ingest.labels`, where it lies among the photos."""
MAX_LISTED = 5
"""Contradictions, classes or groups of classes named in a message."""
MAX_EMPTY = 10
"""Folders without photos named in a message."""
CONTRADICTED = """
SELECT name, count(*) OVER () FROM labels GROUP BY name
HAVING min(label) != max(label) OR min(subset) != max(subset)
OR min(coalesce(photo_group, '')) != max(coalesce(photo_group, '')) ORDER BY min(id) LIMIT 5
"""


def read_labels(settings: IngestSettings, inventory: Inventory) -> None:
    """Add the labels of `ingest.labels`, if it is set, to the inventory.

    Raise UserError if they cannot be read or parsed, contradict each other, or have too few classes.
    """
    if settings.labels is None:
        return
    inventory.add_labels(label for _, label in _open_labels(settings, settings.labels))
    inventory.execute("CREATE INDEX labels_name ON labels (name)")
    if contradicted := list(inventory.query(CONTRADICTED)):
        located = _open_labels(settings, settings.labels)
        labels.raise_contradictions(located, [name for name, _ in contradicted], contradicted[0][1])
    num_classes = inventory.scalar("SELECT count(DISTINCT label) FROM labels")
    if num_classes < (expected := settings.num_classes or 2):
        raise UserError(
            f"`ingest.labels`: {settings.labels} has {num_classes} {'class' if num_classes == 1 else 'classes'}, but "
            f"{'training needs at least' if settings.num_classes is None else '`ingest.num_classes` is'} {expected}. "
            "Check the labels for missing or misspelt classes."
        )


def check_labels_place(source: str) -> None:
    """Raise UserError if labels are a local file or folder that does not exist."""
    path = storage.local_path(source)
    if path is not None and not os.path.lexists(path):
        raise _unreadable(source, FileNotFoundError(source))


def _unreadable(source: str, error: OSError) -> UserError:
    """Return the error of labels that cannot be read, with a name like that of a missing file."""
    path, problem = storage.local_path(source), str(error)
    if isinstance(error, FileNotFoundError):
        problem = "a folder without a devkit" if path is not None and os.path.isdir(path) else "no such file"
    hint = suggest_beside(path) if problem == "no such file" else ""
    return UserError(
        f"`ingest.labels`: {source} cannot be read ({problem})"
        f"{f'; {hint}' if hint else '.'} Set it to a {', '.join(TABLE_SUFFIXES)} or a folder with Stanford's devkit "
        "(cars_meta.mat and cars_train_annos.mat), or omit it for one folder per class."
    )


def _open_labels(settings: IngestSettings, source: str) -> Iterator[labels.LocatedLabel]:
    """Yield the labels of a table or of the devkit's folder. Raise UserError if they cannot be read or parsed."""
    try:
        if label_table.is_table(source):
            with storage.open_stream(source) as stream:
                group = find_group_column(settings)
                yield from label_table.parse_table(stream, source=source, columns=settings.columns, group=group)
        elif storage.exists(source):
            raise UserError(
                f"`ingest.labels`: {source} is a file, but not a {', '.join(TABLE_SUFFIXES)}. Labels are such a "
                f"file with the columns {','.join(label_table.COLUMNS.values())}, or a folder with Stanford's devkit."
            )
        else:
            yield from read_devkit(source)
    except OSError as error:
        raise _unreadable(source, error) from error


def label_photos(settings: IngestSettings, inventory: Inventory) -> None:
    """Assign labels to the inventory's photos: those read before, or those given by the photos' folders.

    Raise UserError if they contradict each other or name no photo.
    """
    if settings.labels is None:
        folders = find_classes(inventory.keys, source=settings.photos)
        if folders.shared:
            log.info("ingest: the folders of classes are looked for in %s", "/".join(folders.shared))
        inventory.add_labels(label for _, label in folders.labels(inventory.keys(), settings.photos))
        _reject_misplaced(inventory, folders)
    label_matching.match_labels(inventory, settings.photos)
    if settings.labels is not None:
        _name_table(settings.photos, settings.labels, inventory)
        _check_matches(settings, inventory)
    group_photos(settings, inventory)
    if settings.corrections is not None:
        apply_corrections(settings.corrections, inventory)
    _warn(inventory, f"reason = '{Reason.NO_LABEL}'", "files without a label")
    _warn(inventory, f"reason = '{Reason.BAD_NAME}'", "names that cannot be used")
    _warn_about_lost_folders(inventory)
    _warn_about_untrained(inventory)
    for group in list(names.similar_names(inventory.classes()))[:MAX_LISTED]:
        log.warning(
            "ingest: classes that differ only in case, blanks, underscores or hyphens, which may be one: %s",
            ", ".join(map(repr, group)),
        )


def log_empty_folders(folders: list[str]) -> None:
    """Warn about folders without photos, which make no classes."""
    if folders:
        names = ", ".join(map(repr, sorted(folders)[:MAX_EMPTY])) + (", …" if len(folders) > MAX_EMPTY else "")
        log.warning("ingest: folders without photos, which make no classes: %s: %s", f"{len(folders):,}", names)


def log_junk(inventory: Inventory) -> None:
    """Log the files that are no photos by their names."""
    is_odd = f"reason = '{Reason.JUNK}' AND detail != '{TABLE_OF_LABELS}'"
    _warn(inventory, is_odd, "files that are no photos by their names", logging.INFO)


def _name_table(photos: str, source: str, inventory: Inventory) -> None:
    """Give the table of labels, if it lies among the photos, a detail of its own: it is no odd file."""
    if (key := key_below(photos, source)) is not None:
        statement = f"UPDATE input SET detail = ? WHERE key = ? AND reason = '{Reason.JUNK}'"  # noqa: S608 - constant
        inventory.insert(statement, [(TABLE_OF_LABELS, key)])


def _check_matches(settings: IngestSettings, inventory: Inventory) -> None:
    """Warn about labels that name no photo. Raise UserError if none does."""
    missing = f"reason = '{Reason.MISSING_FILE}' AND size IS NULL"  # files have a size, if only 0
    if inventory.scalar("SELECT 1 FROM input WHERE label NOT NULL") is None:
        name = inventory.scalar(f"SELECT key FROM input WHERE {missing} ORDER BY id")  # noqa: S608 - constant
        photos = f"FROM input WHERE reason = '{Reason.NO_LABEL}'"
        keys = [key for (key,) in inventory.query(f"SELECT key {photos} ORDER BY id LIMIT 1000")]
        raise UserError(
            f"no label of `ingest.labels` ({settings.labels}) names a file of `ingest.photos` ({settings.photos}): "
            f"{names.difference_text(name, keys)} Correct the names in the labels, or `ingest.photos`."
        )
    _warn(inventory, missing, "labels of no photo, or of several")


def _reject_misplaced(inventory: Inventory, folders: ClassFolders) -> None:
    """Give a reason to the photos that are in no folder of a class."""
    for index, column in enumerate(("reason", "detail")):
        inventory.add_function(f"folder_{column}", partial(_problem, folders=folders, index=index))
    inventory.execute(
        "UPDATE input SET reason = folder_reason(key), detail = folder_detail(key) "
        "WHERE reason IS NULL AND folder_reason(key) NOT NULL"
    )


def _problem(key: str, folders: ClassFolders, index: int) -> str | None:
    problem = folders.problem(key)
    return None if problem is None else str(problem[index])


def _warn_about_lost_folders(inventory: Inventory) -> None:
    """Warn about folders in which no name of a photo can be used."""
    if inventory.scalar(f"SELECT 1 FROM input WHERE reason = '{Reason.BAD_NAME}'") is None:  # noqa: S608 - constant
        return
    inventory.add_function("parent", lambda key: key.rpartition("/")[0])
    query = f"""SELECT parent(key) AS folder FROM input WHERE size NOT NULL GROUP BY folder
    HAVING folder != '' AND min(reason IS '{Reason.BAD_NAME}') ORDER BY folder"""  # noqa: S608 - constant
    if folders := [folder for (folder,) in inventory.query(query)]:
        examples = ", ".join(map(repr, folders[:MAX_LISTED]))
        log.warning(
            "ingest: no photo is left of %s folder(s) whose names must be corrected: %s", len(folders), examples
        )


def _warn_about_untrained(inventory: Inventory) -> None:
    """Warn about classes without train photos."""
    query = """SELECT label, count(*), count(*) OVER () FROM input WHERE label NOT NULL AND reason IS NULL
    GROUP BY label HAVING max(subset = 'train') = 0 ORDER BY label LIMIT 3"""
    if rows := list(inventory.query(query)):
        log.warning(
            "ingest: classes without train photos, which no model learns: %s, such as %s; move some of them to train",
            rows[0][2],
            ", ".join(f"{label!r} ({count_text(number, 'photo')})" for label, number, _ in rows),
        )


def _warn(inventory: Inventory, condition: str, problem: str, level: int = logging.WARNING) -> None:
    """Warn about inputs, if any, with the first of each kind."""
    query = f"""SELECT sum(count(*)) OVER (), key, detail, min(id) FROM input WHERE {condition}
    GROUP BY detail ORDER BY min(id) LIMIT 3"""  # noqa: S608 - constants
    if rows := list(inventory.query(query)):
        examples = ", ".join(f"{key!r} ({detail})" for _, key, detail, _ in rows)
        log.log(level, "ingest: %s: %s, such as %s; quarantined", problem, f"{rows[0][0]:,}", examples)
