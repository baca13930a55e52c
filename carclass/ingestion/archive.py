"""Photos in a tar or zip archive, which are read sequentially and so by one process."""

import lzma
import re
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.data.inventory import DISK_ERRORS, INPUT, Listed
from carclass.errors import UserError
from carclass.ingestion.members import ArchiveError, Catalogue, Member, UnreadableMemberError, clean_name
from carclass.ingestion.tar_archive import read_tar
from carclass.ingestion.zip_archive import read_zip
from carclass.progress import Progress

TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst",
)  # fmt: skip
ZIP_SUFFIX = ".zip"
MAGIC = {
    b"PK\3\4": ("zip archive", ".zip"),
    b"\x1f\x8b": ("tar archive, compressed by gzip", ".tar.gz"),
    b"BZh": ("tar archive, compressed by bzip2", ".tar.bz2"),
    b"\xfd7zXZ\0": ("tar archive, compressed by xz", ".tar.xz"),
    b"\x28\xb5\x2f\xfd": ("tar archive, compressed by zstd", ".tar.zst"),
    b"7z\xbc\xaf": ("7z archive", None),
    b"Rar!": ("rar archive", None),
}
"""First bytes of archives, with the kind and the ending of the name; None if the kind is not read."""
TAR_MAGIC_AT = 257
AFTER_END = ("data after its end", "Not a gzipped file", "Unknown frame descriptor")
"""Parts of errors about data after the end of an archive."""
_SUFFIXES = sorted((*TAR_SUFFIXES, ZIP_SUFFIX), key=len, reverse=True)
_ARCHIVE = f"(?P<archive>.+?(?:{'|'.join(map(re.escape, _SUFFIXES))}))"
FOLDER = re.compile(f"{_ARCHIVE}!(?P<folder>/.*)?", re.IGNORECASE | re.DOTALL)
"""URI of a folder in an archive."""
PATH_INTO = re.compile(f"{_ARCHIVE}/(?P<folder>.+)", re.IGNORECASE | re.DOTALL)
"""URI that goes on after the name of an archive."""
LOADED = pa.schema([*INPUT, ("data", pa.large_binary()), ("error", pa.string())])
"""A photo's bytes, or the storage error that replaces them."""
MAX_LISTED = 5
"""Folders that are named in an error."""
BATCH_BYTES = 64 * 2**20
"""Bytes of photos after which a batch ends, so that large photos do not fill the memory."""
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError,
    NotImplementedError,
)  # fmt: skip
"""Errors of the readers of archives."""


def is_archive(uri: str) -> bool:
    """Return True if the name is that of an archive, or of a folder in one: `photos.tgz!/cars`."""
    return split_folder(uri)[0].lower().endswith((*TAR_SUFFIXES, ZIP_SUFFIX))


def split_folder(uri: str) -> tuple[str, str]:
    """Return the URI of an archive and the folder in it, which is empty for the whole archive and for other URIs."""
    whole = FOLDER.fullmatch(uri)
    return (uri, "") if whole is None else (whole["archive"], clean_name(whole["folder"] or ""))


def suggest_folder(uri: str) -> str | None:
    """Return the spelling of a folder in an archive for a path that goes on after an archive's name, or None."""
    path = PATH_INTO.fullmatch(uri)
    return None if path is None or not storage.exists(path["archive"]) else f"{path['archive']}!/{path['folder']}"


def list_members(uri: str, setting: str) -> Iterator[Listed]:
    """Yield an archive's files, with links resolved. Raise UserError, naming the setting, if it is damaged.

    Of a folder in the archive, the keys are relative to the folder.
    """
    uri, folder = split_folder(uri)
    progress = Progress("list", "members of the archive")
    with Catalogue() as catalogue, _archive_errors(uri, setting):
        for position, member in enumerate(_members(uri)):
            catalogue.add(position, member)
            progress.add(1)
        yield from _below(folder, catalogue.files(), uri, setting)


def _below(folder: str, files: Iterator[Listed], uri: str, setting: str) -> Iterator[Listed]:
    """Yield the files below a folder, "" for all, their keys relative to it. Raise UserError if there are none."""
    if not folder:
        yield from files
        return
    found, others = False, dict[str, None]()
    for file in files:
        if file.key.startswith(f"{folder}/"):
            found = True
            yield file._replace(key=file.key.removeprefix(f"{folder}/"))
        elif len(others) < MAX_LISTED:
            others[file.key.rpartition("/")[0]] = None
    if not found:
        names = ", ".join(filter(None, others)) or "none"
        raise UserError(f"`{setting}`: {uri} has no files in the folder {folder}; its folders: {names}.")


def read_photos(uri: str, requested: pa.Table, batch_rows: int, setting: str) -> Iterator[pa.Table]:
    """Yield requested photos as tables of LOADED with at most batch_rows rows each.

    requested: rows of INPUT. Raise UserError, naming the setting, if the archive is damaged or not the one listed.
    """
    uri, _ = split_folder(uri)
    requested = requested.sort_by("position")
    inputs = (row for batch in requested.to_batches(max_chunksize=batch_rows) for row in batch.to_pylist())
    loaded: list[dict[str, Any]] = []
    next_input, num_bytes = next(inputs, None), 0
    with _archive_errors(uri, setting):
        for position, member in enumerate(_members(uri)):
            if next_input is None:
                break
            if position != next_input["position"]:
                continue
            content = _read(member, next_input)
            while next_input is not None and position == next_input["position"]:  # a file and the links to it
                loaded.append({**next_input, **content})
                num_bytes += len(content["data"] or b"")
                next_input = next(inputs, None)
                if len(loaded) == batch_rows or num_bytes >= BATCH_BYTES:
                    yield pa.Table.from_pylist(loaded, LOADED)
                    loaded, num_bytes = [], 0
        if next_input is not None:
            raise _changed(next_input["key"])
    if loaded:
        yield pa.Table.from_pylist(loaded, LOADED)


def _read(member: Member, requested: dict[str, Any]) -> dict[str, bytes | str | None]:
    """Return the columns `data` and `error`. Raise ArchiveError if the member is not the one that was listed."""
    data = cause = None
    try:
        data = member.read() if member.size == requested["size"] else None
    except UnreadableMemberError as error:
        cause = str(error)
    if Listed("", member.size, member.checksum()).fingerprint != requested["fingerprint"]:
        raise _changed(requested["key"])
    return {"data": data, "error": cause}


def _changed(key: str) -> ArchiveError:
    return ArchiveError(f"it has changed since it was listed: {key} is another file", "Run the job again.")


def _members(uri: str) -> Iterator[Member]:
    read = read_zip if uri.lower().endswith(ZIP_SUFFIX) else read_tar
    with storage.open_stream(uri) as stream:
        yield from read(stream)


@contextmanager
def _archive_errors(uri: str, setting: str) -> Iterator[None]:
    """Report an archive that cannot be read with a remedy."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, storage.ArchivedObjectError) as error:
        raise UserError(f"`{setting}`: {uri} cannot be read ({error}). Restore it, and run the job again.") from error
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith(DISK_ERRORS):
            raise
        raise UserError(
            f"no space left in {tempfile.gettempdir()} ({error}) for the names of the files in {uri}. Free space, or "
            "set TMPDIR to a folder on a larger or sound disk."
        ) from error
    except ArchiveError as error:
        raise UserError(f"`{setting}`: {uri} cannot be read: {error.problem}. {error.remedy}") from error
    except DAMAGED as error:
        raise UserError(f"`{setting}`: {uri} {_describe_damage(uri, error)}") from error


def _describe_damage(uri: str, error: Exception) -> str:
    """Return what is wrong with an archive, with a remedy: its first bytes tell its kind, whatever its name."""
    try:
        with storage.open_stream(uri) as stream:
            start: bytes = stream.read(TAR_MAGIC_AT + 5)
    except OSError:
        start = b"?"
    if not start:
        return "has no bytes. Copy it again."
    is_zip = uri.lower().endswith(ZIP_SUFFIX)
    kind, suffix = next((known for magic, known in MAGIC.items() if start.startswith(magic)), (None, None))
    if start[TAR_MAGIC_AT:] == b"ustar":
        kind, suffix = "tar archive", ".tar"
    if kind is not None and suffix is None:
        return f"is a {kind}, which is not read. Unpack it, and create a tar or zip archive."
    if kind is not None and is_zip != (suffix == ZIP_SUFFIX):
        stem = next(uri[: -len(ending)] for ending in _SUFFIXES if uri.lower().endswith(ending))
        return f"is a {kind}: rename it to {stem}{suffix}."
    if kind is not None and any(part in str(error) for part in AFTER_END):
        return f"has data after its end ({error}). Remove that data, or create the archive again."
    return f"is not a readable {'zip' if is_zip else 'tar'} archive ({error}). Copy it again."
