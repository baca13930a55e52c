"""Labels of photos in a tree with one folder per class."""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from carclass.ingestion.labels import SUBSETS, VALIDATION_NAMES, LabelsError, LocatedLabel, make_label
from carclass.ingestion.names import is_junk, normalise_path

log = logging.getLogger(__name__)


def parse_folders(keys: Callable[[], Iterable[str]], *, source: str) -> Iterator[LocatedLabel]:
    """Derive labels from a tree with one folder per class.

    The tree is either `<class>/<file>`, all train, or `<subset>/<class>/<file>` with subset train or test; folders that
    all photos share may precede. Junk and files outside the folders of classes get no label. keys: called three times;
    source: name of the tree in errors. Raise LabelsError for any other tree.
    """
    num_shared = _count_shared_folders(keys)
    examples: dict[int, str] = {}
    outside = None
    for key, folders in _foldered(keys, num_shared):
        if _is_outside(folders):
            outside = outside or key
        else:
            examples.setdefault(len(folders), key)
    if not examples:
        raise LabelsError(
            f"{source}: {f'{outside} is outside of a class folder' if outside else 'no class folders'}; "
            "expected <class>/<file> or <subset>/<class>/<file>."
        )
    if len(examples) > 1 or max(examples) > 2:
        raise LabelsError(
            f"{source}: expected <class>/<file> or <subset>/<class>/<file> throughout, "
            f"but found {' and '.join(examples[depth] for depth in sorted(examples))}. "
            "A class name with a slash makes two folders: rename them to one."
        )
    for key, folders in _foldered(keys, num_shared):
        if not _is_outside(folders):
            subset, label = folders if len(folders) == 2 else ("train", folders[0])
            location = f"{source}, {key}"
            yield location, make_label(key, label, subset, location)


def _foldered(keys: Callable[[], Iterable[str]], num_shared: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yield each key in a folder that is not junk, with its folders below the shared ones."""
    for key in keys():
        *folders, _ = normalise_path(key).split("/")
        if folders and ".." not in folders and not is_junk(key):
            yield key, folders[num_shared:]


def _is_outside(folders: list[str]) -> bool:
    """Return True for a file beside the folders of classes."""
    return not folders or (len(folders) == 1 and folders[0].lower() in (*SUBSETS, *VALIDATION_NAMES))


def _count_shared_folders(keys: Callable[[], Iterable[str]]) -> int:
    """Return the number of leading folders that all photos share, without those of subsets and classes."""
    shared: list[str] | None = None
    max_depth = 0
    for _, folders in _foldered(keys):
        pairs = zip(folders if shared is None else shared, folders, strict=False)
        shared = [name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        max_depth = max(max_depth, len(folders))
    shared = (shared or [])[: max(max_depth - 1, 0)]
    count = next((i for i, name in enumerate(shared) if name.lower() in (*SUBSETS, *VALIDATION_NAMES)), len(shared))
    if count:
        log.info("ingest: the folders of classes are looked for in %s", "/".join(shared[:count]))
    return count
