"""Labels of photos in a tree with one folder per class."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from carclass.data.quarantine import Reason
from carclass.ingestion.labels import SUBSETS, SUBSETS_TEXT, LabelsError, LocatedLabel, make_label
from carclass.ingestion.names import has_control_characters, is_junk, may_be_photo, normalise_key

MAX_MISPLACED = 0.1
"""Largest share of photos that may be at another depth than the rest; they get no label."""
MAX_EXAMPLES = 3
SLASH_ADVICE = (
    "Move them to the folders of their classes; a class name with a slash makes two folders: rename them to one."
)
SUBSET_ADVICE = "With folders of subsets, all classes must be in them: move the photos."


class NoClassFoldersError(LabelsError):
    """Error of a tree in which no photo lies in a folder of a class."""


@dataclass
class _Level:
    """Photos at one depth: below the same number of folders."""

    number: int = 0
    shared: list[str] | None = None  # leading folders of all
    examples: list[str] = field(default_factory=list)
    has_subsets: bool = False  # one of the folders above the last ones is that of a subset

    def add(self, key: str, folders: list[str]) -> None:
        """Count a photo."""
        self.number += 1
        self.has_subsets = self.has_subsets or (len(folders) > 1 and folders[-2].lower() in SUBSETS)
        pairs = zip(folders if self.shared is None else self.shared, folders, strict=False)
        self.shared = [name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(key)


class ClassFolders(NamedTuple):
    """Place of the classes' folders in a tree: `<class>/<file>`, or `<subset>/<class>/<file>` at the depth 2."""

    shared: list[str]
    depth: int

    @property
    def text(self) -> str:
        """Return the layout in words."""
        kind = "one folder per class" if self.depth == 1 else "folders of subsets, with one folder per class in each"
        return f"{kind}, below {'/'.join(self.shared)}" if self.shared else kind

    def problem(self, key: str) -> tuple[Reason, str] | None:
        """Return the reason and detail of a photo that is in no folder of a class."""
        folders = _folders(key)
        return None if folders is None else self._misplaced(key, folders)

    def _misplaced(self, key: str, folders: list[str]) -> tuple[Reason, str] | None:
        if folders[-1].lower() in SUBSETS:
            return Reason.NO_LABEL, "in the folder of a subset, outside of the folders of classes"
        if folders[: len(self.shared)] != self.shared or len(folders) < len(self.shared) + self.depth:
            return Reason.NO_LABEL, "outside of the folders of classes"
        if len(folders) > len(self.shared) + self.depth:
            return Reason.NO_LABEL, "deeper than the folders of classes"
        if self._is_beside_subsets(folders) and not may_be_photo(key):
            return Reason.NO_LABEL, f"not a photo by its name, in {folders[-2]!r} beside the folders of subsets"
        if has_control_characters(folders[-1]):
            return Reason.BAD_NAME, f"the class {folders[-1]!r} has a line break or another control character"
        return None

    def _is_beside_subsets(self, folders: list[str]) -> bool:
        return self.depth == 2 and folders[-2].lower() not in SUBSETS

    def labels(self, keys: Iterable[str], source: str) -> Iterator[LocatedLabel]:
        """Yield the labels of the photos in folders of classes. Raise LabelsError for an unknown subset."""
        for key in keys:
            if (folders := _folders(key)) is not None and self._misplaced(key, folders) is None:
                location = f"{source}, {key}"
                if self._is_beside_subsets(folders):
                    raise LabelsError(
                        f"{location}: the subset is {folders[-2]!r}; expected {SUBSETS_TEXT}. Move the folder "
                        f"{'/'.join(folders[:-1])} out of {source}, or its classes into the folder of a subset."
                    )
                yield location, make_label(key, folders[-1], folders[-2] if self.depth == 2 else "train", location)


def find_classes(keys: Callable[[], Iterable[str]], *, source: str) -> ClassFolders:
    """Return the place of the classes' folders: the depth of most photos, below the folders that these share.

    Files that are no photos by their names, and photos at other depths if they are few, do not count. keys: called up
    to three times; source: name of the tree in errors. Raise LabelsError for any other tree.
    """
    levels = _find_levels(filter(may_be_photo, keys())) or _find_levels(keys())
    if not levels:
        raise NoClassFoldersError(_no_folders_text(source, keys))
    depth, most = max(levels.items(), key=lambda item: item[1].number)
    shared = (most.shared or [])[: depth - 1]
    count = next((i for i, name in enumerate(shared) if name.lower() in SUBSETS), len(shared))
    others = {other: level for other, level in levels.items() if other != depth}
    num_others = sum(level.number for level in others.values())
    if depth - count > 2 or num_others > MAX_MISPLACED * (most.number + num_others):
        raise LabelsError(_depths_text(source, others, depth, most))
    if depth - count == 2 and not most.has_subsets:
        raise LabelsError(
            f"{source}: the photos are in two levels of folders ({', '.join(most.examples)}), and no folder of the "
            f"upper level is {SUBSETS_TEXT}. If the upper folders are subsets, name them so; if the lower ones are the "
            "classes, move them into one folder; if the upper ones are, move their photos into them."
        )
    return ClassFolders(shared[:count], depth - count)


def _find_levels(keys: Iterable[str]) -> dict[int, _Level]:
    """Return the photos in folders of classes by depth."""
    levels: dict[int, _Level] = {}
    for key in keys:
        if (folders := _folders(key)) and folders[-1].lower() not in SUBSETS:
            levels.setdefault(len(folders), _Level()).add(key, folders)
    return levels


def _no_folders_text(source: str, keys: Callable[[], Iterable[str]]) -> str:
    """Return the error of a tree in which no photo is in a folder of a class."""
    outside = next((key for key in keys() if _folders(key)), None)
    if outside is None and (first := next(iter(keys()), None)) is not None and all(map(is_junk, keys())):
        return f"{source}: no photos in it, only files of other kinds by their names, such as {first}. Check the path."
    return (
        f"{source}: {f'{outside} is outside of a class folder' if outside else 'no class folders'}; "
        "expected <class>/<file> or <subset>/<class>/<file>, or the name of a table (`ingest.labels`, or --labels)."
    )


def _depths_text(source: str, others: dict[int, _Level], depth: int, most: _Level) -> str:
    """Return the error of a tree of several depths, or of one that is too deep: the fewest photos come first."""
    fewest = sorted(others.items(), key=lambda item: item[1].number)
    found = [f"{level.number:,} {_deep(other)} ({', '.join(level.examples)})" for other, level in fewest]
    found.append(f"{most.number:,} {_deep(depth)}" + ("" if others else f" ({', '.join(most.examples)})"))
    tops = {example.split("/")[0].lower() for level in others.values() for example in level.examples}
    advice = SLASH_ADVICE if tops.isdisjoint(SUBSETS) else SUBSET_ADVICE
    return (
        f"{source}: expected <class>/<file> or <subset>/<class>/<file> throughout, but of the photos, "
        f"{' and '.join(found)}. {advice}"
    )


def _deep(depth: int) -> str:
    return f"are {depth} folder{'s' if depth > 1 else ''} deep"


def _folders(key: str) -> list[str] | None:
    """Return the folders of a photo, or None for a file that is junk, outside of the source or in no folder."""
    *folders, _ = normalise_key(key).split("/")
    return folders if folders and ".." not in folders and not is_junk(key) else None
