"""Labels in a table: text with commas, semicolons or tabs, or JSON lines."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO

from carclass.config.ingest_settings import TABLE_SUFFIXES, ColumnRole
from carclass.ingestion.labels import Label, LabelsError, LocatedLabel, make_label
from carclass.ingestion.names import image_suffix, is_utf8, remove_invisible

JSON_SUFFIXES = (".jsonl", ".ndjson")
COLUMNS = {"name": "img_name", "class": "class", "subset": "subset"}
"""Columns of a label, by their names in `ingest.columns`; the subset may be missing, then all photos are train."""
SUBSET_SYNONYMS = ("split", "set", "partition", "fold", "usage")
"""Names of columns that probably have the subsets: one of them is not passed over in silence."""
COLUMN_SYNONYMS: dict[ColumnRole, tuple[str, ...]] = {
    "name": (
        "image_name", "image", "img", "filename", "file_name", "file", "image_path", "img_path", "filepath",
        "file_path", "path", "photo", "image_id", "id", "key",
    ),
    "class": (
        "class_name", "classname", "class_label", "label", "labels", "category", "target", "make", "model",
        "make_model", "brand", "manufacturer", "type", "vehicle_type", "body_type",
    ),
    "subset": SUBSET_SYNONYMS,
}  # fmt: skip
"""Other names of the columns of a label that tables often have, the likeliest first; several for the class are an
error."""
DELIMITERS = (",", ";", "\t")
EXCEL_DELIMITER = re.compile('"?sep=(.)"?')
"""First line by which a table names its delimiter, for Excel."""
MAX_LISTED = 5
"""Bad lines that are named in an error."""
Fields = list[str] | LabelsError
"""Fields of a line, or the error that it has."""


def is_table(uri: str) -> bool:
    """Return True if the name is that of a table of labels."""
    return uri.lower().endswith(TABLE_SUFFIXES)


def parse_table(
    stream: BinaryIO, *, source: str, columns: Mapping[ColumnRole, str] | None = None, group: str | None = None
) -> Iterator[LocatedLabel]:
    """Parse a table with the columns `img_name,class,subset` in any order; other columns are ignored.

    The file is UTF-8, with or without a BOM, with any line ends. It has a line with the names of columns and commas,
    semicolons or tabs between the fields (those with one need quotes), or an object of JSON per line. The key is
    `img_name` unchanged; spaces around class, subset and the names of columns are stripped. source: name of the file,
    whose ending tells JSON from others. columns: other names, see COLUMNS. group: column of the groups. Raise
    LabelsError with the existing columns or, after all lines are parsed, the numbers of bad lines.
    """
    given: dict[str, str] = dict((columns or {}).items())
    names, chosen = {**COLUMNS, **given}, {*given}
    if group is not None:
        names, chosen = {**names, "group": group}, {*chosen, "group"}
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        is_json = source.lower().endswith(JSON_SUFFIXES)
        rows = _json_rows(text, source) if is_json else _text_rows(text, source, names.values())
        yield from _parse_rows(rows, source, names, chosen)


def read_column_names(stream: BinaryIO, *, source: str) -> list[str]:
    """Return the names of a table's columns. Raise LabelsError if the first line cannot be parsed."""
    with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
        is_json = source.lower().endswith(JSON_SUFFIXES)
        _, names = next(_json_rows(text, source) if is_json else _text_rows(text, source, ()), ("", []))
        if isinstance(names, LabelsError):
            raise names
        return [remove_invisible(name) for name in names]


def guess_columns(found: Sequence[str], given: Mapping[ColumnRole, str], *, source: str) -> dict[ColumnRole, str]:
    """Return the columns of a label under other names than the usual ones, as `ingest.columns`, with those given.

    Raise LabelsError if several columns may have the class.
    """
    usual, names = {name.lower() for name in found}, {_fold(name): name for name in reversed(found)}
    others = names.keys() - {_fold(name) for name in given.values()}
    guessed: dict[ColumnRole, str] = {}
    for role, synonyms in COLUMN_SYNONYMS.items():
        candidates = [names[name] for name in (COLUMNS[role], *synonyms) if name in others]
        if role in given or COLUMNS[role] in usual or not candidates:
            continue
        if role == "class" and len(candidates) > 1:
            raise LabelsError(
                f"{source}: several columns may have the class: {', '.join(candidates)}. Name one by `ingest.columns`, "
                f"as in --columns '{{class: {candidates[0]}}}'."
            )
        guessed[role] = candidates[0]
    return {**guessed, **given}


def _fold(name: str) -> str:
    """Return the name of a column in the spelling of COLUMN_SYNONYMS."""
    return re.sub(r"[\s\-]+", "_", name.lower())


def _parse_rows(
    rows: Iterator[tuple[str, Fields]], source: str, names: Mapping[str, str], chosen: set[str]
) -> Iterator[LocatedLabel]:
    """Yield the labels of rows, the first of which has the names of the columns."""
    location, header = next(rows, (f"{source}, line 1", []))
    if isinstance(header, LabelsError):
        raise header
    _check_text(header, location)
    indices = _find_columns(header, source, names, chosen)
    has_labels, num_bad = False, 0
    problems: dict[str, list[str]] = {}  # text → numbers of lines
    for location, fields in rows:
        try:
            label = _parse_row(fields, len(header), indices, location)
        except LabelsError as error:
            num_bad += 1
            if num_bad <= MAX_LISTED:
                text = str(error).removeprefix(f"{location}: ").removesuffix(".")
                problems.setdefault(text, []).append(location.removeprefix(f"{source}, line "))
            continue
        yield location, label
        has_labels = True
    if problems:
        places = [
            f"line{'s' if numbers[1:] else ''} {', '.join(numbers)}: {text}" for text, numbers in problems.items()
        ]
        more = f" {num_bad - MAX_LISTED:,} more lines are wrong." if num_bad > MAX_LISTED else ""
        raise LabelsError(f"{source}, {'; '.join(places)}.{more}")
    if not has_labels:
        raise LabelsError(f"{source}: no labels in it.")


def _text_rows(text: io.TextIOBase, source: str, names: Iterable[str]) -> Iterator[tuple[str, Fields]]:
    """Yield the fields of each line of delimited text with its location. names: of columns to look for."""
    first = text.readline()
    given = EXCEL_DELIMITER.fullmatch(first.strip("\r\n"))
    if given is not None:
        first = text.readline()
    delimiter, skipped = (_find_delimiter(first, {*names}), 0) if given is None else (given[1], 1)
    reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
    try:
        for fields in filter(None, reader):  # skips empty lines
            yield f"{source}, line {reader.line_num + skipped}", fields
    except csv.Error as error:
        location = f"{source}, line {reader.line_num + skipped}"
        yield location, LabelsError(f"{location}: not valid CSV ({error}).")


def _find_delimiter(first: str, names: set[str]) -> str:
    """Return the delimiter by which the first line has most of the columns, or else most fields."""

    def score(delimiter: str) -> tuple[int, int]:
        fields = next(csv.reader([first], delimiter=delimiter), [])
        found = {remove_invisible(field).lower() for field in fields}
        return len(found & {name.lower() for name in names}), len(fields)

    return max(DELIMITERS, key=score)


def _json_rows(text: Iterable[str], source: str) -> Iterator[tuple[str, Fields]]:
    """Yield the keys of the first object, then the values of these keys in each object, with their locations."""
    keys: list[str] | None = None
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        location = f"{source}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            row = LabelsError(f'{location}: not an object of JSON, such as {{"img_name": "a.jpg"}} ({error}).')
        if isinstance(row, LabelsError):
            yield location, row
            continue
        if keys is None:
            keys = list(row)
            yield location, keys
        if added := [key for key in row if key not in keys]:
            yield (
                location,
                LabelsError(f"{location}: key {added[0]}, which the first line lacks: add it there, as null."),
            )
            continue
        yield location, [_json_text(row.get(key)) for key in keys]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _json_text(value: object) -> str:
    """Return a value as the text of a field: numbers as they are written, nothing for null and for other types."""
    is_plain = isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool))
    return str(value) if is_plain else ""


def _find_columns(header: list[str], source: str, names: Mapping[str, str], chosen: set[str]) -> dict[str, int]:
    """Return the indices of the columns of a label. Raise LabelsError if one is missing."""
    found = [remove_invisible(name) for name in header]
    folded = [name.lower() for name in found]
    indices = {
        role: found.index(name) if name in found else folded.index(name.lower())
        for role, name in names.items()
        if name.lower() in folded
    }
    for name in names.values():
        if (found if name in found else folded).count(name if name in found else name.lower()) > 1:
            raise LabelsError(f"{source}: the first line has the column {name} twice. Remove or rename one.")
    missing = [name for role, name in names.items() if role not in indices and (role != "subset" or role in chosen)]
    if missing and any(map(image_suffix, found)):
        raise LabelsError(
            f"{source}: the first line has no names of columns, but {found}. Add a line above it, such as "
            f"{','.join(list(names.values())[:2])}."
        )
    if missing:
        raise LabelsError(
            f"{source}: no column {', '.join(missing)}; the first line has {found}. It needs "
            f"{','.join(names.values())} (the last may be missing), separated by commas, semicolons or tabs; "
            f"`ingest.columns` gives them other names, as in --columns '{_example(names, indices, found)}'."
        )
    similar = next((name for name in found if name.lower() in SUBSET_SYNONYMS), None)
    if "subset" not in indices and similar is not None:
        raise LabelsError(
            f"{source}: no column {names['subset']}, but one named {similar}. If it has the subsets, set "
            f"`ingest.columns: {{subset: {similar}}}`; if not, rename it."
        )
    return indices


def _example(names: Mapping[str, str], indices: Mapping[str, int], found: Sequence[str]) -> str:
    """Return a mapping of the columns that are missing, but for the optional one, to others of the first line."""
    missing = [role for role in names if role not in indices and role != "subset"]
    others = [name for i, name in enumerate(found) if i not in indices.values()]
    if len(others) < len(missing):
        missing, others = ["name", "class"], ["file", "model"]
    pairs = zip(missing, others, strict=False)
    return f"{{{', '.join(f'{role}: {name}' for role, name in pairs)}}}"


def _parse_row(fields: Fields, num_columns: int, indices: Mapping[str, int], location: str) -> Label:
    """Return the label of a row. Raise LabelsError if the row is not valid."""
    if isinstance(fields, LabelsError):
        raise fields
    _check_text(fields, location)
    if len(fields) != num_columns:
        raise LabelsError(
            f"{location}: {len(fields)} fields, but the first line has {num_columns}; "
            "names with the separator need quotes."
        )
    values = {role: fields[index] for role, index in indices.items()}
    subset = values.get("subset", "train")
    return make_label(values["name"], values["class"], subset, location, values.get("group", ""))


def _check_text(fields: Sequence[str], location: str) -> None:
    """Raise LabelsError if fields are not UTF-8, which are decoded as surrogates, or have a NUL."""
    text = "".join(fields)
    if not text.isascii() and not is_utf8(text):
        raise LabelsError(f"{location}: not UTF-8; save it as UTF-8.")
    if "\0" in text:
        raise LabelsError(f"{location}: not valid CSV (a NUL character in it); save it as UTF-8.")
