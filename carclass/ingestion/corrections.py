"""Corrections of an audit: photos that are set aside, labelled anew, or kept in one split with others."""

import csv
import io
import logging
from collections.abc import Iterator
from typing import NamedTuple

from carclass import storage
from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError, suggest_names
from carclass.formatting import count_text
from carclass.ingestion import grouping

log = logging.getLogger(__name__)
COLUMNS = ("key", "action")
ACTIONS = "keep, drop, relabel:CLASS or group:NAME"


class Correction(NamedTuple):
    """An action on a photo."""

    key: str
    action: str  # drop, relabel or group
    value: str  # class or name of the group; "" of drop
    place: str  # file and line, for messages


def apply_corrections(source: str, inventory: Inventory) -> None:
    """Apply the table `ingest.corrections` to the inventory's labelled photos.

    Raise UserError for a table that cannot be read, contradicts itself, or names photos or classes that do not exist.
    """
    corrections = list(read_corrections(source))
    _check_contradictions(corrections)
    classes = inventory.classes()
    for each in corrections:
        if next(inventory.query("SELECT 1 FROM input WHERE key = ?", each.key), None) is None:
            raise UserError(f"{each.place}: `key` is {each.key!r}, but there is no such photo. Correct or delete it.")
        if each.action == "relabel" and each.value not in classes:
            hint = suggest_names(each.value, classes) or "Correct it."
            raise UserError(f"{each.place}: `action` is relabel:{each.value}, which is none of the classes; {hint}")
    by_action = {name: [each for each in corrections if each.action == name] for name in ("drop", "relabel", "group")}
    dropped = f"UPDATE input SET reason = '{Reason.DROPPED}', detail = 'by ingest.corrections' WHERE key = ?"  # noqa: S608 - constant
    inventory.insert(dropped, ((each.key,) for each in by_action["drop"]))
    for action, column in (("relabel", "label"), ("group", "photo_group")):
        statement = f"UPDATE input SET {column} = ? WHERE key = ?"  # noqa: S608 - constants
        inventory.insert(statement, ((each.value, each.key) for each in by_action[action]))
    grouping.check_groups(inventory, "ingest.corrections")
    counts = [f"{count_text(len(found), 'photo')} to {name}" for name, found in by_action.items() if found]
    log.info("ingest: corrections of %s: %s", source, ", ".join(counts) or "none")


def read_corrections(source: str) -> Iterator[Correction]:
    """Yield the corrections of a table, but not those that keep a photo as it is. Raise UserError if it is wrong."""
    try:
        with storage.open_stream(source) as stream:
            reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"`ingest.corrections`: {source} has no column `{missing[0]}`. Take an audit.csv.")
            for row in reader:
                place = f"{source}, line {reader.line_num}"
                name, _, value = (row["action"] or "keep").strip().partition(":")
                if name not in ("keep", "drop", "relabel", "group") or bool(value) != (name in ("relabel", "group")):
                    raise UserError(f"{place}: `action` is {row['action']!r}, but must be {ACTIONS}.")
                if name != "keep":
                    yield Correction(row["key"], name, value.strip(), place)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`ingest.corrections`: {source} cannot be read ({error}). Correct the path.") from error


def _check_contradictions(corrections: list[Correction]) -> None:
    """Raise UserError if a photo is to have two labels or groups, or is dropped and corrected."""
    first: dict[tuple[str, str], Correction] = {}
    dropped = {each.key: each for each in corrections if each.action == "drop"}
    for each in corrections:
        other = first.setdefault((each.key, each.action), each)
        if each.action != "drop" and each.key in dropped:
            other = dropped[each.key]
        if (other.action, other.value) != (each.action, each.value):
            raise UserError(
                f"{each.place}: {each.key!r} has the action {_text(each)}, but also {_text(other)} ({other.place}). "
                "Leave one of them."
            )


def _text(correction: Correction) -> str:
    return f"{correction.action}:{correction.value}" if correction.value else correction.action
