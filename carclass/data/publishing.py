"""Writing of datasets: idempotent parts, an inventory of the written rows, and the manifest that publishes them."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carclass import storage
from carclass.data.dataset import MASKED_ROW, QUARANTINE, SPLITS, Dataset, read_part, to_json
from carclass.data.inventory import WRITTEN, Inventory
from carclass.progress import Progress

MAX_PASSES = 3
"""A second pass is needed only if a lost node caused photos to be written twice."""
_SETTINGS_KEY = b"carclass.settings"
_ROW_GROUP_ROWS = 16
"""Rows that are read together: one or two megabytes of photos."""


def write_part(uri: str, folder: str, rows: pa.Table, settings: dict[str, Any]) -> str:
    """Write rows as one Parquet file, unless it exists, and return its path below the dataset's URI.

    The name is a hash of settings and keys: if Ray repeats a task whose result was lost with a node, the file that
    the task wrote is kept.
    """
    digest = storage.sha256(to_json(settings))
    name = storage.sha256("\n".join([digest, *rows["key"].to_pylist()]).encode())[:24]
    path = f"{folder}/{name}.parquet"
    if storage.exists(storage.join(uri, path)):
        return path
    schema = rows.schema.with_metadata({_SETTINGS_KEY: digest.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows.cast(schema), sink, compression="zstd", compression_level=1, row_group_size=_ROW_GROUP_ROWS)
    storage.write_bytes(storage.join(uri, path), sink.getvalue().to_pybytes())
    return path


def write_missing(
    uri: str,
    inventory: Inventory,
    settings: dict[str, Any],
    write: Callable[[], None],
    finish_withdrawals: Callable[[], None] = lambda: None,
) -> None:
    """Call `write` until every input of the inventory is written once, at most MAX_PASSES times.

    finish_withdrawals: called before files with duplicate keys are deleted, as a withdrawn row has two files.
    """
    for _ in range(MAX_PASSES):
        sync_inventory(uri, inventory, settings)
        finish_withdrawals()
        drop_duplicate_parts(uri, inventory, settings)
        if not inventory.missing_keys():
            return
        write()


def sync_inventory(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Record the files in parts/ and quarantine/ in the inventory, and delete those of jobs with other settings."""
    expected_digest = storage.sha256(to_json(settings)).encode()
    existing, recorded = set(_parquet_files(uri)), set(inventory.part_paths())
    new = sorted(existing - recorded)
    progress = Progress("inventory", "parts", len(new))
    for path, rows in zip(new, storage.in_parallel(partial(_read_inventory_columns, uri), new), strict=True):
        if (rows.schema.metadata or {}).get(_SETTINGS_KEY) == expected_digest:
            inventory.add_part(path, rows)
        else:
            storage.delete(storage.join(uri, path))
        progress.add(1)
    inventory.commit_parts(removed=recorded - existing)


def drop_duplicate_parts(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Delete files that repeat a key of an earlier file; their other photos become pending again.

    Two processes may write the same photos in different batches, for example if one was wrongly considered dead.
    """
    for path in (duplicates := inventory.duplicate_parts()):
        storage.delete(storage.join(uri, path))
    if duplicates:
        sync_inventory(uri, inventory, settings)


def read_written(uri: str, folder: str, columns: Sequence[str]) -> pa.Table:
    """Read columns of all files in parts/ or quarantine/, with the path of each row's file as `part`."""
    schema = MASKED_ROW if folder == "parts" else QUARANTINE
    tables = [pa.schema([*(schema.field(name) for name in columns), ("part", pa.string())]).empty_table()]
    paths = [path for path in _parquet_files(uri) if path.startswith(f"{folder}/")]
    read = partial(read_part, columns=columns)
    for path, table in zip(paths, storage.in_parallel(read, [storage.join(uri, path) for path in paths]), strict=True):
        tables.append(table.append_column("part", pa.array([path] * len(table), pa.string())))
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def withdraw_rows(part: tuple[str, Sequence[str]], uri: str, settings: dict[str, Any]) -> None:
    """Remove rows, which quarantine has already, from a part. part: its path, and the keys of the rows.

    As quarantine is written first, a job that is killed in between finishes the withdrawal when it is resumed.
    """
    path, withdrawn_keys = part[0], set(part[1])
    rows = read_part(storage.join(uri, path))
    remaining = rows.filter(pa.array([key not in withdrawn_keys for key in rows["key"].to_pylist()]))
    if len(remaining):
        write_part(uri, "parts", remaining, settings)
    storage.delete(storage.join(uri, path))


def complete_dataset(
    uri: str, inventory: Inventory, *, settings: dict[str, Any], classes: Sequence[str], facts: dict[str, Any]
) -> Dataset:
    """Check that no input is lost, and return the complete dataset with its manifest, which is not written yet.

    facts: further fields of the manifest. Raise AssertionError, as it is a bug, if a key is missing, duplicate or
    unknown.
    """
    sync_inventory(uri, inventory, settings)
    assert inventory.duplicate_input() is None, f"{uri}: duplicate input {inventory.duplicate_input()}"
    num_inputs, counts = inventory.count_inputs(), inventory.written_counts()
    missing, unexpected = inventory.missing_keys(), inventory.unexpected_keys()
    assert not missing + unexpected, f"{uri}: {num_inputs} inputs, missing {missing}, unexpected {unexpected}"
    manifest = {
        "settings": settings,
        "inputs": num_inputs,
        **counts,
        "splits": {split: counts["splits"].get(split, 0) for split in SPLITS},
        "classes": list(classes),
        "parts": [path for path in inventory.part_paths() if path.startswith("parts/")],
        **facts,
    }
    return Dataset(uri, json.loads(to_json(manifest)))


def publish_manifest(complete: Dataset) -> Dataset:
    """Publish a complete dataset by writing its manifest."""
    storage.write_bytes(storage.join(complete.uri, "manifest.json"), to_json(complete.manifest))
    return complete


def _parquet_files(uri: str) -> list[str]:
    return [path for path in storage.list_files(uri) if path.endswith(".parquet")]


def _read_inventory_columns(uri: str, path: str) -> pa.Table:
    """Read the columns of a part that the inventory records."""
    with storage.open_file(storage.join(uri, path)) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        return file.read(columns=[name for name in WRITTEN if name in file.schema_arrow.names])
