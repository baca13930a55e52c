"""Files of datasets: idempotent parts with the hash of their content, and the manifest that publishes them."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carclass import storage
from carclass.data import formats
from carclass.data.dataset import CONTENT_KEY, MASKED_ROW, QUARANTINE, ROW, Dataset, open_part, read_part, to_json
from carclass.data.formats import json_text
from carclass.data.inventory import WRITTEN
from carclass.errors import UserError

MANIFEST = "manifest.json"
PART_PATH = re.compile(r"(parts|quarantine)/[0-9a-f]{24}\.parquet")
SETTINGS_KEY, FINGERPRINTS_KEY = b"carclass.settings", b"carclass.fingerprints"
FINGERPRINT = pa.field("fingerprint", pa.string())
PART_BYTES = 32 * 2**20
"""Bytes of encoded photos after which a part ends: photos that are not shrunk would fill the memory."""
ROW_GROUP_BYTES, _MIN_GROUP_ROWS = 8 * 2**20, 16
"""Bytes and least rows of photos that are read together: to read any column takes a request per group."""
_HASHED_ROWS = 16
"""Rows in memory as Python's objects while their hashes are computed."""


class WrittenPart(NamedTuple):
    """A written file as the inventory records it."""

    path: str  # below the dataset's URI
    rows: pa.Table  # columns of inventory.WRITTEN, as far as the file has them
    content: str  # see `content_digest`


RECORDS = pa.schema([(name, pa.string()) for name in ("path", "content", *WRITTEN)])
"""WrittenPart as a table, with a row for each of its rows, which tasks return so that no file is read again."""


def to_records(part: WrittenPart) -> pa.Table:
    """Return a written file as rows of RECORDS."""
    size = len(part.rows)
    columns = {name: part.rows[name].cast(pa.string()) for name in part.rows.column_names}
    for name, value in (("path", part.path), ("content", part.content)):
        columns[name] = pa.array([value] * size, pa.string())
    return pa.table([columns.get(name, pa.nulls(size, pa.string())) for name in RECORDS.names], schema=RECORDS)


def from_records(records: pa.Table) -> Iterator[WrittenPart]:
    """Yield the written files of rows with the columns of RECORDS."""
    for path in records["path"].unique().to_pylist():
        rows = records.filter(pc.equal(records["path"], path))
        yield WrittenPart(path, rows.select(WRITTEN), rows["content"][0].as_py())


def write_rows(uri: str, folder: str, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> WrittenPart:
    """Write rows of dataset.ROW or QUARANTINE, each with its `fingerprint`, as `write_part` does."""
    schema = ROW if folder == "parts" else QUARANTINE
    return write_part(uri, folder, pa.Table.from_pylist(rows, schema.append(FINGERPRINT)), settings)


def split_by_bytes(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists that end after PART_BYTES of images."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.get("image") or b"")
        if size >= PART_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_part(uri: str, folder: str, rows: pa.Table, settings: dict[str, Any]) -> WrittenPart:
    """Write rows as one Parquet file, unless it exists.

    A column `fingerprint` (see inventory.Listed) is stored in the file's metadata. The name is a hash of settings,
    keys, fingerprints, labels and splits: if Ray repeats a task whose result was lost with a node, the file that the
    task wrote is kept.
    """
    digest = storage.sha256(to_json(settings))
    names = [name for name in ("key", "label", "split", "reason", "fingerprint") if name in rows.schema.names]
    name = storage.sha256(digest.encode(), to_json(rows.select(names).to_pylist()))[:24]
    recorded = rows.select([name for name in WRITTEN if name in rows.schema.names])
    part = WrittenPart(f"{folder}/{name}.parquet", recorded, content_digest(rows))
    if storage.exists(storage.join(uri, part.path)):
        return part
    metadata = {SETTINGS_KEY: digest.encode(), CONTENT_KEY: part.content.encode()}
    if "fingerprint" in names:
        metadata[FINGERPRINTS_KEY] = json_text(rows["fingerprint"].to_pylist()).encode()
        rows = rows.drop(["fingerprint"])
    sink = pa.BufferOutputStream()
    table = rows.cast(rows.schema.with_metadata(metadata))
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
    pq.write_table(table, sink, row_group_size=_row_group_rows(table), **options)
    storage.write_bytes(storage.join(uri, part.path), memoryview(sink.getvalue()))
    pa.default_memory_pool().release_unused()
    return part


def _row_group_rows(rows: pa.Table) -> int:
    """Return the number of rows whose photos, or other bytes, have about ROW_GROUP_BYTES."""
    size = sum(rows[field.name].nbytes for field in rows.schema if pa.types.is_binary(field.type))
    return max(_MIN_GROUP_ROWS, ROW_GROUP_BYTES * len(rows) // max(1, size))


def content_digest(rows: pa.Table) -> str:
    """Return the sum of the sha256 of all rows, in hex, which depends neither on their order nor on their files."""
    columns = rows.drop(["fingerprint"]) if "fingerprint" in rows.schema.names else rows
    total = sum(_row_hash(row) for batch in columns.to_batches(_HASHED_ROWS) for row in batch.to_pylist())
    return f"{total % 2**256:064x}"


def _row_hash(row: Mapping[str, Any]) -> int:
    values = {name: storage.sha256(value) if isinstance(value, bytes) else value for name, value in row.items()}
    return int(storage.sha256(to_json(values)), 16)


def list_parts(uri: str) -> list[str]:
    """Return the paths of all files in parts/ and quarantine/ that are named as a part, sorted."""
    return [path for path in storage.list_files(uri) if PART_PATH.fullmatch(path)]


def read_written_columns(uri: str, path: str) -> pa.Table | None:
    """Read the columns of a part that the inventory records, with its metadata; None if the file is damaged."""
    try:
        with storage.open_file(storage.join(uri, path)) as opened, open_part(opened) as file:
            rows = file.read(columns=[name for name in WRITTEN if name in file.schema_arrow.names])
    except (FileNotFoundError, storage.ArchivedObjectError):
        raise
    except (pa.ArrowInvalid, OSError):  # no bytes, a missing end, or a wrong checksum
        return None
    return add_fingerprints(rows)


def add_fingerprints(rows: pa.Table) -> pa.Table:
    """Return the rows of a part with the column `fingerprint` from its metadata, null without."""
    stored = (rows.schema.metadata or {}).get(FINGERPRINTS_KEY)
    fingerprints = [None] * len(rows) if stored is None else json.loads(stored)
    return rows.append_column("fingerprint", pa.array(fingerprints, pa.string()))


def read_written(uri: str, folder: str, columns: Sequence[str], paths: Sequence[str] | None = None) -> pa.Table:
    """Read columns of files in parts/ or quarantine/ (default: all of them), with each row's file as `part`."""
    schema = MASKED_ROW if folder == "parts" else QUARANTINE
    tables = [pa.schema([*(schema.field(name) for name in columns), ("part", pa.string())]).empty_table()]
    paths = [path for path in (list_parts(uri) if paths is None else paths) if path.startswith(f"{folder}/")]
    read = partial(read_part, columns=columns)
    for path, table in zip(paths, storage.in_parallel(read, [storage.join(uri, path) for path in paths]), strict=True):
        tables.append(table.append_column("part", pa.array([path] * len(table), pa.string())))
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])


def publish_manifest(complete: Dataset, replaced: Dataset | None = None) -> Dataset:
    """Publish a complete dataset by writing its manifest, on condition that the published version is `replaced`.

    Raise UserError if it is not: a job that was paused beyond its lease publishes nothing.
    """
    uri, content = storage.join(complete.uri, MANIFEST), to_json(complete.manifest)
    if replaced is None:
        written = storage.create(uri, content)
    else:
        check_manifest(complete.uri, replaced)
        version = storage.stat(uri).version
        check_manifest(complete.uri, replaced)  # again, as the first one may have read another version
        written = storage.replace(uri, content, version)
    if not written:
        raise _published_meanwhile(complete.uri)
    return complete


def check_manifest(uri: str, expected: Dataset | None) -> None:
    """Raise UserError if the published version of a dataset is not the expected one."""
    try:
        published = formats.read(storage.join(uri, MANIFEST), "manifest")
    except FileNotFoundError:
        published = None
    if published != (None if expected is None else expected.manifest):
        raise _published_meanwhile(uri)


def _published_meanwhile(uri: str) -> UserError:
    return UserError(
        f"{uri} was published or deleted by another job while this one was writing it. This one publishes and deletes "
        "nothing more: run the same command again to see what has changed, or choose another name."
    )
