"""Listing millions of keys: page by page, from several prefixes at once, never all in memory.

S3 gives a thousand keys an answer, each answer needs the one before it, and what is below one prefix can't be asked for
in parallel. So the folders of the first levels are found by their delimiter, and what lies in them is listed side by
side.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from carclass import storage
from carclass.data.inventory import Inventory, chunks
from carclass.errors import UserError
from carclass.ingestion import archive
from carclass.progress import Tally

PAGE_KEYS = 1000
"""Keys in a page: as many as S3 gives in an answer."""
THREADS = 8
"""Requests at once: their answers, a tenth of a second each, are as many as a core can read."""
MIN_PREFIXES = 4 * THREADS
"""Folders are opened, level by level, until there are so many that the large ones among them keep all threads busy."""
MAX_PREFIXES = 10_000
"""A level with more entries is one of photos, or of a folder for each photo, and is listed as one."""


class _PageRequest(NamedTuple):
    """The next page of what is below a prefix."""

    prefix: str
    token: str | None = None


def pages(uri: str) -> Iterator[list[str]]:
    """Paths of all files below a place, relative to it, by the thousand and in no order.

    A place that isn't there has none. UserError when it can't be listed.
    """
    try:
        if uri.startswith("s3://"):
            bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
            yield from _Bucket(bucket, f"{prefix}/" if prefix else "").pages()
        else:
            _, folder = storage.locate(uri)
            yield from _in_pages(_scan(folder), len(folder.rstrip("/")) + 1)
    except FileNotFoundError:
        return
    except (OSError, ClientError, BotoCoreError) as error:
        raise UserError(f"{uri}: cannot be listed ({error}). Check the bucket and your credentials.") from error


def _scan(folder: str) -> Iterator[str]:
    """All files below a local folder; in memory is a folder a level."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _scan(entry.path)
            elif entry.is_file():
                yield entry.path


def _in_pages(paths: Iterator[str], start: int) -> Iterator[list[str]]:
    page: list[str] = []
    for path in paths:
        page.append(path[start:])
        if len(page) == PAGE_KEYS:
            yield page
            page = []
    if page:
        yield page


class _Bucket:
    """What is below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            retries={"mode": "standard", "total_max_attempts": storage.NUM_ATTEMPTS},
            max_pool_connections=THREADS,
            s3={"addressing_style": "path" if own_server else "auto"},  # such a server's name has no bucket in front
        )
        self.client = boto3.Session().client("s3", config=config)

    def pages(self) -> Iterator[list[str]]:
        """Keys below the prefix, without it."""
        with ThreadPoolExecutor(THREADS) as pool:
            prefixes, loose = self._open_folders(pool)
            if loose:
                yield loose
            waiting, running = deque(map(_PageRequest, prefixes)), set[Future[Any]]()
            while waiting or running:
                while waiting and len(running) < THREADS:
                    running.add(pool.submit(self._page, waiting.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    keys, following = future.result()
                    waiting.extendleft(following)
                    if keys:
                        yield keys

    def _open_folders(self, pool: ThreadPoolExecutor) -> tuple[list[str], list[str]]:
        """Prefixes below which everything lies but the keys that are given too."""
        closed: list[str] = []
        loose: list[str] = []
        level = [self.prefix]
        while level and len(closed) + len(level) < MIN_PREFIXES:
            found = list(pool.map(self._level, level))
            closed += [prefix for prefix, entries in zip(level, found, strict=True) if entries is None]
            loose += [key for entries in found if entries is not None for key in entries[1]]
            level = [folder for entries in found if entries is not None for folder in entries[0]]
        return closed + level, loose

    def _level(self, prefix: str) -> tuple[list[str], list[str]] | None:
        """(prefixes, keys) right below a prefix; None where these are too many."""
        folders: list[str] = []
        keys: list[str] = []
        token = None
        while len(folders) + len(keys) <= MAX_PREFIXES:
            answer = self._ask(_PageRequest(prefix, token), Delimiter="/")
            folders += [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]
            keys += self._keys(answer)
            if (token := answer.get("NextContinuationToken")) is None:
                return folders, keys
        return None

    def _page(self, request: _PageRequest) -> tuple[list[str], list[_PageRequest]]:
        """(keys, the request for the next ones, if there are any)."""
        answer = self._ask(request)
        token = answer.get("NextContinuationToken")
        return self._keys(answer), [] if token is None else [request._replace(token=token)]

    def _ask(self, request: _PageRequest, **more: str) -> dict[str, Any]:
        if request.token is not None:
            more["ContinuationToken"] = request.token
        try:
            answer: dict[str, Any] = self.client.list_objects_v2(Bucket=self.bucket, Prefix=request.prefix, **more)
        except self.client.exceptions.NoSuchBucket as error:
            raise FileNotFoundError(self.bucket) from error
        return answer

    def _keys(self, answer: dict[str, Any]) -> list[str]:
        """Those of files: a key that ends with a slash stands for a folder."""
        keys = (entry["Key"] for entry in answer.get("Contents", []))
        return [key[len(self.prefix) :] for key in keys if not key.endswith("/")]


def list_photos(photos: str, inventory: Inventory, setting: str = "ingest.photos") -> None:
    """Enters the keys of all files of a folder, prefix or archive; UserError, naming the setting, without any."""
    if in_archive := photos.endswith(archive.SUFFIXES):
        if not storage.exists(photos):
            raise UserError(f"`{setting}`: no archive {photos}. Give a folder, an s3:// prefix or a .tgz that exists.")
        found = chunks(archive.names(photos), PAGE_KEYS)
    else:
        found = pages(photos)
    listed = Tally("list", "keys")
    for page in found:
        inventory.add_inputs(page)
        listed.add(len(page))
    if not listed.done:
        raise UserError(
            f"`{setting}`: no files in {photos}. Check the path or prefix; an s3:// prefix needs list permission."
        )
    if in_archive and (key := inventory.repeated_input()) is not None:
        raise UserError(f"`{setting}`: {photos} holds {key} more than once. Pack it again.")
