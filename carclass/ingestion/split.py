"""Splits that a source leaves open: test and val photos are held out from train, class by class.

The share of each class is exact to one photo, and one stays in train. Photos with the same bytes, and those of one
group (`ingest.group`), stay together, and a photo of a published version keeps its split: only new ones are assigned,
in the order of a hash of seed and content, until their classes have their shares.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby

from carclass import storage
from carclass.config.effects import is_chosen
from carclass.config.schema import IngestSettings
from carclass.data import publishing
from carclass.data.changes import Correction
from carclass.data.dataset import Dataset
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.errors import UserError

log = logging.getLogger(__name__)
OPEN_SPLITS = ("test", "val")
"""Splits that may be held out, in the order in which they are: val is a share of what test leaves."""
MIN_VAL_PHOTOS = 10
"""Photos of a class: with fewer, one photo moves its accuracy by more than 10 points."""
MEMBERS = """
CREATE TABLE member AS
SELECT written.key, written.image, written.label, photo_group, hex(written.image) AS unit
FROM written JOIN input ON input.key = written.key WHERE NOT quarantined AND input.subset = 'train';
CREATE INDEX member_key ON member (key);
CREATE INDEX member_image ON member (image)
"""
"""Train photos of the source. unit: photos that share a split."""
JOIN_GROUPS = (
    "UPDATE member SET unit = photo_group WHERE photo_group NOT NULL",
    "CREATE INDEX member_group ON member (photo_group)",
)
LINKED = """SELECT count(*) FROM member JOIN (
SELECT {column} AS shared, min(unit) AS first FROM member WHERE {column} NOT NULL GROUP BY {column}
HAVING min(unit) != max(unit)) ON shared = {column} AND unit != first"""
LINK = """UPDATE member SET unit = (SELECT min(unit) FROM member AS other WHERE other.{column} = member.{column})
WHERE {column} NOT NULL"""
UNITS = """
CREATE TABLE unit AS SELECT unit AS name, min(earlier.split) AS split, split_order(unit) AS place
FROM member LEFT JOIN earlier ON earlier.image = member.image GROUP BY unit;
CREATE UNIQUE INDEX unit_name ON unit (name)
"""
COUNTS = "SELECT label, count(*) FROM member JOIN unit ON name = unit WHERE {condition} GROUP BY label"
BASES = {"test": "TRUE", "val": "split IS NOT 'test'"}
"""Photos of which a split is a share."""
FREE = """SELECT name, label, count(*) FROM unit JOIN member ON unit = name WHERE split IS NULL
GROUP BY name, label ORDER BY place {order}, name"""
MISPLACED = """SELECT part.path, member.key, member.label, coalesce(unit.split, 'train') AS split FROM member
JOIN unit ON name = member.unit JOIN written ON written.key = member.key JOIN part ON part.id = written.part
WHERE NOT quarantined AND written.split != coalesce(unit.split, 'train') ORDER BY part.path"""
TABLES = ("earlier", "member", "unit", "chosen")


def find_shares(inventory: Inventory, settings: IngestSettings) -> dict[str, float]:
    """Return the splits to hold out from train, with their shares: those of which the source has no photo.

    Raise UserError if a share is set for a split that the source has itself.
    """
    subsets = {subset for (subset,) in inventory.query("SELECT DISTINCT subset FROM input WHERE subset NOT NULL")}
    shares = {"test": settings.test_fraction, "val": settings.val_fraction}
    source = settings.labels or settings.photos
    for split in OPEN_SPLITS:
        if split in subsets and shares[split] and is_chosen(settings, f"{split}_fraction"):
            raise UserError(
                f"`ingest.{split}_fraction` is {shares[split]:g} and has no effect: {source} has photos of the subset "
                f"{split}, which are kept as they are. Leave it out."
            )
    shares = {split: shares[split] for split in OPEN_SPLITS if split not in subsets and shares[split]}
    if "test" in shares:
        log.warning(
            "ingest: %s has no test subset: %s of each class's photos are held out for test (`ingest.test_fraction`)",
            source,
            f"{shares['test']:.0%}",
        )
    if "val" in subsets:
        log.info("ingest: the val subset of %s is kept as it is, and no other photo is held out for val", source)
    inventory.set_held_out(shares)
    return shares


def check_shares(published: Dataset | None, shares: Mapping[str, float]) -> None:
    """Raise UserError if a published version has other splits of its own source than the source has now."""
    if published is None or published.held_out == shares:
        return
    kept = "; to keep it without test photos, set `ingest.test_fraction: 0`" if "test" not in published.held_out else ""
    raise UserError(
        f"{published.uri} was made with {_describe(published.held_out)} held out from train, and would now have "
        f"{_describe(shares)}. Photos of a dataset never change their splits: choose another name"
        f"{kept if 'test' in shares else ''}."
    )


def _describe(shares: Mapping[str, float]) -> str:
    return " and ".join(f"{share:.0%} {split}" for split, share in shares.items()) or "nothing"


def hold_out(draft: Draft, shares: Mapping[str, float], seed: int) -> None:
    """Write the photos that are held out from train into their splits; those of a published version keep theirs."""
    inventory = draft.inventory
    inventory.execute(*(f"DROP TABLE IF EXISTS {name}" for name in TABLES))
    inventory.execute("CREATE TABLE earlier (image BLOB, split TEXT)")
    inventory.insert("INSERT INTO earlier VALUES (?, ?)", _earlier_splits(draft.published, shares))
    inventory.execute("CREATE INDEX earlier_image ON earlier (image)", *MEMBERS.split(";"))
    _join_groups(inventory)
    inventory.add_function("split_order", lambda unit: storage.sha256(f"{seed}:{unit.lower()}".encode())[:12])
    inventory.execute(*UNITS.split(";"))
    for split, share in shares.items():
        _assign(inventory, split, share)
    draft.correct(_corrections(inventory))


def _earlier_splits(published: Dataset | None, shares: Mapping[str, float]) -> Iterator[tuple[bytes, str]]:
    """Yield the hash of the content and the split of the published photos that may be assigned."""
    if published is None:
        return
    paths = sorted({*published.manifest["parts"]}.intersection(publishing.list_parts(published.uri)))
    for rows in storage.in_parallel(partial(publishing.read_written_columns, published.uri), paths):
        if rows is not None:  # damaged, and made again
            for image_id, split in zip(rows["image_id"].to_pylist(), rows["split"].to_pylist(), strict=True):
                if split == "train" or split in shares:
                    yield bytes.fromhex(image_id), split


def _join_groups(inventory: Inventory) -> None:
    """Give the photos of a group, and groups with a photo of the same bytes, one unit."""
    if inventory.scalar("SELECT 1 FROM member WHERE photo_group NOT NULL") is None:
        return
    inventory.execute(*JOIN_GROUPS)
    columns = ("image", "photo_group")
    while any(inventory.scalar(LINKED.format(column=column)) for column in columns):
        inventory.execute(*(LINK.format(column=column) for column in columns))


def _assign(inventory: Inventory, split: str, share: float) -> None:
    """Give units without a split this one, until each class has its share."""
    numbers = dict(inventory.query(COUNTS.format(condition=BASES[split])))
    taken = dict(inventory.query(COUNTS.format(condition="split = ?"), split))
    quotas = {label: _quota(share, number) - taken.get(label, 0) for label, number in numbers.items()}
    order = "DESC" if split == "test" else "ASC"
    inventory.execute("DROP TABLE IF EXISTS chosen", "CREATE TABLE chosen (name TEXT PRIMARY KEY)")
    for is_last in (False, True):
        units = _free_units(inventory, order)
        inventory.insert("INSERT INTO chosen VALUES (?)", ((name,) for name in choose_units(units, quotas, is_last)))
        inventory.execute(f"UPDATE unit SET split = '{split}' WHERE name IN (SELECT name FROM chosen)")  # noqa: S608


def _quota(share: float, number: int) -> int:
    """Return the photos to hold out from a number of photos, of which one stays."""
    return min(int(share * number + 0.5), max(number - 1, 0))


def count_held_out(number: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return the photos by split of a class with `number` train photos of the source, as `hold_out` assigns them."""
    counts = dict[str, int]()
    for split, share in shares.items():
        counts[split] = _quota(share, number - sum(counts.values()))
    return {"train": number - sum(counts.values()), **counts}


def _free_units(inventory: Inventory, order: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield units without a split with their number of photos by class."""
    for name, rows in groupby(inventory.query(FREE.format(order=order)), key=lambda row: row[0]):
        yield name, {label: number for _, label, number in rows}


def choose_units(
    units: Iterable[tuple[str, Mapping[str, int]]], quotas: dict[str, int], is_last: bool
) -> Iterator[str]:
    """Yield units in their order that fit into the quotas, which are lowered.

    units: (name, number of photos by class). quotas: class → photos that are missing. is_last: also yield those that
    exceed a quota by less than what is missing, which large groups leave.
    """
    for name, counts in units:
        missing = {label: quotas.get(label, 0) for label in counts}
        limits = {label: 2 * number - 1 if is_last else number for label, number in missing.items()}
        if all(number <= limits[label] for label, number in counts.items()):
            quotas.update({label: missing[label] - number for label, number in counts.items()})
            yield name


def _corrections(inventory: Inventory) -> Iterator[Correction]:
    """Yield the files with photos in another split than the assigned one."""
    for path, rows in groupby(inventory.query(MISPLACED), key=lambda row: row[0]):
        yield Correction(path, frozenset(), {key: (label, split) for _, key, label, split in rows})
