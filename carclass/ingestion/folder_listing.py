"""Listing of a local folder: every entry that is not a folder is an input, readable or not."""

import os
import stat
from collections.abc import Generator, Iterator

from carclass.data.inventory import Listed
from carclass.data.quarantine import Reason
from carclass.ingestion.names import is_junk

KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))


def scan_folder(folder: str, empty: list[str] | None = None) -> Iterator[Listed]:
    """Yield all files below a folder, links followed. Raise OSError if it or a folder below it cannot be listed.

    empty: gets the keys of the folders in which all files, if any, are junk, only the topmost of each branch.
    """
    found: list[str] = []
    yield from _scan(os.fsencode(folder), b"", frozenset(), found)
    if empty is not None:
        empty += found


def _scan(
    folder: bytes, prefix: bytes, parents: frozenset[tuple[int, int]], empty: list[str]
) -> Generator[Listed, None, bool]:
    """Yield all files of a folder, and return False if there are none but junk. prefix: of their keys.

    parents: device and inode of the folders above; empty: see scan_folder.
    """
    status = os.stat(folder)
    if (identity := (status.st_dev, status.st_ino)) in parents:
        return True  # a link to a folder above, whose files are listed there
    has_photos, below = False, list[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            key = prefix + entry.name
            if not _is_folder(entry):
                yield (file := _to_input(entry, key))
                has_photos = has_photos or not is_junk(file.key)
                continue
            try:
                is_filled = yield from _scan(entry.path, key + b"/", parents | {identity}, below)
            except FileNotFoundError:  # deleted since its parent was listed
                continue
            has_photos = has_photos or is_filled
            if not is_filled and not is_junk(name := key.decode(errors="backslashreplace")):
                below.append(name)
    if has_photos:
        empty += below
    return has_photos


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to a place without permission
        return False


def _to_input(entry: os.DirEntry[bytes], key: bytes) -> Listed:
    """Return an entry that is not a folder, with a reason if it is not a file or its name is not UTF-8."""
    try:
        status = entry.stat()
    except OSError as error:
        problem = f"a broken link ({error.strerror})" if entry.is_symlink() else f"not accessible ({error.strerror})"
        return _name(Listed("", reason=Reason.MISSING_FILE, detail=problem), key)
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for is_kind, text in KINDS if is_kind(status.st_mode)), "a special file")
        return _name(Listed("", reason=Reason.MISSING_FILE, detail=f"{kind}, not a file"), key)
    return _name(Listed("", status.st_size, file_version(status)), key)


def file_version(status: os.stat_result) -> str:
    """Return the times of a file, both: the time of modification can be set, that of the last change cannot."""
    return f"{status.st_mtime_ns} {status.st_ctime_ns}"


def _name(file: Listed, key: bytes) -> Listed:
    """Return the file with its key, which is escaped, and a reason, if it is not UTF-8."""
    try:
        return file._replace(key=key.decode())
    except UnicodeDecodeError:
        detail = "the name is not UTF-8; rename the file or its folder"
        return file._replace(key=key.decode(errors="backslashreplace"), reason=Reason.BAD_NAME, detail=detail)
