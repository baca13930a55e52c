"""A job's stock: what comes in, what labels say of it, what is written. On disk, so that memory is the same for all.

SQLite in a temporary file; what it sorts is sorted in temporary files too.
"""

import hashlib
import sqlite3
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa

from carclass.errors import UserError

T = TypeVar("T")
INPUT = pa.schema([("key", pa.string()), ("label", pa.string()), ("subset", pa.string())])
WRITTEN = ("key", "image_id", "label", "split", "reason")
"""What is entered of a written row, as far as its file has it."""
CACHE_KB = 16_000
"""Of the file, in memory."""
HASH_DIGITS = 32
"""Of a content's sha256: 128 bits tell photos apart as well as 256 do, in half the room."""
FETCH_ROWS = 1000
SETTINGS = ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KB}")
"""Nothing here outlives the job, so nothing has to survive its end."""
TABLES = """
CREATE TABLE input (id INTEGER PRIMARY KEY, key TEXT, back TEXT, label TEXT, subset TEXT, reason TEXT, detail TEXT);
CREATE TABLE said (id INTEGER PRIMARY KEY, name TEXT, back TEXT, label TEXT, subset TEXT);
CREATE TABLE part (id INTEGER PRIMARY KEY, path TEXT UNIQUE, gone INTEGER);
CREATE TABLE written (key TEXT, image TEXT, label TEXT, split TEXT, reason TEXT, quarantined INTEGER, part INTEGER);
CREATE TABLE arrived (key TEXT, image TEXT, label TEXT, split TEXT, reason TEXT, quarantined INTEGER, part INTEGER);
"""
"""input: all that comes in, with a reason where it can't become a row. said: labels as they come. back: a path read
from its end, so that paths with the same end lie side by side. written: the rows of the files in `part`; arrived: those
that aren't in its index yet."""
INDICES = """
CREATE INDEX IF NOT EXISTS input_key ON input (key);
CREATE INDEX IF NOT EXISTS written_key ON written (key);
"""
"""Made when something is asked: in one go, that takes a fraction of the time."""
UNWRITTEN = "FROM input WHERE reason IS NULL AND NOT EXISTS (SELECT 1 FROM written WHERE written.key = input.key)"
UNKNOWN = "NOT EXISTS (SELECT 1 FROM input WHERE input.key = written.key)"


class Inventory:
    """The stock of one job, kept by one thread."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="inventory-")
        self._db = sqlite3.connect(Path(self._folder.name, "inventory"), isolation_level=None)
        self._db.create_function("turn", 1, lambda key: zlib.crc32(key.encode()), deterministic=True)
        self.run(*(f"PRAGMA {setting}" for setting in SETTINGS), *TABLES.strip().splitlines())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self._folder.cleanup()

    def run(self, *statements: str) -> None:
        """Executes statements that change it; like all here, UserError when the disk is full."""
        for statement in statements:
            with self._on_disk():
                self._db.execute(statement)

    def ask(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Rows of the answer, fetched as they are wanted."""
        self.run(*INDICES.strip().splitlines())
        with self._on_disk():
            cursor = self._db.execute(query, values)
            while rows := cursor.fetchmany(FETCH_ROWS):
                yield from rows

    def one(self, query: str) -> Any:
        """The first value of the answer, None without any."""
        return next(self.ask(query), (None,))[0]

    def _insert(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self.run("BEGIN")
        with self._on_disk():
            self._db.executemany(statement, rows)
        self.run("COMMIT")

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """What is done there, with an error that helps when it is full."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_FULL":
                raise
            raise UserError(
                f"no space is left in {Path(self._folder.name).parent}, where a job keeps what it knows of its photos: "
                "300 bytes of each, and as much again for sorting. Free some, or let TMPDIR name a place with more."
            ) from error

    # What comes in

    def add_inputs(self, keys: Iterable[str]) -> None:
        """Enters keys in the order in which they lie at their source."""
        self._insert("INSERT INTO input (key, back) VALUES (?, ?)", ((key, backwards(key)) for key in keys))

    def add_rows(self, rows: Iterable[tuple[int, str]]) -> None:
        """Enters keys under numbers, all different, that the caller knows them by."""
        self._insert("INSERT INTO input (id, key) VALUES (?, ?)", rows)

    def add_labels(self, labels: Iterable[tuple[str, str, str]]) -> None:
        """Enters what labels say, in their order: names of photos, classes and subsets."""
        rows = ((name, backwards(name), label, subset) for name, label, subset in labels)
        self._insert("INSERT INTO said (name, back, label, subset) VALUES (?, ?, ?, ?)", rows)

    def repeated_input(self) -> str | None:
        """A key that came in more than once, if there is one."""
        found: str | None = self.one("SELECT key FROM input GROUP BY key HAVING count(*) > 1 LIMIT 1")
        return found

    def keys(self) -> Iterator[str]:
        """All that came in, sorted."""
        return (key for (key,) in self.ask("SELECT key FROM input ORDER BY key"))

    def digest(self) -> str:
        """sha256 of the sorted keys, each on a line."""
        found = hashlib.sha256()
        for number, key in enumerate(self.keys()):
            found.update((f"\n{key}" if number else key).encode())
        return found.hexdigest()

    def classes(self) -> list[str]:
        """The photos' labels, sorted."""
        return [label for (label,) in self.ask("SELECT DISTINCT label FROM input WHERE label NOT NULL ORDER BY label")]

    def count_inputs(self) -> int:
        """How many keys came in."""
        return int(self.one("SELECT count(*) FROM input"))

    # What is to do

    def count_todo(self) -> int:
        """Photos that aren't written."""
        return int(self.one(f"SELECT count(*) {UNWRITTEN}"))

    def todo(self, rows: int, *, spread: bool = True) -> Iterator[pa.Table]:
        """Photos that aren't written, as tables of SOURCE.

        In the order of their keys' hashes, so that what is read at a time is from everywhere: S3 limits the requests
        for each prefix. spread=False: in the order in which they came in.
        """
        found = self.ask(f"SELECT key, label, subset {UNWRITTEN} ORDER BY {'turn(key), key' if spread else 'id'}")
        for some in chunks(found, rows):
            columns = [pa.array(column, pa.string()) for column in zip(*some, strict=True)]
            yield pa.Table.from_arrays(columns, schema=INPUT)

    def todo_numbers(self) -> Iterator[int]:
        """The numbers of photos that aren't written, sorted."""
        return (number for (number,) in self.ask(f"SELECT id {UNWRITTEN} ORDER BY id"))

    def rejected(self) -> Iterator[tuple[str, str, str]]:
        """(key, reason, detail) of what came in, can't become a row, and isn't written."""
        written = "SELECT 1 FROM written WHERE written.key = input.key"
        rejected = f"FROM input WHERE reason NOT NULL AND NOT EXISTS ({written})"
        return self.ask(f"SELECT key, reason, detail {rejected} ORDER BY reason, id")

    # What is written

    def parts(self) -> list[str]:
        """The files whose rows are entered, sorted."""
        return [path for (path,) in self.ask("SELECT path FROM part ORDER BY path")]

    def add_part(self, path: str, rows: pa.Table) -> None:
        """Enters a file; its rows, columns of WRITTEN, count from the next `settle` on."""
        self._insert("INSERT INTO part (path) VALUES (?)", [(path,)])
        known = {name: rows[name].to_pylist() for name in rows.column_names}
        columns = [known.get(name, [None] * len(rows)) for name in WRITTEN]
        columns[1] = [image_id and image_id[:HASH_DIGITS] for image_id in columns[1]]
        quarantined = [path.startswith("quarantine/")] * len(rows)
        statement = "INSERT INTO arrived VALUES (?, ?, ?, ?, ?, ?, (SELECT max(id) FROM part))"
        self._insert(statement, zip(*columns, quarantined, strict=True))

    def settle(self, gone: Collection[str]) -> None:
        """Counts what has arrived, and strikes out files that are gone."""
        if not gone and self.one("SELECT 1 FROM arrived") is None:
            return
        self.run("DROP INDEX IF EXISTS written_key", "DROP INDEX IF EXISTS written_image")
        self.run("INSERT INTO written SELECT * FROM arrived", "DELETE FROM arrived")
        self._insert("UPDATE part SET gone = 1 WHERE path = ?", ((path,) for path in gone))
        self.run("DELETE FROM written WHERE part IN (SELECT id FROM part WHERE gone)", "DELETE FROM part WHERE gone")

    def withdrawn(self) -> Iterator[tuple[str, list[str]]]:
        """Parts with rows that quarantine names too: path, keys of these."""
        query = """SELECT part.path, row.key FROM written AS other JOIN written AS row ON row.key = other.key
        JOIN part ON part.id = row.part WHERE other.quarantined AND NOT row.quarantined ORDER BY part.path"""
        for path, group in groupby(self.ask(query), key=lambda pair: pair[0]):
            yield path, [key for _, key in group]

    def repeating_parts(self) -> list[str]:
        """Files that repeat a key of one that comes before them, and stays; files come in the order of their names."""
        query = """SELECT part.path, key FROM written JOIN part ON part.id = part
        WHERE key IN (SELECT key FROM written GROUP BY key HAVING count(*) > 1) ORDER BY part.path"""
        seen: set[str] = set()
        found = []
        for path, group in groupby(self.ask(query), key=lambda pair: pair[0]):
            keys = [key for _, key in group]
            if seen.isdisjoint(keys):
                seen.update(keys)
            else:
                found.append(path)
        return found

    def count_written(self) -> dict[str, Any]:
        """How many rows, how many quarantined, and how many of each split and for each reason."""
        splits = self.ask("SELECT split, count(*) FROM written WHERE NOT quarantined GROUP BY split ORDER BY split")
        reasons = self.ask("SELECT reason, count(*) FROM written WHERE quarantined GROUP BY reason ORDER BY reason")
        by_split, by_reason = dict(splits), dict(reasons)
        rows, quarantined = sum(by_split.values()), sum(by_reason.values())
        return {"rows": rows, "quarantined": quarantined, "splits": by_split, "reasons": by_reason}

    def classes_of(self, split: str) -> set[str]:
        """The labels of a split's rows."""
        query = "SELECT DISTINCT label FROM written WHERE split = ? AND NOT quarantined"
        return {label for (label,) in self.ask(query, split)}

    def files_of_keys(self) -> Iterator[tuple[str, str]]:
        """Each written key with the first of the files that have it, in the order of keys."""
        found = "SELECT key, min(path) FROM written JOIN part ON part.id = part GROUP BY key ORDER BY key"
        return self.ask(found)

    def lost(self) -> list[str]:
        """The first few inputs that are written nowhere."""
        missing = "NOT EXISTS (SELECT 1 FROM written WHERE written.key = input.key)"
        return [key for (key,) in self.ask(f"SELECT key FROM input WHERE {missing} LIMIT 5")]  # noqa: S608 - ours

    def unknown(self) -> list[str]:
        """The first few written keys that didn't come in."""
        return [key for (key,) in self.ask(f"SELECT key FROM written WHERE {UNKNOWN} LIMIT 5")]  # noqa: S608 - ours

    def unexpected(self) -> list[str]:
        """The first few written keys that didn't come in, or are written more than once."""
        query = f"SELECT key FROM written GROUP BY key HAVING count(*) > 1 OR {UNKNOWN} LIMIT 5"  # noqa: S608 - ours
        return [key for (key,) in self.ask(query)]


def backwards(path: str) -> str:
    """A path read from its end, closed by the slash at its beginning."""
    return path[::-1] + "/"


def chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """The items in lists of a size, the last one shorter."""
    while some := list(islice(items, size)):
        yield some
