"""Writing a dataset: idempotent parts, the inventory of what is written, and the manifest that publishes it."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carclass import storage
from carclass.data.dataset import MASKED_ROW, QUARANTINE, SPLITS, Dataset, read_part, to_json
from carclass.data.inventory import WRITTEN, Inventory
from carclass.progress import Progress

_SETTINGS_KEY = b"carclass.settings"
_GROUP_ROWS = 16
"""Rows that a part lets be read by themselves: a megabyte or two of photos."""


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
    digest = storage.sha256(to_json(settings))
    name = storage.sha256("\n".join([digest, *rows["key"].to_pylist()]).encode())[:24]
    path = f"{folder}/{name}.parquet"
    if storage.exists(storage.join(uri, path)):
        return path
    schema = rows.schema.with_metadata({_SETTINGS_KEY: digest.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows.cast(schema), sink, compression="zstd", compression_level=1, row_group_size=_GROUP_ROWS)
    storage.write_bytes(storage.join(uri, path), sink.getvalue().to_pybytes())
    return path


def sync_inventory(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Enters in the inventory what lies in parts/ and quarantine/; what jobs with other settings left is removed."""
    wanted = storage.sha256(to_json(settings)).encode()
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


def drop_repeated_parts(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Removes files that repeat a key of an earlier one; their other photos then count as not done.

    Two processes may have written the same photos in different batches: one that was thought dead, say.
    """
    for path in (repeating := inventory.repeating_parts()):
        storage.delete(storage.join(uri, path))
    if repeating:
        sync_inventory(uri, inventory, settings)


def read_written(uri: str, folder: str, columns: Sequence[str]) -> pa.Table:
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


def complete_dataset(
    uri: str, inventory: Inventory, *, settings: dict[str, Any], classes: Sequence[str], facts: dict[str, Any]
) -> Dataset:
    """A dataset that is complete but not published yet: checks that nothing is lost and makes its manifest.

    inventory: knows every key that came in; facts: what else the manifest should say. AssertionError when a key is
    missing, doubled or unknown: that is our mistake, and nothing may be published.
    """
    sync_inventory(uri, inventory, settings)
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
    return Dataset(uri, json.loads(to_json(manifest)))


def publish_manifest(complete: Dataset) -> Dataset:
    """Writes the manifest of a draft: from now on the dataset is there for others."""
    storage.write_bytes(storage.join(complete.uri, "manifest.json"), to_json(complete.manifest))
    return complete


def _parquet_files(uri: str) -> list[str]:
    return [path for path in storage.list_files(uri) if path.endswith(".parquet")]


def _read_written(uri: str, path: str) -> pa.Table:
    """What the inventory wants to know of a part's rows."""
    with storage.open_file(storage.join(uri, path)) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        return file.read(columns=[name for name in WRITTEN if name in file.schema_arrow.names])
