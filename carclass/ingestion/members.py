"""Members of an archive: their names, and the files that they stand for after links and repetitions."""

import logging
import posixpath
import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

from carclass.data.inventory import Listed
from carclass.data.quarantine import Reason
from carclass.ingestion.names import is_utf8

log = logging.getLogger(__name__)
MAX_HOPS = 40
"""Links followed on the way to one file, as on Linux."""
MAX_LINKED_FILES = 1_000_000
"""Limit of files that are listed below links to folders: nested links multiply them."""
MAX_PHOTO_BYTES = 512 * 2**20
"""Limit of a file, which is read into memory: more than an uncompressed photo of `ingest.max_pixels` has."""
COLUMNS = "name, position, size, version, target, reason, detail"


class ArchiveError(ValueError):
    """Error of an archive that cannot be read, with a remedy."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy


class UnreadableMemberError(ValueError):
    """Error of a damaged member in an archive whose other members can be read."""


class Member(NamedTuple):
    """An entry of an archive."""

    name: str  # as in the archive; bytes that are not UTF-8 as surrogates
    size: int  # bytes
    read: Callable[[], bytes]  # returns the content, before the archive advances to the next member
    checksum: Callable[[], str]  # returns that of the content, also after the content was read
    target: str | None = None  # of a link: path from the archive's top folder
    is_hard_link: bool = False
    is_folder: bool = False
    rejected: str | None = None  # the kind of a member that is no file, link or folder


class _Entry(NamedTuple):
    """A row of the catalogue: a file, a link if there is a target, or a rejected member if there is a reason."""

    name: str
    position: int
    size: int
    version: str
    target: str | None
    reason: str | None
    detail: str | None


def clean_name(name: str) -> str:
    """Return a member's path as it would be after unpacking: relative, without `.`, `..` and empty parts."""
    return posixpath.normpath("/" + name).lstrip("/")


def link_target(name: str, link: str) -> str:
    """Return the path to which a symbolic link leads, from the archive's top folder.

    name: member that is the link. A path out of the archive begins with `../`.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    leaves = path.startswith("/") != name.startswith("/") or path.split("/")[0] == ".."
    return f"../{link}" if leaves else clean_name(path)


class Catalogue:
    """Members of one archive in a temporary database on disk, so that memory does not grow with their number."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # an empty name: a temporary file
        self._db.execute(
            "CREATE TABLE member (name TEXT PRIMARY KEY, position INTEGER, size INTEGER, version TEXT, target TEXT, "
            "reason TEXT, detail TEXT) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")
        self._num_linked = self._num_replaced = 0
        self._last_replaced = ""
        self._has_links = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, position: int, member: Member) -> None:
        """Add a member. As in unpacking, it replaces an earlier one of the same name, and a folder replaces a link.

        position: index of the member in the archive.
        """
        if member.is_folder:
            if self._has_links:
                name = printable(clean_name(member.name))
                self._db.execute("DELETE FROM member WHERE name = ? AND target NOT NULL", (name,))
            return
        entry = self._describe(position, member)
        if self._find(entry.name) is not None:
            if entry.target == entry.name:  # a file that is archived again is stored as a hard link to itself
                return
            self._num_replaced, self._last_replaced = self._num_replaced + 1, entry.name
        self._has_links |= entry.target is not None
        self._db.execute("INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?, ?, ?, ?)", entry)

    def _describe(self, position: int, member: Member) -> _Entry:
        """Return the row of a member: links listed before it are followed in its path, as when unpacking."""
        name = clean_name(member.name)
        entry = _Entry(printable(name), position, member.size, member.checksum(), None, None, None)
        if not name or not is_utf8(name):
            detail = "the name is not UTF-8" if name else "the name is empty"
            return entry._replace(reason=Reason.BAD_NAME, detail=detail)
        if (place := self._through_links(name)) is None:
            return entry._replace(reason=Reason.MISSING_FILE, detail="in a folder that is a link out of the archive")
        entry = entry._replace(name=place)
        if member.rejected is not None:
            return entry._replace(reason=Reason.MISSING_FILE, detail=f"{member.rejected}, not a file")
        if member.target is None:
            return entry
        target = printable(member.target)
        if member.is_hard_link:  # shares the bytes that are there now, not those of a later member
            linked = self._find(self._through_links(target) or "")
            return entry._replace(target=target) if linked in (None, self._find(place)) else _rename(linked, place)
        if next(self._entries(place), None) is not None:
            return entry._replace(reason=Reason.MISSING_FILE, detail="a link with the name of a folder of the archive")
        return entry._replace(target=target)

    def _through_links(self, name: str) -> str | None:
        """Return the path of a member after the links among its folders; None if they lead out of the archive."""
        folder, slash, base = name.rpartition("/")
        if not self._has_links or not slash:
            return name
        followed = self._follow(folder)
        return None if followed is None or followed.startswith("../") else clean_name(f"{followed}/{base}")

    def files(self) -> Iterator[Listed]:
        """Yield all files, those of links with the position of their target, and rejected members with a reason."""
        if self._num_replaced:
            log.warning(
                "list: %s member(s) are replaced by later ones of the same name, as in unpacking, such as %s",
                f"{self._num_replaced:,}",
                self._last_replaced,
            )
        for entry in self._entries(""):
            yield from self._resolve(entry.name, entry, frozenset(_folders(entry.name)))

    def _find(self, name: str) -> _Entry | None:
        row = self._db.execute(f"SELECT {COLUMNS} FROM member WHERE name = ?", (name,)).fetchone()  # noqa: S608
        return None if row is None else _Entry(*row)

    def _entries(self, folder: str) -> Iterator[_Entry]:
        """Yield the entries below a folder, "" for all: a range of names, as `0` follows `/`."""
        bounds = (f"{folder}/", f"{folder}0") if folder else ("", "\U0010ffff")
        query = f"SELECT {COLUMNS} FROM member WHERE name >= ? AND name < ?"  # noqa: S608 - constant
        return (_Entry(*row) for row in self._db.execute(query, bounds))

    def _resolve(self, key: str, entry: _Entry, folders: frozenset[str]) -> Iterator[Listed]:
        """Yield the file that an entry stands for, or the files below the folder that a link leads to.

        key: name of the entry, in the folders that links have led to. folders: all of them, by their own names.
        """
        if entry.target is None:
            yield Listed(key, entry.size, entry.version, entry.reason, entry.detail, entry.position)
            return
        path = self._follow(entry.target)
        target = None if path is None else self._find(path)
        if target is not None:
            target = _rename(target, key)
            yield Listed(key, target.size, target.version, target.reason, target.detail, target.position)
        elif path is None:
            yield Listed(
                key, entry.size, entry.version, Reason.MISSING_FILE, "a link that leads to itself", entry.position
            )
        elif next(self._entries(path), None) is None:
            detail = f"a link to {entry.target.removeprefix('../')}, which is not in the archive"
            yield Listed(key, entry.size, entry.version, Reason.MISSING_FILE, detail, entry.position)
        else:
            for below in self._entries(path):
                inner = frozenset(_folders(below.name, path))
                if inner.isdisjoint(folders):  # as in a folder, those above are listed only once
                    self._count_linked(key)
                    yield from self._resolve(f"{key}{below.name[len(path) :]}", below, folders | inner)

    def _count_linked(self, key: str) -> None:
        self._num_linked += 1
        if self._num_linked > MAX_LINKED_FILES:
            problem = f"its links to folders lead to more than {MAX_LINKED_FILES:,} files, such as {key}"
            raise ArchiveError(problem, "Create it again without such links.")

    def _follow(self, path: str) -> str | None:
        """Return the path that is left when all links on the way are replaced by their targets; None for a loop."""
        for _ in range(MAX_HOPS):
            parts = path.split("/")
            for end in range(len(parts), 0, -1):
                entry = self._find("/".join(parts[:end]))
                if entry is not None and entry.target is not None:
                    path = posixpath.join(entry.target, *parts[end:])
                    break
            else:
                return path
        return None


def _rename(entry: _Entry, name: str) -> _Entry:
    """Return a file under the name of a link to it, which may be a good one where its own is not."""
    if entry.reason == Reason.BAD_NAME:
        entry = entry._replace(reason=None, detail=None)
    return entry._replace(name=name)


def _folders(name: str, top: str = "") -> Iterator[str]:
    """Yield the folders of a file, from the top folder down; "" is that of the archive."""
    parts = name.split("/")[:-1]
    start = top.count("/") + 1 if top else 0
    return ("/".join(parts[:end]) for end in range(start, len(parts) + 1))


def printable(name: str) -> str:
    """Return a name with bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
