"""Parsers of labels: a CSV file or Stanford's devkit; see `folder_labels` for photos in one folder per class."""

import csv
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Literal, NamedTuple, NoReturn

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from carclass import storage
from carclass.errors import UserError
from carclass.ingestion.names import has_control_characters, is_utf8, remove_invisible

Subset = Literal["train", "test"]

_COLUMNS = ("img_name", "class", "subset")
SUBSETS: dict[str, Subset] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
"""Names of subsets, in lower case."""
VALIDATION_NAMES = ("val", "valid", "validation", "dev")
MAX_LISTED = 5
"""Bad lines that are named in an error."""
_VALIDATION_ADVICE = "use train: ingest holds out validation photos from train by itself"


class Label(NamedTuple):
    """Label of a photo: its key at the source, class and subset."""

    key: str
    label: str
    subset: Subset


class LabelsError(UserError):
    """Error in labels, with the source, the position in it, and a remedy."""


LocatedLabel = tuple[str, Label]
"""A label with its location for error messages, such as "labels.csv, line 2"."""


def read_labels(source: str) -> Iterator[LocatedLabel]:
    """Yield the labels of a CSV file or of the devkit's folder. Raise UserError if they cannot be read or parsed."""
    if source.lower().endswith(".csv"):
        try:
            with storage.open_stream(source) as stream:
                yield from parse_csv(stream, source=source)
        except OSError as error:
            raise _read_error(source, error) from error
    elif storage.exists(source):
        raise UserError(
            f"`ingest.labels`: {source} is a file, but not a .csv. Labels are a .csv with the columns "
            f"{','.join(_COLUMNS)}, or a folder with Stanford's devkit."
        )
    else:
        yield from _read_devkit(source)


def raise_contradictions(labels: Iterable[LocatedLabel], names: Sequence[str], total: int) -> NoReturn:
    """Raise the LabelsError for keys whose labels differ. names: the first of them; total: number of all."""
    first: dict[str, LocatedLabel] = {}
    problems: dict[str, str] = {}
    for location, label in labels:
        if label.key not in names or label.key in problems:
            continue
        earlier_location, earlier = first.setdefault(label.key, (location, label))
        if label != earlier:
            problems[label.key] = (
                f"{location}: {label.key} is {label.label} ({label.subset}), but {earlier.label} "
                f"({earlier.subset}) at {earlier_location}"
            )
    more = f"; and {total - len(names):,} more" if total > len(names) else ""
    raise LabelsError(f"{'; '.join(problems.values())}{more}. Keep the correct one of each.")


def parse_csv(stream: BinaryIO, *, source: str) -> Iterator[LocatedLabel]:
    """Parse a CSV file with the columns `img_name,class,subset` in any order; other columns are ignored.

    The file is UTF-8, with or without a BOM, with any line ends; names with commas need quotes. The key is `img_name`
    unchanged; spaces around class, subset and the names of columns are stripped. source: name of the file in errors.
    Raise LabelsError with the existing columns or, after all lines are parsed, the numbers of bad lines.
    """
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _parse_rows(text, source)


def _parse_rows(text: Iterable[str], source: str) -> Iterator[LocatedLabel]:
    """Parse the lines of a CSV file; see `parse_csv`."""
    reader = csv.reader(text, strict=True)
    has_labels, num_bad = False, 0
    problems: list[str] = []
    try:
        columns = [remove_invisible(name) for name in next(reader, [])]
        _check_text(columns, f"{source}, line 1")
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise LabelsError(
                f"{source}: no column {', '.join(missing)}; the first line has {columns}. "
                f"It needs {','.join(_COLUMNS)}, separated by commas."
            )
        indices = [columns.index(name) for name in _COLUMNS]
        for fields in filter(None, reader):  # skips empty lines
            location = f"{source}, line {reader.line_num}"
            try:
                label = _parse_row(fields, len(columns), indices, location)
            except LabelsError as error:
                num_bad += 1
                problems += [str(error)] if num_bad <= MAX_LISTED else []
                continue
            yield location, label
            has_labels = True
    except csv.Error as error:
        num_bad += 1
        problems.append(f"{source}, line {reader.line_num}: not valid CSV ({error}).")
    if problems:
        more = f" {num_bad - len(problems):,} more lines are wrong." if num_bad > len(problems) else ""
        raise LabelsError(" ".join(problems) + more)
    if not has_labels:
        raise LabelsError(f"{source}: no labels in it.")


def _parse_row(fields: list[str], num_columns: int, indices: Sequence[int], location: str) -> Label:
    """Return the label of a row of a CSV file. Raise LabelsError if the row is not valid."""
    _check_text(fields, location)
    if len(fields) != num_columns:
        raise LabelsError(
            f"{location}: {len(fields)} fields, but the first line has {num_columns}; names with a comma need quotes."
        )
    key, label, subset = (fields[index] for index in indices)
    return make_label(key, label, subset, location)


def _check_text(fields: list[str], location: str) -> None:
    """Raise LabelsError if fields are not UTF-8, which are decoded as surrogates, or have a NUL."""
    text = "".join(fields)
    if not text.isascii() and not is_utf8(text):
        raise LabelsError(f"{location}: not UTF-8; save it as UTF-8.")
    if "\0" in text:
        raise LabelsError(f"{location}: not valid CSV (a NUL character in it); save it as UTF-8.")


def parse_devkit(annos: bytes, meta: bytes, *, subset: Subset, source: str) -> Iterator[LocatedLabel]:
    """Parse Stanford's devkit: `cars_{train,test}_annos.mat` and `cars_meta.mat`, all of one subset.

    The key is the photo's `fname`. Class ids start at 1, as in MATLAB. Boxes are ignored. source: name of the
    annotations in errors. Raise LabelsError if a file is malformed.
    """
    annotations = _mat_variable(annos, "annotations", source)
    names = _mat_variable(meta, "class_names", f"{source} (its meta file)")
    fields = annotations.dtype.names or ()
    missing = [name for name in ("fname", "class") if name not in fields]
    if missing:
        raise LabelsError(
            f"{source}: the annotations have no field {', '.join(missing)} (found: {', '.join(fields)}). "
            "Stanford's cars_test_annos.mat has no classes; use cars_test_annos_withlabels.mat."
        )
    if not len(annotations):
        raise LabelsError(f"{source}: no labels in it.")
    for number, (key, class_id) in enumerate(annotations[["fname", "class"]], start=1):
        location = f"{source}, annotation {number} ({key})"
        if not (isinstance(class_id, int | np.integer) and 1 <= class_id <= len(names)):
            raise LabelsError(f"{location}: class {class_id} is not in the meta file's range of 1 to {len(names)}.")
        yield location, make_label(str(key), str(names[class_id - 1]), subset, location)


def make_label(key: str, label: str, subset: str, location: str) -> Label:
    """Return a validated Label, its class in NFC and without characters of no width.

    Raise LabelsError if a field is empty, the subset unknown, or the class has control characters.
    """
    label, subset = remove_invisible(label), remove_invisible(subset)
    if not remove_invisible(key):
        raise LabelsError(f"{location}: the photo's name is empty.")
    if not label:
        raise LabelsError(f"{location}: the class of {key} is empty.")
    if has_control_characters(label):
        raise LabelsError(f"{location}: the class {label!r} has a line break or another control character.")
    if subset.lower() not in SUBSETS:
        advice = _VALIDATION_ADVICE if subset.lower() in VALIDATION_NAMES else "expected train or test"
        raise LabelsError(f"{location}: the subset is {subset!r}; {advice}.")
    return Label(key, label, SUBSETS[subset.lower()])


def _mat_variable(data: bytes, name: str, source: str) -> np.ndarray:
    try:
        variables = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=[name])
    except (ValueError, TypeError, LookupError, OSError, MatReadError, NotImplementedError, zlib.error) as error:
        raise LabelsError(f"{source}: not a readable .mat file of version 5 ({error}).") from error
    if name not in variables:
        raise LabelsError(f"{source}: no variable {name!r}; check that it is a file of the devkit.")
    return np.atleast_1d(variables[name])


def _read_devkit(source: str) -> Iterator[LocatedLabel]:
    """Yield the labels of a devkit's folder; those of test are optional."""
    uri = storage.join(source, "cars_meta.mat")
    try:
        meta = storage.read_bytes(uri)
    except OSError as error:
        raise _read_error(uri, error) from error
    subsets: list[tuple[Subset, str]] = [
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ]
    for subset, name in subsets:
        uri = storage.join(source, name)
        if storage.exists(uri):
            for location, label in parse_devkit(storage.read_bytes(uri), meta, subset=subset, source=uri):
                yield location, label._replace(key=f"cars_{subset}/{label.key}")


def _read_error(uri: str, error: OSError) -> UserError:
    return UserError(
        f"`ingest.labels`: {uri} cannot be read ({error}). Set it to a .csv or a folder with Stanford's devkit "
        "(cars_meta.mat and cars_train_annos.mat), or omit it for photos in one folder per class."
    )
