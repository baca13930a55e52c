"""Labels of photos and the names of subsets; parsers are in `label_table`, `devkit` and `folder_labels`."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, NoReturn

from carclass.errors import UserError
from carclass.ingestion.names import has_control_characters, remove_invisible

Subset = Literal["train", "val", "test"]
SUBSETS: dict[str, Subset] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of subsets, in lower case."""
SUBSETS_TEXT = "train, val or test"


class Label(NamedTuple):
    """Label of a photo: its key at the source, class and subset, and the group with which it shares a split."""

    key: str
    label: str
    subset: Subset
    group: str | None = None


class LabelsError(UserError):
    """Error in labels, with the source, the position in it, and a remedy."""


LocatedLabel = tuple[str, Label]
"""A label with its location for error messages, such as "labels.csv, line 2"."""


def make_label(key: str, label: str, subset: str, location: str, group: str = "") -> Label:
    """Return a validated Label, its class in NFC and without characters of no width.

    Raise LabelsError if a field is empty, the subset unknown, or the class has control characters.
    """
    label, subset, group = map(remove_invisible, (label, subset, group))
    if not remove_invisible(key):
        raise LabelsError(f"{location}: the photo's name is empty.")
    if not label:
        raise LabelsError(f"{location}: the class of {key} is empty.")
    if has_control_characters(label):
        raise LabelsError(f"{location}: the class {label!r} has a line break or another control character.")
    if subset.lower() not in SUBSETS:
        raise LabelsError(f"{location}: the subset is {subset!r}; expected {SUBSETS_TEXT}.")
    return Label(key, label, SUBSETS[subset.lower()], group or None)


def raise_contradictions(labels: Iterable[LocatedLabel], names: Sequence[str], total: int) -> NoReturn:
    """Raise the LabelsError for keys whose labels differ. names: the first of them; total: number of all."""
    first: dict[str, LocatedLabel] = {}
    problems: dict[str, str] = {}
    named = ""  # location that the message begins with
    for location, label in labels:
        if label.key not in names or label.key in problems:
            continue
        earlier_location, earlier = first.setdefault(label.key, (location, label))
        if label != earlier:
            place = _without_file(location, named)
            named = named or location
            problems[label.key] = (
                f"{place}: {label.key} is {describe(label, earlier)}, but {describe(earlier, label)} at "
                f"{_without_file(earlier_location, named)}"
            )
    more = f"; and {total - len(names):,} more" if total > len(names) else ""
    raise LabelsError(f"{'; '.join(problems.values())}{more}. Keep the correct one of each.")


def _without_file(location: str, named: str) -> str:
    """Return a location as "line 2" if another one that was named before is in the same file."""
    file, found, line = location.rpartition(", line ")
    return f"line {line}" if found and named.startswith(f"{file}, line ") else location


def describe(label: Label, other: Label) -> str:
    """Return the class of a label, and its subset and group where another one has others."""
    details: list[str] = [label.subset] if label.subset != other.subset else []
    if label.group != other.group:
        details.append("no group" if label.group is None else f"group {label.group}")
    return f"{label.label} ({', '.join(details)})" if details else label.label
