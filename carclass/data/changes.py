"""Differences between a job's inputs and the rows that are written already, in SQL on the inventory."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa

from carclass.data.inventory import Inventory
from carclass.data.quarantine import LISTING_REASONS, Reason
from carclass.progress import Progress

MAX_EXAMPLES = 3
_LISTING = ", ".join(f"'{reason}'" for reason in LISTING_REASONS)
ROWS = "FROM written LEFT JOIN input ON input.key = written.key"
REPLACED = """(input.id NOT NULL
AND coalesce(input.recorded, input.fingerprint, '') != coalesce(written.fingerprint, ''))"""
UNREAD = f"{ROWS} WHERE {REPLACED} AND written.image IS NULL AND written.reason = input.reason"
"""Inputs with another fingerprint that are in quarantine for their names or labels, without having been read."""
COMPARABLE = f"{ROWS} WHERE {REPLACED} AND written.image NOT NULL AND input.reason IS NULL"
"""Inputs with another fingerprint whose content can be compared with that of their rows."""
COMPARED_ROWS = 64
ReadImageIds = Callable[[Iterator[pa.Table]], Iterator[tuple[str, str | None]]]
"""Rows of inventory.INPUT → (key, image_id) of each; None for a photo that cannot be read."""
OTHER_LABEL = "input.reason IS NULL AND NOT written.quarantined AND input.label != written.label"
OTHER_SPLIT = """input.reason IS NULL AND NOT written.quarantined
AND input.subset != written.split AND (input.subset != 'train' OR written.split NOT IN (SELECT split FROM held_out))"""
"""Train photos may be held out; other subsets are splits."""
RELABELLED = f"({OTHER_LABEL} OR {OTHER_SPLIT})"
OTHER_REASON = f"""(input.reason NOT NULL AND coalesce(written.reason, '') != input.reason
OR input.reason IS NULL AND written.reason IN ({_LISTING}))"""
"""Rows of photos that have lost their label, and quarantined inputs that have got one."""
KINDS = {
    "added": "FROM input AS written WHERE NOT EXISTS (SELECT 1 FROM written AS row WHERE row.key = written.key)",
    "removed": f"{ROWS} WHERE input.id IS NULL",
    "replaced": f"{ROWS} WHERE {REPLACED}",
    "relabelled": f"{ROWS} WHERE input.id NOT NULL AND NOT {REPLACED} AND ({RELABELLED} OR {OTHER_REASON})",
}
STALE = f"input.id IS NULL OR {REPLACED} OR {OTHER_REASON} OR coalesce(written.reason, '') = '{Reason.UNREADABLE}'"
CORRECTIONS = f"""SELECT part.path, written.key, {STALE}, input.label, input.subset {ROWS}
JOIN part ON part.id = written.part WHERE {STALE} OR {RELABELLED} ORDER BY part.path"""


class Change(NamedTuple):
    """Inputs that have changed in one way."""

    kind: str  # added, removed, replaced or relabelled
    number: int
    examples: list[str]  # keys


class Correction(NamedTuple):
    """Rows of one file that differ from their inputs."""

    path: str
    stale: frozenset[str]  # keys of rows to remove
    labels: dict[str, tuple[str, str]]  # key → new (label, split) of a row


def find_changes(inventory: Inventory) -> list[Change]:
    """Return how the inputs differ from the written rows, without kinds that did not occur."""
    changes = []
    for kind, rows in KINDS.items():
        number = inventory.scalar(f"SELECT count(DISTINCT written.key) {rows}")
        query = f"SELECT DISTINCT written.key {rows} ORDER BY written.key LIMIT {MAX_EXAMPLES}"
        changes.append(Change(kind, number, [key for (key,) in inventory.query(query)] if number else []))
    return [change for change in changes if change.number]


def recognize_unchanged(inventory: Inventory, read_image_ids: ReadImageIds) -> None:
    """Find the inputs with a new fingerprint, as by a new time of modification, but the content that is written."""
    inventory.keep_recorded([key for (key,) in inventory.query(f"SELECT input.key {UNREAD}")])
    if not (total := inventory.scalar(f"SELECT count(*) {COMPARABLE}")):
        return
    progress = Progress("compare", total=total)
    same: list[str] = []
    inputs = inventory.inputs(f"{COMPARABLE} ORDER BY hash_order(input.key)", COMPARED_ROWS)
    for key, image_id in read_image_ids(inputs):
        written = next(inventory.query("SELECT image FROM written WHERE key = ? AND image NOT NULL", key))[0]
        if image_id is not None and bytes.fromhex(image_id) == written:
            same.append(key)
        progress.add(1)
    inventory.keep_recorded(same)


def changes_text(changes: list[Change]) -> str:
    """Return the changes as a phrase: "2 added (a.jpg, b.jpg), 1 relabelled (c.jpg)"."""
    return ", ".join(f"{number:,} {kind} ({_examples_text(number, keys)})" for kind, number, keys in changes)


def _examples_text(number: int, keys: list[str]) -> str:
    return ", ".join([*keys, "…"] if number > len(keys) else keys)


def find_corrections(inventory: Inventory) -> Iterator[Correction]:
    """Yield the files with rows that differ from their inputs, or of photos that storage could not deliver."""
    rows = inventory.query(CORRECTIONS)
    for path, group in groupby(rows, key=lambda row: row[0]):
        wrong = list(group)
        stale = frozenset(key for _, key, is_stale, _, _ in wrong if is_stale)
        yield Correction(path, stale, {row[1]: (row[3], row[4]) for row in wrong if not row[2]})


def rows_with_reason(inventory: Inventory, *reasons: Reason) -> Iterator[Correction]:
    """Yield the files with rows of these reasons, to remove them, so that their photos are read again."""
    marks = ", ".join("?" * len(reasons))
    return _remove_rows(inventory, f"written.reason IN ({marks})", *reasons)


def replaced_rows(inventory: Inventory) -> Iterator[Correction]:
    """Yield the files with rows of inputs whose content has changed, to remove these rows."""
    return _remove_rows(inventory, REPLACED)


def _remove_rows(inventory: Inventory, condition: str, *values: str) -> Iterator[Correction]:
    """Yield the corrections that remove the rows of a condition."""
    joined = f"{ROWS} JOIN part ON part.id = written.part"
    query = f"SELECT part.path, written.key {joined} WHERE {condition} ORDER BY part.path"
    for path, group in groupby(inventory.query(query, *values), key=lambda row: row[0]):
        yield Correction(path, frozenset(key for _, key in group), {})
