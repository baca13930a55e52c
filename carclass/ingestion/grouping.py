"""Groups of photos that share a split, as those of one vehicle do: a column of the labels, or a part of the key."""

import logging

from carclass import storage
from carclass.config.ingest_settings import IngestSettings, group_pattern
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import label_table

log = logging.getLogger(__name__)
MAX_LISTED = 5
"""Groups named in an error."""
UNGROUPED = """SELECT count(*) OVER (), key FROM input WHERE label NOT NULL AND coalesce(photo_group, '') = ''
ORDER BY id LIMIT 1"""
DIVIDED = """SELECT photo_group, group_concat(DISTINCT subset), count(*) OVER () FROM input
WHERE photo_group NOT NULL AND subset NOT NULL GROUP BY photo_group HAVING count(DISTINCT subset) > 1
ORDER BY photo_group LIMIT ?"""


def find_group_column(settings: IngestSettings) -> str | None:
    """Return the column of the labels that `ingest.group` names, or None if it is a pattern or not set.

    Raise UserError if it is neither, and OSError if the labels cannot be read.
    """
    if settings.group is None or settings.labels is None or not label_table.is_table(settings.labels):
        return None
    with storage.open_stream(settings.labels) as stream:
        columns = label_table.read_column_names(stream, source=settings.labels)
    if settings.group.lower() in map(str.lower, columns):
        return settings.group
    if group_pattern(settings.group) is None:
        raise UserError(
            f"`ingest.group` is {settings.group!r}, which is neither a column of {settings.labels} (its columns: "
            f"{', '.join(columns)}) nor a regular expression with one group in parentheses. Correct it."
        )
    return None


def group_photos(settings: IngestSettings, inventory: Inventory) -> None:
    """Give the labelled photos the groups that their keys have, if `ingest.group` is a pattern, and check all groups.

    Raise UserError if no photo has a group, or photos of one are in several subsets.
    """
    if settings.group is None:
        return
    if find_group_column(settings) is None:
        pattern = group_pattern(settings.group)
        assert pattern is not None
        inventory.add_function("group_of", lambda key: found[1] if (found := pattern.search(key)) else None)
        inventory.execute("UPDATE input SET photo_group = group_of(key) WHERE label NOT NULL")
    inventory.execute("UPDATE input SET photo_group = NULL WHERE photo_group = ''")
    number, example = next(inventory.query(UNGROUPED), (0, None))
    if inventory.scalar("SELECT 1 FROM input WHERE photo_group NOT NULL") is None:
        raise UserError(
            f"`ingest.group` is {settings.group!r}, but no photo has such a group, such as {example!r}. Correct it, or "
            "leave it out."
        )
    if number:
        log.warning("ingest: %s photos have no group and are each on their own, such as %r", f"{number:,}", example)
    check_groups(inventory, "ingest.group")


def check_groups(inventory: Inventory, setting: str) -> None:
    """Raise UserError if photos of a group are in several subsets. setting: origin of the groups."""
    if divided := list(inventory.query(DIVIDED, MAX_LISTED)):
        examples = ", ".join(f"{name!r} ({subsets.replace(',', ' and ')})" for name, subsets, _ in divided)
        raise UserError(
            f"`{setting}`: {divided[0][2]:,} groups have photos in several subsets: {examples}. Put all photos of a "
            "group into one subset."
        )
