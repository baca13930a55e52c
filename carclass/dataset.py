"""A dataset on storage: Parquet parts, quarantine, and a manifest that is written last.

<root>/datasets/<name>/parts/*.parquet       a row per photo
<root>/datasets/<name>/quarantine/*.parquet  a row per input that is no row, with its reason
<root>/datasets/<name>/manifest.json         settings, counts, parts: without it nothing is published

Nothing is lost: inputs = rows + quarantined, each key once, checked before the manifest is written. A job that
was killed finds its finished parts by their settings and does the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carclass import storage
from carclass.errors import UserError
from carclass.inventory import WRITTEN, Inventory
from carclass.progress import Progress

ROW = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the source photo's bytes
        ("key", pa.string()),  # where the photo was, relative to its source
        ("label", pa.string()),
        ("split", pa.string()),  # train, val or test
        ("width", pa.int32()),  # pixels of `image`
        ("height", pa.int32()),
        ("image", pa.binary()),  # encoded
    ]
)
DETECTION = pa.schema(
    [
        ("outcome", pa.string()),  # vehicle or no_vehicle
        ("vehicle_class", pa.string()),
        ("score", pa.float32()),
        ("num_vehicles", pa.int32()),
        ("several_vehicles", pa.bool_()),  # another one is at least half as large
        ("touches_border", pa.bool_()),
        ("area_fraction", pa.float32()),  # of the photo, covered by the mask (by the box where there is none)
        ("stability", pa.float32()),  # of the mask against its threshold, 0 to 1
        ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in the source dataset's pixels
        ("mask", pa.string()),  # COCO run lengths (compressed) over the source dataset's photo
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
    ]
)
MASKED_ROW = pa.schema([*ROW, *DETECTION])
QUARANTINE = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
    ]
)
SPLITS = ("train", "val", "test")
_SETTINGS_KEY = b"carclass.settings"
_GROUP_ROWS = 16
"""Rows that a part lets be read by themselves: a megabyte or two of photos."""


@dataclass(frozen=True)
class Dataset:
    """A published dataset."""

    uri: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name."""
        return self.uri.rsplit("/", 1)[1]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their indices."""
        return list(self.manifest["classes"])

    @property
    def part_uris(self) -> list[str]:
        """The Parquet files, in the order of the manifest."""
        return [storage.join(self.uri, part) for part in self.manifest["parts"]]

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest: what a run records of its data."""
        return storage.sha256(_dump(self.manifest))

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows, in the order of the parts."""
        if not self.part_uris:
            return pa.schema([MASKED_ROW.field(name) for name in columns]).empty_table()
        return pa.concat_tables(read_part(uri, columns) for uri in self.part_uris)

    def rows(self, keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows in the order of their keys given, each with its key and the columns; for few rows."""
        found: dict[str, dict[str, Any]] = {}
        for uri in self.part_uris if keys else []:
            there = read_part(uri, ["key"])["key"].to_pylist()
            wanted = [i for i, key in enumerate(there) if key in set(keys)]
            if wanted:  # else the part's photos need not be fetched
                found.update({row["key"]: row for row in take(uri, wanted, ["key", *columns]).to_pylist()})
        return [found[key] for key in keys]


def read_part(uri: str, columns: Sequence[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
    """Columns (all by default) of one Parquet file, or of those of its rows that a filter lets through."""
    names = None if columns is None else list(columns)
    with storage.open_file(uri) as file:
        table = pq.read_table(file, columns=names, filters=filters)
    return table if names is None else table.select(names)


def take(part_uri: str, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Some rows of a part by their positions in it, in the order given; little more than these is read."""
    with storage.open_file(part_uri) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        groups = (np.searchsorted(starts, positions, side="right") - 1).tolist()
        tables = {group: file.read_row_group(group, columns=list(columns)) for group in set(groups)}
    places = zip(groups, positions, strict=True)
    rows = pa.concat_tables(tables[group].slice(position - starts[group], 1) for group, position in places)
    return rows.select(columns).replace_schema_metadata()


def place(root: str, name: str) -> str:
    """Where a dataset lies."""
    return storage.join(root, "datasets", name)


def find(root: str, name: str) -> Dataset | None:
    """A published dataset, or None; UserError when the place can't be read."""
    uri = place(root, name)
    try:
        return Dataset(uri, json.loads(storage.read_bytes(storage.join(uri, "manifest.json"))))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"`root`: {uri} cannot be read ({error}). Check the place and your credentials.") from error


def load(root: str, name: str) -> Dataset:
    """A published dataset; UserError, naming those that are there, when it isn't."""
    if (found := find(root, name)) is not None:
        return found
    suffix = "/manifest.json"
    files = storage.list_files(storage.join(root, "datasets"))
    known = [path.removesuffix(suffix) for path in files if path.endswith(suffix)]
    there = f"Published there: {', '.join(known)}." if known else "None is published there yet: run jobs/ingest.py."
    raise UserError(f"no dataset `{name}` in {root}. {there}")


def find_same(root: str, name: str, settings: dict[str, Any]) -> Dataset | None:
    """The dataset if it was made with these settings; UserError if it was made with others."""
    found = find(root, name)
    if found is None or found.manifest["settings"] == json.loads(_dump(settings)):
        return found
    old = found.manifest["settings"]
    other = sorted(key for key in {*old, *settings} if old.get(key) != json.loads(_dump(settings)).get(key))
    raise UserError(
        f"dataset `{name}` in {root} was made with other settings ({', '.join(other)}). "
        f"A dataset never changes: give this one another name, or delete {found.uri}."
    )


def quarantine_row(
    key: str, reason: str, detail: str, image_id: str | None = None, attempts: int = 0
) -> dict[str, Any]:
    """A row of QUARANTINE."""
    return {"key": key, "image_id": image_id, "reason": str(reason), "detail": detail, "attempts": attempts}


def write_part(uri: str, folder: str, rows: pa.Table, settings: dict[str, Any]) -> str:
    """Writes rows as one Parquet file, named by settings and keys; what is there already is left as it is.

    Returns its path below the dataset's.

    Ray does work again whose result was lost with a node, though its file was not.
    """
    digest = storage.sha256(_dump(settings))
    name = storage.sha256("\n".join([digest, *rows["key"].to_pylist()]).encode())[:24]
    path = f"{folder}/{name}.parquet"
    if storage.exists(storage.join(uri, path)):
        return path
    schema = rows.schema.with_metadata({_SETTINGS_KEY: digest.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows.cast(schema), sink, compression="zstd", compression_level=1, row_group_size=_GROUP_ROWS)
    storage.write_bytes(storage.join(uri, path), sink.getvalue().to_pybytes())
    return path


def take_stock(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Enters in the inventory what lies in parts/ and quarantine/; what jobs with other settings left is removed."""
    wanted = storage.sha256(_dump(settings)).encode()
    there, known = set(_parquet_files(uri)), set(inventory.parts())
    new = sorted(there - known)
    progress = Progress("stock", len(new), "parts")
    for path, rows in zip(new, storage.in_parallel(partial(_read_written, uri), new), strict=True):
        if (rows.schema.metadata or {}).get(_SETTINGS_KEY) == wanted:
            inventory.add_part(path, rows)
        else:
            storage.delete(storage.join(uri, path))
        progress.add(1)
    inventory.settle(gone=known - there)


def drop_repeats(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Removes files that repeat a key of an earlier one; their other photos then count as not done.

    Two processes may have written the same photos in different batches: one that was thought dead, say.
    """
    for path in (repeating := inventory.repeating_parts()):
        storage.delete(storage.join(uri, path))
    if repeating:
        take_stock(uri, inventory, settings)


def written(uri: str, folder: str, columns: Sequence[str]) -> pa.Table:
    """Columns of what lies in parts/ or quarantine/, with the file each row is in as `part`."""
    schema = MASKED_ROW if folder == "parts" else QUARANTINE
    tables = [pa.schema([*(schema.field(name) for name in columns), ("part", pa.string())]).empty_table()]
    paths = [path for path in _parquet_files(uri) if path.startswith(f"{folder}/")]
    read = partial(read_part, columns=columns)
    for path, table in zip(paths, storage.in_parallel(read, [storage.join(uri, path) for path in paths]), strict=True):
        tables.append(table.append_column("part", pa.array([path] * len(table), pa.string())))
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def withdraw(part: tuple[str, Sequence[str]], uri: str, settings: dict[str, Any]) -> None:
    """Takes rows out of a part. part: its path, and the rows' keys.

    Quarantine is written first and decides: rows that it names leave the parts, so that a job killed in between
    finishes the move when it runs again.
    """
    path, leaving = part[0], set(part[1])
    rows = read_part(storage.join(uri, path))
    staying = rows.filter(pa.array([key not in leaving for key in rows["key"].to_pylist()]))
    if len(staying):
        write_part(uri, "parts", staying, settings)
    storage.delete(storage.join(uri, path))


def draft(
    uri: str, inventory: Inventory, *, settings: dict[str, Any], classes: Sequence[str], facts: dict[str, Any]
) -> Dataset:
    """A dataset that is complete but not published yet: checks that nothing is lost and makes its manifest.

    inventory: knows every key that came in; facts: what else the manifest should say. AssertionError when a key is
    missing, doubled or unknown: that is our mistake, and nothing may be published.
    """
    take_stock(uri, inventory, settings)
    assert inventory.repeated_input() is None, f"{uri}: a key came in more than once"
    num_inputs, found = inventory.count_inputs(), inventory.count_written()
    lost, unexpected = inventory.lost(), inventory.unexpected()
    assert not lost + unexpected, f"{uri}: {num_inputs} inputs, lost {lost}, unexpected {unexpected}"
    manifest = {
        "settings": settings,
        "inputs": num_inputs,
        **found,
        "splits": {split: found["splits"].get(split, 0) for split in SPLITS},
        "classes": list(classes),
        "parts": [path for path in inventory.parts() if path.startswith("parts/")],
        **facts,
    }
    return Dataset(uri, json.loads(_dump(manifest)))


def publish(complete: Dataset) -> Dataset:
    """Writes the manifest of a draft: from now on the dataset is there for others."""
    storage.write_bytes(storage.join(complete.uri, "manifest.json"), _dump(complete.manifest))
    return complete


def _parquet_files(uri: str) -> list[str]:
    return [path for path in storage.list_files(uri) if path.endswith(".parquet")]


def _read_written(uri: str, path: str) -> pa.Table:
    """What the inventory wants to know of a part's rows."""
    with storage.open_file(storage.join(uri, path)) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        return file.read(columns=[name for name in WRITTEN if name in file.schema_arrow.names])


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()
