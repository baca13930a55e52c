"""Reads, atomic writes and listings of local folders and s3:// prefixes.

S3 credentials, region and endpoint are taken from the usual AWS environment variables.
"""

import hashlib
import io
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

from pyarrow import ArrowInvalid, NativeFile, PythonFile, fs

from carclass.errors import UserError

S = TypeVar("S")
T = TypeVar("T")
NUM_ATTEMPTS = 8
THROTTLED = ("INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "NETWORK_CONNECTION", "UNKNOWN (HTTP status 503)")
READ_THREADS = 16
"""Concurrent requests per process: S3 has a latency of tens of milliseconds."""
STREAM_BYTES = 4 * 2**20
"""Bytes per request of a stream."""


def join(uri: str, *parts: str) -> str:
    """Return the URI of a file or folder below another URI."""
    return "/".join([uri.rstrip("/"), *parts])


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """Return (file system, path) of a local path, file:// or s3:// URI. Raise UserError for other schemes."""
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    scheme, path = uri.split("://", 1)
    if scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath(path)
    if scheme != "s3":
        raise UserError(f"{uri}: {scheme}:// is not supported. Give a local folder or an s3:// prefix.")
    return _s3(), path.rstrip("/")


def s3_endpoint() -> str | None:
    """Return the URL of an S3 server other than AWS, from the environment."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@lru_cache(maxsize=1)
def _s3() -> fs.S3FileSystem:
    options: dict[str, Any] = {}
    if endpoint := s3_endpoint():
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    # With delayed opening, a small object is written in one request instead of three.
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS)
    return fs.S3FileSystem(retry_strategy=retries, allow_delayed_open=True, **options)


def exists(uri: str) -> bool:
    """Return True if the file exists."""
    filesystem, path = locate(uri)
    return bool(retry_throttled(lambda: filesystem.get_file_info(path)).type == fs.FileType.File)


def list_files(uri: str) -> list[str]:
    """Return the sorted paths of all files below a URI, relative to it; none if it does not exist.

    Raise UserError if it cannot be listed.
    """
    filesystem, path = locate(uri)
    try:
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        infos = retry_throttled(lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise UserError(
            f"{uri}: cannot be listed ({_first_line(error)}). Check the bucket and your credentials."
        ) from error
    return sorted(info.path[len(path) + 1 :] for info in infos if info.type == fs.FileType.File)


def list_folders(uri: str, marker: str) -> list[str]:
    """Return the sorted paths of the folders below a URI that contain a file of the given name."""
    return [path.removesuffix(f"/{marker}") for path in list_files(uri) if path.endswith(f"/{marker}")]


def read_bytes(uri: str) -> bytes:
    """Return a file's content. Raise FileNotFoundError if it does not exist."""
    filesystem, path = locate(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return retry_throttled(read)


def open_stream(uri: str) -> BinaryIO:
    """Return a sequential stream of a file too large for memory. Raise FileNotFoundError if it does not exist."""
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, open_file(uri)), STREAM_BYTES))


def open_file(uri: str) -> NativeFile:
    """Open a file for random access, as Parquet needs. Raise FileNotFoundError if it does not exist."""
    filesystem, path = locate(uri)
    file = retry_throttled(lambda: filesystem.open_input_file(path))
    return file if isinstance(filesystem, fs.LocalFileSystem) else PythonFile(_RetryingFile(file), "r")


class _RetryingFile(io.RawIOBase):
    """Seekable file that retries every read while S3 throttles."""

    def __init__(self, file: NativeFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size()}[whence]
        self.position = start + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        start, count = self.position, self.file.size() - self.position if size < 0 else size
        data: bytes = retry_throttled(lambda: self.file.read_at(count, start))
        self.position += len(data)
        return data


def read_many(uris: Iterable[str]) -> Iterator[bytes | OSError]:
    """Yield file contents in the order of the URIs, read in parallel; a failed read yields its error."""

    def read(uri: str) -> bytes | OSError:
        try:
            return read_bytes(uri)
        except OSError as error:
            return error
        except ArrowInvalid as error:  # pyarrow rejects some keys, such as those with "//"
            return OSError(str(error))

    return in_parallel(read, uris)


def in_parallel(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield results in the order of the items, computed in threads with a bounded prefetch."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        futures: deque[Future[T]] = deque()
        for item in items:
            if len(futures) == 2 * READ_THREADS:
                yield futures.popleft().result()
            futures.append(pool.submit(function, item))
        while futures:
            yield futures.popleft().result()


def retry_throttled(request: Callable[[], T]) -> T:
    """Return the result of a request, repeated with exponential backoff while S3 throttles.

    pyarrow retries throttled requests itself, except where the response is longer than the requested range (a small
    column of a Parquet file), has no body (a file's size), or where its retry quota is used up.
    """
    for attempt in range(NUM_ATTEMPTS - 1):
        try:
            return request()
        except OSError as error:
            if not any(f"AWS Error {name}" in str(error) for name in THROTTLED):
                raise
            time.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)  # noqa: S311 - spreads the load, decides nothing
    return request()


def write_bytes(uri: str, *pieces: bytes | memoryview) -> None:
    """Write a file atomically from one or several pieces: readers see all of it or nothing."""
    filesystem, path = locate(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            file.writelines(pieces)
        temporary.replace(target)
        return

    def put() -> None:
        with filesystem.open_output_stream(path) as stream:
            for piece in pieces:
                stream.write(piece)

    retry_throttled(put)


def delete(uri: str) -> None:
    """Delete a file."""
    filesystem, path = locate(uri)
    retry_throttled(lambda: filesystem.delete_file(path))


def delete_folder(uri: str) -> None:
    """Delete all files below a URI."""
    filesystem, path = locate(uri)
    retry_throttled(lambda: filesystem.delete_dir(path))


def check_root(uri: str) -> None:
    """Check that a URI can be written to. Raise UserError if not, as with a missing bucket."""
    probe = join(uri, f".probe-{uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except (OSError, ArrowInvalid) as error:
        raise UserError(
            f"`root`: {uri} cannot be written to ({_first_line(error)}). Check the path and your permissions."
        ) from error


def sha256(*pieces: bytes | memoryview) -> str:
    """Return the sha256 of a content, given whole or in pieces, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
