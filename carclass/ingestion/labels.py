"""Labels as people keep them (a CSV, Stanford's devkit, one folder per class) -> one `Label` after the other."""

import csv
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Literal, NamedTuple, NoReturn, cast

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError

Subset = Literal["train", "test"]

_COLUMNS = ("img_name", "class", "subset")
_VALIDATION_NAMES = ("val", "valid", "validation", "dev")
_VALIDATION_ADVICE = "make it train: validation photos are held out of train by this project itself"


class Label(NamedTuple):
    """What the labels say of one photo: its key at the source, its class and its subset."""

    key: str
    label: str
    subset: Subset


class LabelsError(UserError):
    """Labels that cannot be used; the message says which source, where in it, and what to do."""


def parse_csv(stream: BinaryIO, *, source: str) -> Iterator[tuple[str, Label]]:
    """Labels of a CSV file with the columns `img_name,class,subset`, in any order; others are ignored.

    Each comes with where it is, in words. The key is `img_name` as given; spaces around class and subset are dropped.
    UTF-8, with or without a BOM, any line ends, names with commas in quotes. `source` names the file in errors. Raises
    LabelsError with the columns found, or the line number.
    """
    reader = csv.reader(_lines(stream, source), strict=True)
    found = False
    try:
        columns = next(reader, [])
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise LabelsError(
                f"{source}: no column {', '.join(missing)}; the first line has {columns}. "
                f"It needs {','.join(_COLUMNS)}, with commas between."
            )
        places = [columns.index(name) for name in _COLUMNS]
        for fields in filter(None, reader):  # an empty line is no row
            where = f"{source}, line {reader.line_num}"
            if len(fields) != len(columns):
                raise LabelsError(
                    f"{where}: {len(fields)} fields where the first line has {len(columns)}; "
                    "a name with a comma needs quotes."
                )
            key, label, subset = (fields[place] for place in places)
            yield where, _label(key, label, subset, where)
            found = True
    except csv.Error as error:
        raise LabelsError(f"{source}, line {reader.line_num}: not valid CSV ({error}).") from error
    if not found:
        raise LabelsError(f"{source}: no labels in it.")


def parse_devkit(annos: bytes, meta: bytes, *, subset: Subset, source: str) -> Iterator[tuple[str, Label]]:
    """Labels of Stanford's devkit: `cars_{train,test}_annos.mat` and `cars_meta.mat`, all one subset.

    Each comes with where it is, in words. The key is the photo's `fname`. Class ids count from 1, as in MATLAB. The
    boxes are not read. `source` names the annotations in errors. Raises LabelsError.
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
        where = f"{source}, annotation {number} ({key})"
        if not (isinstance(class_id, int | np.integer) and 1 <= class_id <= len(names)):
            raise LabelsError(f"{where}: class {class_id} is not one of the meta file's 1 to {len(names)}.")
        yield where, _label(str(key), str(names[class_id - 1]), subset, where)


def parse_folders(keys: Callable[[], Iterable[str]], *, source: str) -> Iterator[tuple[str, Label]]:
    """Labels of a tree with one folder per class, from the keys of its files ("/" between folders).

    Either `<class>/<file>`, all of it train, or `<subset>/<class>/<file>` with subset train or test; one
    layout for the whole tree. Hidden names (`.DS_Store`) and files beside the folders get no label. Each label comes
    with where it is, in words. keys: asked for twice. `source` names the tree in errors. Raises LabelsError for any
    other shape.
    """
    by_depth: dict[int, str] = {}
    for key in filter(_in_folders, keys()):
        by_depth.setdefault(key.count("/"), key)
    if not by_depth:
        raise LabelsError(f"{source}: no class folders; expected <class>/<file> or <subset>/<class>/<file>.")
    if len(by_depth) > 1 or max(by_depth) > 2:
        raise LabelsError(
            f"{source}: expected <class>/<file> or <subset>/<class>/<file> throughout, "
            f"but found {' and '.join(by_depth[depth] for depth in sorted(by_depth))}. "
            "A slash in a class name makes two folders: rename them to one."
        )
    for key in filter(_in_folders, keys()):
        where = f"{source}, {key}"
        yield where, _folder_label(key, where)


def refuse_contradiction(rows: Iterable[tuple[str, Label]], name: str) -> NoReturn:
    """Raises the LabelsError that says where two labels of one name differ. rows: all labels, and where each is."""
    of_name = ((where, label) for where, label in rows if label.key == name)
    earlier_where, earlier = next(of_name)
    where, label = next((where, label) for where, label in of_name if label != earlier)
    raise LabelsError(
        f"{where}: {name} is {label.label} ({label.subset}), but {earlier.label} "
        f"({earlier.subset}) at {earlier_where}; keep the right one."
    )


def _in_folders(key: str) -> bool:
    return "/" in key and not any(part[:1] == "." for part in key.split("/"))


def _folder_label(key: str, where: str) -> Label:
    *folders, _ = key.split("/")
    if len(folders) == 2:
        return _label(key, folders[1], folders[0], where)
    if folders[0] in ("train", "test", *_VALIDATION_NAMES):
        raise LabelsError(f"{where}: lies in the subset's folder; expected {folders[0]}/<class>/<file>.")
    return _label(key, folders[0], "train", where)


def _label(key: str, label: str, subset: str, where: str) -> Label:
    label, subset = label.strip(), subset.strip()
    if not key.strip():
        raise LabelsError(f"{where}: the photo's name is empty.")
    if not label:
        raise LabelsError(f"{where}: the class of {key} is empty.")
    if subset not in ("train", "test"):
        advice = _VALIDATION_ADVICE if subset.lower() in _VALIDATION_NAMES else "expected train or test"
        raise LabelsError(f"{where}: the subset is {subset!r}; {advice}.")
    return Label(key, label, cast(Subset, subset))


def _lines(stream: BinaryIO, source: str) -> Iterator[str]:
    """The lines of a text, one by one, each with its end."""
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        for number, line in enumerate(text, start=1):
            try:
                yield line if line.isascii() else line.encode(errors="surrogateescape").decode()
            except UnicodeDecodeError as error:
                raise LabelsError(f"{source}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8.") from error


def _mat_variable(data: bytes, name: str, source: str) -> np.ndarray:
    try:
        variables = loadmat(io.BytesIO(data), squeeze_me=True, variable_names=[name])
    except (ValueError, TypeError, LookupError, OSError, MatReadError, NotImplementedError, zlib.error) as error:
        raise LabelsError(f"{source}: not a readable .mat file of version 5 ({error}).") from error
    if name not in variables:
        raise LabelsError(f"{source}: no variable {name!r} in it; is it the devkit's file?")
    return np.atleast_1d(variables[name])


def read_labels(settings: IngestSettings, inventory: Inventory) -> Iterator[tuple[str, Label]]:
    """Labels in whichever form they come: CSV, Stanford's devkit, or a folder per class; each with where it is."""
    source = settings.labels
    if source is None:
        yield from parse_folders(inventory.keys, source=settings.photos)
    elif source.endswith(".csv"):
        try:
            with storage.open_stream(source) as stream:
                yield from parse_csv(stream, source=source)
        except OSError as error:
            raise _unreadable_labels(source, error) from error
    else:
        yield from _read_devkit(source)


def _read_devkit(source: str) -> Iterator[tuple[str, Label]]:
    uri = storage.join(source, "cars_meta.mat")
    try:
        meta = storage.read_bytes(uri)
    except OSError as error:
        raise _unreadable_labels(uri, error) from error
    subsets: list[tuple[Subset, str]] = [
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ]
    for subset, name in subsets:
        uri = storage.join(source, name)
        if storage.exists(uri):
            for where, row in parse_devkit(storage.read_bytes(uri), meta, subset=subset, source=uri):
                yield where, row._replace(key=f"cars_{subset}/{row.key}")


def _unreadable_labels(uri: str, error: OSError) -> UserError:
    return UserError(
        f"`ingest.labels`: {uri} cannot be read ({error}). Give a .csv, or the folder of Stanford's devkit "
        "(cars_meta.mat and cars_train_annos.mat), or leave it out for photos in a folder per class."
    )
