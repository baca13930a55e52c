"""A place: a local folder or an s3:// prefix, with reads, atomic writes and listings.

S3 credentials, region and endpoint come from the usual AWS environment variables.
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
"""Concurrent requests per process: S3 answers in tens of milliseconds, mostly waited for."""
STREAM_BYTES = 4 * 2**20
"""Of a stream, read at a time: each time is a request."""


def join(uri: str, *parts: str) -> str:
    """The URI of something below a place."""
    return "/".join([uri.rstrip("/"), *parts])


def locate(uri: str) -> tuple[fs.FileSystem, str]:
    """(file system, path on it) of a local path, file:// or s3:// URI; UserError for other schemes."""
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    scheme, path = uri.split("://", 1)
    if scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath(path)
    if scheme != "s3":
        raise UserError(f"{uri}: places are local folders or s3:// prefixes, not {scheme}://.")
    return _s3(), path.rstrip("/")


@lru_cache(maxsize=1)
def _s3() -> fs.S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        options["scheme"], options["endpoint_override"] = endpoint.split("://", 1)
    # Opened when written to: a small object is then one request and not three.
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=NUM_ATTEMPTS)
    return fs.S3FileSystem(retry_strategy=retries, allow_delayed_open=True, **options)


def exists(uri: str) -> bool:
    """Whether there is a file."""
    filesystem, path = locate(uri)
    return bool(retry_throttled(lambda: filesystem.get_file_info(path)).type == fs.FileType.File)


def list_files(uri: str) -> list[str]:
    """Paths of all files below a place, relative to it and sorted.

    A place that isn't there has none. UserError when S3 refuses the listing.
    """
    filesystem, path = locate(uri)
    try:
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        found = retry_throttled(lambda: filesystem.get_file_info(selector))
    except OSError as error:
        raise UserError(
            f"{uri}: cannot be listed ({_first_line(error)}). Check the bucket and your credentials."
        ) from error
    return sorted(info.path[len(path) + 1 :] for info in found if info.type == fs.FileType.File)


def read_bytes(uri: str) -> bytes:
    """A file's content; FileNotFoundError when it isn't there."""
    filesystem, path = locate(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return retry_throttled(read)


def open_stream(uri: str) -> BinaryIO:
    """A file's content from front to back, for what is too large to hold; FileNotFoundError when it isn't there."""
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, open_file(uri)), STREAM_BYTES))


def open_file(uri: str) -> NativeFile:
    """A file to read from here and there, as Parquet files are; FileNotFoundError when it isn't there."""
    filesystem, path = locate(uri)
    file = retry_throttled(lambda: filesystem.open_input_file(path))
    return file if isinstance(filesystem, fs.LocalFileSystem) else PythonFile(_RetryingFile(file), "r")


class _RetryingFile(io.RawIOBase):
    """A file whose every read is tried again while S3 is busy: one of many may fail, and all of them soon do."""

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
    """Contents in the order given, read in parallel; a failure takes its file's place."""

    def read(uri: str) -> bytes | OSError:
        try:
            return read_bytes(uri)
        except OSError as error:
            return error
        except ArrowInvalid as error:  # a key that pyarrow takes for no path, such as one with "//"
            return OSError(str(error))

    return in_parallel(read, uris)


def in_parallel(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Results in the order of the items, by threads; few are begun before they are wanted, however many there are."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        begun: deque[Future[T]] = deque()
        for item in items:
            if len(begun) == 2 * READ_THREADS:
                yield begun.popleft().result()
            begun.append(pool.submit(function, item))
        while begun:
            yield begun.popleft().result()


def retry_throttled(request: Callable[[], T]) -> T:
    """What a request returns, made again after a growing pause when S3 was busy.

    pyarrow repeats refused requests itself, but not where the refusal is longer than the few bytes asked for, as of a
    small column in a Parquet file, nor where it has no body, as of a file's size, nor when it has done so often lately.
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
    """Publishes a file, given whole or in pieces: readers see all of it or nothing."""
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
    """Removes a file."""
    filesystem, path = locate(uri)
    retry_throttled(lambda: filesystem.delete_file(path))


def delete_folder(uri: str) -> None:
    """Removes all files below a place."""
    filesystem, path = locate(uri)
    retry_throttled(lambda: filesystem.delete_dir(path))


def check_root(uri: str) -> None:
    """UserError unless the place can be written to (a bucket that isn't there, say)."""
    probe = join(uri, f".probe-{uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except (OSError, ArrowInvalid) as error:
        raise UserError(f"`root`: {uri} cannot be written to ({_first_line(error)}).") from error


def sha256(*pieces: bytes | memoryview) -> str:
    """The digest that names contents here, whole or in pieces, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
