"""Inventory of a job: its inputs, their labels, and the rows already written.

An SQLite database in a temporary file, so that memory does not grow with the number of photos. SQLite sorts in
temporary files too.
"""

import hashlib
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pyarrow as pa

from carclass.data.formats import json_text
from carclass.errors import UserError

T = TypeVar("T")
INPUT = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("subset", pa.string()),
        ("size", pa.int64()),  # bytes
        ("fingerprint", pa.string()),  # see `Listed`
        ("position", pa.int64()),  # see `Listed`
    ]
)
WRITTEN = ("key", "image_id", "label", "split", "reason", "fingerprint")
"""Columns of a written row that the inventory records, as far as its file has them."""
CACHE_KB = 16_000
"""SQLite's page cache in memory."""
FINGERPRINT_DIGITS = 16
"""Hex digits of a fingerprint: compared only with those of the same key."""
FETCH_ROWS = 1000
DISK_ERRORS = ("SQLITE_FULL", "SQLITE_IOERR")
"""First parts of the names of SQLite's errors of a disk."""
PRAGMAS = ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KB}")
"""The database is deleted with the job, so it needs no protection against crashes."""
TABLES = """
CREATE TABLE input (
id INTEGER PRIMARY KEY, key TEXT, label TEXT, subset TEXT, size INTEGER, fingerprint TEXT, reason TEXT, detail TEXT,
position INTEGER, recorded TEXT, photo_group TEXT);
CREATE TABLE labels (id INTEGER PRIMARY KEY, name TEXT, label TEXT, subset TEXT, photo_group TEXT);
CREATE TABLE held_out (split TEXT);
CREATE TABLE part (id INTEGER PRIMARY KEY, path TEXT UNIQUE, content TEXT, removed INTEGER);
CREATE TABLE written (key TEXT, image BLOB, label TEXT, split TEXT, reason TEXT, fingerprint TEXT, quarantined INTEGER,
part INTEGER);
CREATE TABLE staged AS SELECT * FROM written;
"""
"""input: all keys, with a reason for those that cannot become a row. labels: labels as read. held_out: splits that
train photos may be in. part: files with the hash of their content. written: rows of these files. staged: rows that are
not in `written` and its index yet. photo_group: photos with the same one share a split.
fingerprint: see `Listed`. recorded: fingerprint under which the same content is written. image: image_id in bytes."""
INDICES = """
CREATE INDEX IF NOT EXISTS input_key ON input (key);
CREATE INDEX IF NOT EXISTS written_key ON written (key);
"""
"""Created on the first query: building an index once is much faster than updating it at every insert."""
PENDING = "FROM input WHERE reason IS NULL AND NOT EXISTS (SELECT 1 FROM written WHERE written.key = input.key)"


class Listed(NamedTuple):
    """A file found at the source."""

    key: str
    size: int = 0  # bytes
    version: str = ""  # changes with the content: the ETag of an object, the times of a file
    reason: str | None = None  # quarantine.Reason of a file that is not read at all
    detail: str | None = None
    position: int | None = None  # index in its archive of the member that holds the bytes

    @property
    def fingerprint(self) -> str:
        """Return a short hash of size and version, by which a replaced file is recognized."""
        return hashlib.sha256(f"{self.size}:{self.version}".encode()).hexdigest()[:FINGERPRINT_DIGITS]


class Inventory:
    """Inputs, labels and written rows of one job, used by one thread. Every method raises UserError on a full disk."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="inventory-")
        self._db = sqlite3.connect(Path(self._folder.name, "inventory"), isolation_level=None)
        self._db.create_function("hash_order", 1, lambda key: zlib.crc32(key.encode()), deterministic=True)
        self.execute(*(f"PRAGMA {pragma}" for pragma in PRAGMAS), *TABLES.strip().split(";\n"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def add_function(self, name: str, function: Callable[[str], str | bool | None]) -> None:
        """Make a function of one string available to statements."""
        self._db.create_function(name, 1, function, deterministic=True)

    def execute(self, *statements: str) -> None:
        """Execute statements that return no rows."""
        for statement in statements:
            with self._disk_errors():
                self._db.execute(statement)

    def query(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query, fetched in chunks."""
        self.execute(*INDICES.strip().splitlines())
        with self._disk_errors():
            cursor = self._db.execute(query, values)
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield from rows

    def scalar(self, query: str) -> Any:
        """Return the first value of a query's first row, or None without rows."""
        return next(self.query(query), (None,))[0]

    def insert(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Execute a statement once per row, in one transaction."""
        self.execute("BEGIN")
        with self._disk_errors():
            self._db.executemany(statement, rows)
        self.execute("COMMIT")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Report a full disk with a remedy."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(DISK_ERRORS):
                raise
            raise UserError(
                f"no space left in {Path(self._folder.name).parent} ({error}) for the inventory of photos, which takes "
                "300 bytes per photo, and as much again for sorting. Free space, or set TMPDIR to a folder on a larger "
                "or sound disk."
            ) from error

    # Inputs

    def add_inputs(self, files: Iterable[Listed]) -> None:
        """Add files in the order of their source."""
        rows = ((f.key, f.size, f.fingerprint, f.reason, f.detail, f.position) for f in files)
        columns = "key, size, fingerprint, reason, detail, position"
        self.insert(f"INSERT INTO input ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)  # noqa: S608 - constant

    def add_numbered_inputs(self, rows: Iterable[tuple[int, str, str, str, str]]) -> None:
        """Add inputs with unique numbers chosen by the caller, as (number, key, fingerprint, label, subset)."""
        self.insert("INSERT INTO input (id, key, fingerprint, label, subset) VALUES (?, ?, ?, ?, ?)", rows)

    def add_labels(self, labels: Iterable[tuple[str, str, str, str | None]]) -> None:
        """Add labels in the order of their source, as (name of the photo, class, subset, group)."""
        self.insert("INSERT INTO labels (name, label, subset, photo_group) VALUES (?, ?, ?, ?)", labels)

    def set_held_out(self, splits: Iterable[str]) -> None:
        """Record the splits into which photos of the train subset may be put."""
        self.insert("INSERT INTO held_out VALUES (?)", ((split,) for split in splits))

    def duplicate_input(self) -> str | None:
        """Return a key that was added more than once, or None."""
        key: str | None = self.scalar("SELECT key FROM input GROUP BY key HAVING count(*) > 1 LIMIT 1")
        return key

    def keys(self) -> Iterator[str]:
        """Yield the keys of all inputs without a reason for quarantine, sorted."""
        return (key for (key,) in self.query("SELECT key FROM input WHERE reason IS NULL ORDER BY key"))

    def digest(self) -> str:
        """Return the sha256 of all inputs: their keys, fingerprints, labels, subsets and reasons, sorted by key.

        Groups count too, if there are any.
        """
        digest = hashlib.sha256()
        columns = "key, coalesce(recorded, fingerprint), label, subset, reason"
        if self.scalar("SELECT 1 FROM input WHERE photo_group NOT NULL") is not None:
            columns += ", photo_group"
        for row in self.query(f"SELECT {columns} FROM input ORDER BY key"):  # noqa: S608 - constant
            digest.update(f"{json_text(row)}\n".encode())
        return digest.hexdigest()

    def classes(self) -> list[str]:
        """Return the labels of the photos, sorted."""
        query = "SELECT DISTINCT label FROM input WHERE label NOT NULL ORDER BY label"
        return [label for (label,) in self.query(query)]

    def count_inputs(self) -> int:
        """Return the number of input keys."""
        return int(self.scalar("SELECT count(*) FROM input"))

    # Pending inputs

    def count_pending(self) -> int:
        """Return the number of photos that are not written yet."""
        return int(self.scalar(f"SELECT count(*) {PENDING}"))

    def pending(self, batch_rows: int, *, hash_order: bool = True) -> Iterator[pa.Table]:
        """Yield photos that are not written yet as tables of INPUT with batch_rows rows each.

        Photos come in the order of a hash of their keys, which spreads concurrent reads over all prefixes: S3 limits
        the request rate of a prefix. With hash_order=False they come in the order of their source.
        """
        order = "hash_order(key), key" if hash_order else "id"
        return self.inputs(f"{PENDING} ORDER BY {order}", batch_rows)

    def inputs(self, source: str, batch_rows: int) -> Iterator[pa.Table]:
        """Yield inputs as tables of INPUT with batch_rows rows each. source: the rest of a query, from FROM on."""
        names = ", ".join(f"input.{name}" for name in INPUT.names)
        for rows in chunks(self.query(f"SELECT {names} {source}"), batch_rows):
            columns = [
                pa.array(column, type_) for column, type_ in zip(zip(*rows, strict=True), INPUT.types, strict=True)
            ]
            yield pa.Table.from_arrays(columns, schema=INPUT)

    def pending_numbers(self) -> Iterator[int]:
        """Yield the numbers of photos that are not written yet, sorted."""
        return (number for (number,) in self.query(f"SELECT id {PENDING} ORDER BY id"))

    def number(self, key: str) -> int:
        """Return the number of an input."""
        return int(next(self.query("SELECT id FROM input WHERE key = ?", key))[0])

    def rejected_inputs(self) -> Iterator[tuple[str, str, str, str | None]]:
        """Yield (key, reason, detail, fingerprint) of inputs that cannot become a row and are not in quarantine yet."""
        written = "SELECT 1 FROM written WHERE written.key = input.key"
        rejected = f"FROM input WHERE reason NOT NULL AND NOT EXISTS ({written})"
        return self.query(f"SELECT key, reason, detail, fingerprint {rejected} ORDER BY reason, id")

    def keep_recorded(self, keys: Iterable[str]) -> None:
        """Give inputs, whose content is the written one, the fingerprint under which it is written, "" without one."""
        recorded = "SELECT coalesce(fingerprint, '') FROM written WHERE written.key = input.key"
        self.insert(f"UPDATE input SET recorded = ({recorded}) WHERE key = ?", ((key,) for key in keys))  # noqa: S608

    def forget_recorded(self) -> None:
        """Give inputs that were written again meanwhile their own fingerprints."""
        written = "SELECT fingerprint FROM written WHERE written.key = input.key"
        self.execute(f"UPDATE input SET recorded = NULL WHERE recorded NOT NULL AND recorded IS NOT ({written})")  # noqa: S608

    # Written rows

    def contents(self) -> dict[str, str]:
        """Return the recorded files, sorted by path, with the hash of their content."""
        return dict(self.query("SELECT path, content FROM part ORDER BY path"))

    def has_part(self, path: str) -> bool:
        """Return True if a file is recorded."""
        return next(self.query("SELECT 1 FROM part WHERE path = ?", path), None) is not None

    def add_part(self, path: str, rows: pa.Table, content: str) -> None:
        """Record a file, the hash of its content and its rows, columns of WRITTEN.

        The rows are staged: they count after the next `commit_parts`.
        """
        self.insert("INSERT INTO part (path, content) VALUES (?, ?)", [(path, content)])
        available = {name: rows[name].to_pylist() for name in rows.column_names}
        columns = [available.get(name, [None] * len(rows)) for name in WRITTEN]
        columns[1] = [image_id and bytes.fromhex(image_id) for image_id in columns[1]]  # half the space of text
        quarantined = [path.startswith("quarantine/")] * len(rows)
        statement = "INSERT INTO staged VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT max(id) FROM part))"
        self.insert(statement, zip(*columns, quarantined, strict=True))

    def commit_parts(self, removed: Collection[str]) -> None:
        """Count the staged rows, and drop the rows of removed files. removed: paths."""
        if not removed and self.scalar("SELECT 1 FROM staged") is None:
            return
        self.execute("DROP INDEX IF EXISTS written_key", "DROP INDEX IF EXISTS written_image")
        self.execute("INSERT INTO written SELECT * FROM staged", "DELETE FROM staged")
        self.insert("UPDATE part SET removed = 1 WHERE path = ?", ((path,) for path in removed))
        self.execute(
            "DELETE FROM written WHERE part IN (SELECT id FROM part WHERE removed)", "DELETE FROM part WHERE removed"
        )

    def withdrawn_rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each part that has rows which are in quarantine too, as (path, keys of these rows)."""
        query = """SELECT part.path, row.key FROM written AS other JOIN written AS row ON row.key = other.key
        JOIN part ON part.id = row.part WHERE other.quarantined AND NOT row.quarantined ORDER BY part.path"""
        for path, group in groupby(self.query(query), key=lambda row: row[0]):
            yield path, [key for _, key in group]

    def duplicate_parts(self) -> list[str]:
        """Return the files, in the order of their paths, that repeat a key of an earlier file not returned itself."""
        query = """SELECT part.path, key FROM written JOIN part ON part.id = part
        WHERE key IN (SELECT key FROM written GROUP BY key HAVING count(*) > 1) ORDER BY part.path"""
        kept_keys: set[str] = set()
        duplicates = []
        for path, group in groupby(self.query(query), key=lambda row: row[0]):
            keys = [key for _, key in group]
            if kept_keys.isdisjoint(keys):
                kept_keys.update(keys)
            else:
                duplicates.append(path)
        return duplicates

    def reasons(self) -> dict[str, int]:
        """Return the number of unusable photos by reason."""
        query = "SELECT reason, count(*) FROM written WHERE reason NOT NULL GROUP BY reason ORDER BY reason"
        return dict(self.query(query))

    def written_counts(self) -> dict[str, Any]:
        """Return the numbers of `rows` and `quarantined`, and those by split (`splits`) and reason (`reasons`)."""
        splits = self.query("SELECT split, count(*) FROM written WHERE NOT quarantined GROUP BY split ORDER BY split")
        by_split, by_reason = dict(splits), self.reasons()
        rows, quarantined = sum(by_split.values()), sum(by_reason.values())
        return {"rows": rows, "quarantined": quarantined, "splits": by_split, "reasons": by_reason}

    def class_counts(self, split: str) -> dict[str, int]:
        """Return the number of a split's rows by label."""
        query = "SELECT label, count(*) FROM written WHERE split = ? AND NOT quarantined GROUP BY label"
        return dict(self.query(query, split))

    def files_by_key(self) -> Iterator[tuple[str, str]]:
        """Yield each written key with the first of its files, in the order of keys."""
        return self.query("SELECT key, min(path) FROM written JOIN part ON part.id = part GROUP BY key ORDER BY key")

    # Consistency checks, which return the first few offending keys

    def missing_keys(self) -> list[str]:
        """Return inputs that are not written."""
        missing = "NOT EXISTS (SELECT 1 FROM written WHERE written.key = input.key)"
        return [key for (key,) in self.query(f"SELECT key FROM input WHERE {missing} LIMIT 5")]  # noqa: S608 - constant

    def unexpected_keys(self) -> list[str]:
        """Return written keys that are not inputs or are written more than once."""
        query = (
            "SELECT key FROM written GROUP BY key HAVING count(*) > 1 "
            "OR NOT EXISTS (SELECT 1 FROM input WHERE input.key = written.key) LIMIT 5"
        )
        return [key for (key,) in self.query(query)]


def chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of the given size, the last one shorter."""
    while chunk := list(islice(items, size)):
        yield chunk
