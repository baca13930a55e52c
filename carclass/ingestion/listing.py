"""Listing of millions of keys: page by page, with several prefixes in parallel, in constant memory.

S3 returns a thousand keys per response, and each request needs the token of the previous response, so one prefix
cannot be listed in parallel. Therefore the folders of the first levels are listed by delimiter, and their contents in
parallel.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from carclass import s3, storage
from carclass.data.inventory import Inventory, Listed, chunks
from carclass.data.quarantine import Reason
from carclass.errors import UserError, suggest_beside
from carclass.ingestion import archive, members
from carclass.ingestion.folder_listing import scan_folder
from carclass.ingestion.own_files import without_own_files
from carclass.progress import Progress

PAGE_KEYS = 1000
"""Keys in a page: S3's maximum per response."""
THREADS = 8
"""Concurrent requests: responses take a tenth of a second each, so that eight saturate a core that parses them."""
MIN_PREFIXES = 4 * THREADS
"""Folders are expanded level by level until there are enough of them to keep all threads busy."""
MAX_PREFIXES = 10_000
"""A folder with more entries holds photos, or one folder per photo, and is listed as a whole."""
NO_ARCHIVE = (
    ". Set it to an existing folder, s3:// prefix or archive; the name of a folder that ends like that of an archive "
    "needs a slash at its end."
)


class _PageRequest(NamedTuple):
    """Request for the next page of keys below a prefix."""

    prefix: str
    token: str | None = None


def check_place(photos: str, setting: str) -> None:
    """Raise UserError, naming the setting, for a place that has no photos: a misspelt or an empty one.

    Of a prefix, nothing is listed.
    """
    path = storage.local_path(photos)
    if archive.is_archive(photos):
        if not storage.exists(archive_uri := archive.split_folder(photos)[0]):
            hint = suggest_beside(storage.local_path(archive_uri))
            raise UserError(f"`{setting}`: no archive {archive_uri}{f'; {hint}' if hint else NO_ARCHIVE}")
    elif path is not None and os.path.isfile(path):
        suffixes = ", ".join([*archive.TAR_SUFFIXES, archive.ZIP_SUFFIX])
        raise UserError(
            f"`{setting}`: {photos} is a file. Set it to a folder, an s3:// prefix or an archive ({suffixes})."
        )
    elif (suggested := archive.suggest_folder(photos)) is not None:
        raise UserError(f"`{setting}`: {photos} leads into an archive. Write {suggested} for a folder in it.")
    elif path is not None and next(list_pages(photos), None) is None:
        raise _nothing_found(photos, setting)


def list_photos(
    photos: str,
    inventory: Inventory,
    setting: str = "ingest.photos",
    *,
    root: str | None = None,
    empty: list[str] | None = None,
) -> None:
    """Add the keys of all files of a folder, prefix or archive to the inventory, without those that jobs wrote to root.

    empty: gets the local folders without photos. Raise UserError, naming the setting, if there are no files.
    """
    check_place(photos, setting)
    if archive.is_archive(photos):
        pages = chunks(archive.list_members(photos, setting), PAGE_KEYS)
    else:
        pages = list_pages(photos, empty)
        if root is not None:
            pages = without_own_files(pages, photos, root)
    progress = Progress("list", "keys")
    for page in pages:
        inventory.add_inputs(map(_reject_large, page))
        progress.add(len(page))
    if not progress.done:
        raise _nothing_found(photos, setting)


def _nothing_found(photos: str, setting: str) -> UserError:
    """Return the error of a place without files, with a name like that of a folder that does not exist."""
    path = storage.local_path(photos)
    if path is None or os.path.exists(path) or archive.is_archive(photos):
        hint = "; the credentials need permission to list it" if path is None else ""
        return UserError(f"`{setting}`: no files in {photos}. Check the path{hint}.")
    return UserError(f"`{setting}`: no folder {photos}; {suggest_beside(path) or 'check the path.'}")


def spelled_once(uri: str) -> str:
    """Return the URI of photos without a trailing slash or file://, so that each place has one spelling."""
    return uri.removeprefix("file://").rstrip("/") or uri


def _reject_large(file: Listed) -> Listed:
    """Return the file, with a reason if it is too large to be read into memory."""
    if file.reason is None and file.size > members.MAX_PHOTO_BYTES:
        return file._replace(reason=Reason.TOO_LARGE, detail=f"a file of {file.size / 2**20:,.0f} MiB")
    return file


def list_pages(uri: str, empty: list[str] | None = None) -> Iterator[list[Listed]]:
    """Yield all files below a URI, their keys relative to it, in pages of PAGE_KEYS in no order.

    empty: gets the local folders without photos. Yield nothing if the URI does not exist. Raise StorageError if it
    cannot be listed.
    """
    try:
        with storage.translate_errors(uri, "listed"):
            if (folder := storage.local_path(uri)) is None:
                bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
                yield from _Bucket(bucket, f"{prefix}/" if prefix else "").pages()
            else:
                yield from chunks(scan_folder(folder, empty), PAGE_KEYS)
    except FileNotFoundError:
        return


class _Bucket:
    """Keys below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix

    def pages(self) -> Iterator[list[Listed]]:
        """Yield all files, their keys relative to the prefix."""
        with ThreadPoolExecutor(THREADS) as pool:
            prefixes, files = self._expand_folders(pool)
            if files:
                yield files
            queue, running = deque(map(_PageRequest, prefixes)), set[Future[Any]]()
            while queue or running:
                while queue and len(running) < THREADS:
                    running.add(pool.submit(self._list_page, queue.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    files, next_requests = future.result()
                    queue.extendleft(next_requests)
                    if files:
                        yield files

    def _expand_folders(self, pool: ThreadPoolExecutor) -> tuple[list[str], list[Listed]]:
        """Return (prefixes, files) which together cover the bucket's prefix."""
        crowded: list[str] = []
        files: list[Listed] = []
        level = [self.prefix]
        while level and len(crowded) + len(level) < MIN_PREFIXES:
            listings = list(pool.map(self._list_folder, level))
            crowded += [prefix for prefix, listing in zip(level, listings, strict=True) if listing is None]
            files += [file for listing in listings if listing is not None for file in listing[1]]
            level = [folder for listing in listings if listing is not None for folder in listing[0]]
        return crowded + level, files

    def _list_folder(self, prefix: str) -> tuple[list[str], list[Listed]] | None:
        """Return the (folders, files) directly below a prefix, or None if there are more than MAX_PREFIXES."""
        folders: list[str] = []
        files: list[Listed] = []
        token = None
        while len(folders) + len(files) <= MAX_PREFIXES:
            response = self._request(_PageRequest(prefix, token), Delimiter="/")
            folders += [entry["Prefix"] for entry in response.get("CommonPrefixes", [])]
            files += self._files(response)
            if (token := response.get("NextContinuationToken")) is None:
                return folders, files
        return None

    def _list_page(self, request: _PageRequest) -> tuple[list[Listed], list[_PageRequest]]:
        """Return the files of a page, and the request for the next page, if any."""
        response = self._request(request)
        token = response.get("NextContinuationToken")
        return self._files(response), [] if token is None else [request._replace(token=token)]

    def _request(self, request: _PageRequest, **options: str) -> dict[str, Any]:
        if request.token is not None:
            options["ContinuationToken"] = request.token
        response: dict[str, Any] = s3.client().list_objects_v2(Bucket=self.bucket, Prefix=request.prefix, **options)
        return response

    def _files(self, response: dict[str, Any]) -> list[Listed]:
        """Return the files, their keys relative to the prefix; an empty one that ends with a slash is a folder."""
        files = (
            Listed(entry["Key"][len(self.prefix) :], entry["Size"], entry["ETag"].strip('"'))
            for entry in response.get("Contents", [])
            if entry["Size"] or not entry["Key"].endswith("/")
        )
        return [_reject_folder_name(file) for file in files]


def _reject_folder_name(file: Listed) -> Listed:
    """Return the file, with a reason if its key is that of a folder, as none of its tools can copy it to a disk."""
    if file.key and not file.key.endswith("/"):
        return file
    return file._replace(key=file.key or "/", reason=Reason.BAD_NAME, detail="the key ends with a slash")
