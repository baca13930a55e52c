"""Files that lie in the folder of photos: those that jobs write there, if it holds `root`, are no inputs."""

import logging
import os
from collections.abc import Iterator

from carclass import storage
from carclass.data.inventory import Listed

log = logging.getLogger(__name__)
FOLDERS = ("datasets", "experiments", "features", "previews", "replaced", "sample/photos", "sweeps", "weights")
"""Folders below a root."""


def own_prefixes(photos: str, root: str) -> tuple[str, ...]:
    """Return the prefixes of the keys of files that jobs wrote; none if root does not lie within the photos."""
    folder, own = _place(photos), _place(root)
    inner = os.path.relpath(own, folder) if _is_same_store(photos, root) else ".."
    if inner.split("/")[0] == "..":
        return ()
    return tuple(f"{name}/" if inner == "." else f"{inner}/{name}/" for name in FOLDERS)


def holds_own_files(folder: str, photos: str, root: str) -> bool:
    """Return True if a folder of the photos, given by its key, is one of jobs or holds one."""
    return any(f"{folder}/".startswith(own) or own.startswith(f"{folder}/") for own in own_prefixes(photos, root))


def key_below(photos: str, uri: str) -> str | None:
    """Return the key of a file that lies within the folder or prefix of photos; None for one that does not."""
    folder, place = f"{_place(photos)}/", _place(uri)
    return place.removeprefix(folder) if _is_same_store(photos, uri) and place.startswith(folder) else None


def without_own_files(pages: Iterator[list[Listed]], photos: str, root: str) -> Iterator[list[Listed]]:
    """Yield the pages without own files, which are counted in a log line."""
    prefixes, count = own_prefixes(photos, root), 0
    for page in pages:
        others = [file for file in page if not file.key.startswith(prefixes)] if prefixes else page
        count += len(page) - len(others)
        if others:
            yield others
    if count:
        text = "list: `root` %s lies in the folder of photos; %s files written by jobs are left out"
        log.info(text, root, f"{count:,}")


def _is_same_store(photos: str, root: str) -> bool:
    return (storage.local_path(photos) is None) == (storage.local_path(root) is None)


def _place(uri: str) -> str:
    """Return a path that tells which place lies within which: links are resolved."""
    path = storage.local_path(uri)
    return "/" + uri.removeprefix("s3://").rstrip("/") if path is None else os.path.realpath(path)
