"""Reads, atomic writes and listings of local folders and s3:// prefixes.

Three errors tell failures apart: FileNotFoundError and ArchivedObjectError belong to one file, and StorageError, which
is raised once retries are used up, to the storage itself.
"""

import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from uuid import uuid4

from carclass import s3
from carclass.errors import UserError

S = TypeVar("S")
T = TypeVar("T")
READ_THREADS = 16
"""Concurrent requests per process: S3 has a latency of tens of milliseconds."""
PREFETCH_BYTES = 32 * 2**20
"""Bytes of files read ahead per process: several phone photos."""
STREAM_BYTES = 4 * 2**20
"""Bytes per request of a stream."""
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, and run the same command again."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Check the path and your permissions."),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "Move the file, folder or link that is in its place."),
}
"""Remedies of local errors."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
NO_CONDITIONAL_WRITES = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")


class StorageError(UserError):
    """Failure of the storage, not of one file: credentials, permission, region, network, disk. It stops a job."""


class ArchivedObjectError(OSError):
    """Failed read of an object in an archive class such as Glacier, which has to be restored first."""


class Stat(NamedTuple):
    """State of a file; both times are of the storage's own clock, in seconds since 1970."""

    size: int  # bytes
    version: str  # changes with every write
    modified: float
    now: float


def join(uri: str, *parts: str) -> str:
    """Return the URI of a file or folder below another URI."""
    return "/".join([uri.rstrip("/"), *parts])


def local_path(uri: str) -> str | None:
    """Return the absolute path of a local path or file:// URI, None of an s3:// URI. Raise UserError for others."""
    if "://" not in uri:
        return os.path.abspath(uri)
    scheme, path = uri.split("://", 1)
    if scheme not in ("file", "s3"):
        raise UserError(f"{uri}: {scheme}:// is not supported. Give a local folder or an s3:// prefix.")
    return os.path.abspath(path) if scheme == "file" else None


def _address(uri: str) -> dict[str, str]:
    """Return the bucket and key of an s3:// URI, the key exactly as it is written."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def translate_errors(uri: str, action: str) -> Iterator[None]:
    """Raise FileNotFoundError, ArchivedObjectError or StorageError for the errors of a request. action: participle."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", uri) from error
    except s3.ERRORS as error:
        status, code = s3.error_code(error)
        if status == 404 and code != "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, "no such object", uri) from error
        if code == "InvalidObjectState":
            raise ArchivedObjectError(f"{uri} is archived: restore it, and run the same command again") from error
        raise StorageError(f"{uri} cannot be {action} ({s3.describe(error)}). {s3.remedy(error)}") from error
    except OSError as error:
        # A path below a file does not exist; a file itself cannot be listed.
        is_below_file = error.errno == errno.ENOTDIR and not os.path.lexists(error.filename or "")
        if action in ("read", "listed") and is_below_file:
            raise FileNotFoundError(errno.ENOENT, "no such file", uri) from error
        reason = error.strerror or str(error)
        remedy = REMEDIES.get(error.errno or 0, "Check the path, the disk and its mount.")
        raise StorageError(f"{uri} cannot be {action} ({reason}). {remedy}") from error


def exists(uri: str) -> bool:
    """Return True if the file exists."""
    if (path := local_path(uri)) is not None:
        return os.path.isfile(path)
    try:
        _head(uri)
    except FileNotFoundError:
        return False
    return True


def _head(uri: str) -> dict[str, Any]:
    with translate_errors(uri, "read"):
        response: dict[str, Any] = s3.client().head_object(**_address(uri))
    return response


def stat(uri: str) -> Stat:
    """Return the state of a file. Raise FileNotFoundError if it does not exist."""
    if (path := local_path(uri)) is None:
        response = _head(uri)
        now, modified = s3.server_time(response), response["LastModified"].timestamp()
        return Stat(response["ContentLength"], response["ETag"], modified, now)
    with translate_errors(uri, "read"):
        status = os.stat(path)
        with _temporary(path) as probe:  # a network file system has a clock of its own
            probe.touch()
            now = probe.stat().st_mtime
    return Stat(status.st_size, _local_version(status), status.st_mtime, now)


def _local_version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def list_files(uri: str) -> list[str]:
    """Return the sorted paths of all files below a URI, relative to it; none if it does not exist.

    Raise StorageError if it cannot be listed.
    """
    path = local_path(uri)
    try:
        with translate_errors(uri, "listed"):
            return sorted(s3.list_keys(uri) if path is None else _list_folder(path))
    except FileNotFoundError:
        return []


def _list_folder(path: str) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                with suppress(FileNotFoundError):  # deleted meanwhile by another job
                    yield from [f"{entry.name}/{name}" for name in _list_folder(entry.path)]
            elif entry.is_file():
                yield entry.name


def list_folders(uri: str, marker: str) -> list[str]:
    """Return the sorted paths of the folders below a URI that contain a file of the given name."""
    return [path.removesuffix(f"/{marker}") for path in list_files(uri) if path.endswith(f"/{marker}")]


def read_bytes(uri: str) -> bytes:
    """Return a file's content. Raise FileNotFoundError if it does not exist."""
    path = local_path(uri)
    with translate_errors(uri, "read"):
        if path is not None:
            return Path(path).read_bytes()
        return s3.read_body(lambda: s3.client().get_object(**_address(uri)))


def open_stream(uri: str) -> BinaryIO:
    """Return a sequential stream of a file too large for memory. Raise FileNotFoundError if it does not exist."""
    return cast(BinaryIO, io.BufferedReader(open_file(uri), STREAM_BYTES))


def open_file(uri: str) -> io.RawIOBase:
    """Open a file for random access, as Parquet needs. Raise FileNotFoundError if it does not exist."""
    path = local_path(uri)
    with translate_errors(uri, "read"):
        return _ObjectFile(uri) if path is None else _LocalFile(path)


class _LocalFile(io.FileIO):
    """Seekable local file."""

    def read(self, size: int | None = -1) -> bytes:
        with translate_errors(str(self.name), "read"):
            return super().read(-1 if size is None else size)

    def readinto(self, buffer: Any) -> int:
        with translate_errors(str(self.name), "read"):
            return super().readinto(buffer)


class _ObjectFile(io.RawIOBase):
    """Seekable object on S3; each read is a request."""

    def __init__(self, uri: str) -> None:
        head = _head(uri)
        self.uri, self.size, self.etag, self.position = uri, int(head["ContentLength"]), head["ETag"], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.size, self.position + size)
        if end <= self.position:
            return b""
        with translate_errors(self.uri, "read"):
            # Two reads of an object that is replaced between them must not be mixed.
            request = {**_address(self.uri), "Range": f"bytes={self.position}-{end - 1}", "IfMatch": self.etag}
            data = s3.read_body(lambda: s3.client().get_object(**request))
        self.position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_many(uris: Iterable[str], sizes: Iterable[int] = repeat(0)) -> Iterator[bytes | OSError]:
    """Yield file contents in the order of the URIs, read in parallel; a missing or archived file yields its error.

    sizes: of the files, see `in_parallel`. Raise StorageError for any other failure.
    """

    def read(uri: str) -> bytes | OSError:
        try:
            return read_bytes(uri)
        except (FileNotFoundError, ArchivedObjectError) as error:
            return error

    return in_parallel(read, uris, sizes)


def in_parallel(function: Callable[[S], T], items: Iterable[S], sizes: Iterable[int] = repeat(0)) -> Iterator[T]:
    """Yield results in the order of the items, computed in threads with a bounded prefetch.

    sizes: bytes of each result, as far as known; at most PREFETCH_BYTES are fetched ahead.
    """
    pool = ThreadPoolExecutor(READ_THREADS)
    try:
        futures: deque[tuple[Future[T], int]] = deque()
        ahead = 0
        for item, size in zip(items, sizes, strict=False):
            while futures and (len(futures) == 2 * READ_THREADS or ahead + size > PREFETCH_BYTES):
                ahead -= futures[0][1]
                yield futures.popleft()[0].result()
            futures.append((pool.submit(function, item), size))
            ahead += size
        while futures:
            yield futures.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_bytes(uri: str, *pieces: bytes | memoryview) -> None:
    """Write a file atomically from one or several pieces: readers see all of it or nothing."""
    path = local_path(uri)
    with translate_errors(uri, "written"):
        if path is None:
            s3.upload(_address(uri), pieces)
            return
        with _temporary(path) as temporary:
            _write_durably(temporary, pieces)
            temporary.replace(path)


@contextmanager
def _temporary(path: str) -> Iterator[Path]:
    """Yield a path beside another one, and remove a file that is left there. Create the folder."""
    temporary = Path(path).with_name(f".{Path(path).name}.{uuid4().hex}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power loss may leave an empty file under the final name


def create(uri: str, data: bytes) -> bool:
    """Write a file unless it exists, and return True if it was written: of several writers, one succeeds."""
    if (path := local_path(uri)) is None:
        return _put_if(uri, data, {"IfNoneMatch": "*"}, lambda: not exists(uri))
    with translate_errors(uri, "written"), _temporary(path) as temporary:
        _write_durably(temporary, [data])
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            try:
                with open(path, "xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
    return True


def replace(uri: str, data: bytes, version: str) -> bool:
    """Replace a file if its version is still the one given, and return True if it was replaced."""
    if (path := local_path(uri)) is None:
        return _put_if(uri, data, {"IfMatch": version}, lambda: stat(uri).version == version)
    try:
        with translate_errors(uri, "written"), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of the replaced file: the next holder sees another version at its path
            if _local_version(os.stat(path)) != version:
                return False
            with _temporary(path) as temporary:
                _write_durably(temporary, [data])
                temporary.replace(path)
    except FileNotFoundError:
        return False
    return True


def _put_if(uri: str, data: bytes, condition: dict[str, str], holds: Callable[[], bool]) -> bool:
    """Write an object on a condition, which a store without conditional writes leaves to `holds`."""
    try:
        with translate_errors(uri, "written"):
            try:
                s3.client().put_object(**_address(uri), Body=data, **condition)
            except s3.ClientError as error:
                status, code = s3.error_code(error)
                if status == 412:  # also if an earlier attempt wrote it and only its response was lost
                    return read_bytes(uri) == data
                if code not in NO_CONDITIONAL_WRITES:
                    raise
                if not holds():
                    return False
                s3.client().put_object(**_address(uri), Body=data)
    except FileNotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    """Delete a file, if it exists."""
    path = local_path(uri)
    with translate_errors(uri, "deleted"):
        if path is None:
            s3.client().delete_object(**_address(uri))
        else:
            Path(path).unlink(missing_ok=True)


def delete_folder(uri: str) -> None:
    """Delete all files below a URI."""
    if (path := local_path(uri)) is None:
        deque(in_parallel(lambda name: delete(join(uri, name)), list_files(uri)), maxlen=0)
        return
    with suppress(FileNotFoundError), translate_errors(uri, "deleted"):
        shutil.rmtree(path)


def sha256(*pieces: bytes | memoryview) -> str:
    """Return the sha256 of a content, given whole or in pieces, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
