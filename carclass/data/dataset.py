"""Datasets on storage: Parquet parts, quarantine, and a manifest that is written last.

<root>/datasets/<name>/parts/*.parquet       one row per photo
<root>/datasets/<name>/quarantine/*.parquet  one row per input that could not become a photo, with the reason
<root>/datasets/<name>/manifest.json         settings, counts, hash of every part; written last, to publish it

No input is lost: inputs = rows + quarantined, each key once, checked before the manifest is written. A resumed job
recognizes its finished parts by their settings and writes the missing ones.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import NativeFile

from carclass import storage
from carclass.data import formats
from carclass.data.formats import json_text
from carclass.errors import UserError, unknown_name
from carclass.formatting import number_text
from carclass.progress import table

ROW = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the source photo's bytes
        ("key", pa.string()),  # path of the photo, relative to its source
        ("label", pa.string()),
        ("split", pa.string()),  # train, val or test
        ("width", pa.int32()),  # pixels of `image`
        ("height", pa.int32()),
        ("image", pa.binary()),  # encoded
    ]
)
DETECTION = pa.schema(
    [
        ("outcome", pa.string()),  # vehicle or no_vehicle
        ("vehicle_class", pa.string()),
        ("score", pa.float32()),
        ("num_vehicles", pa.int32()),
        ("several_vehicles", pa.bool_()),  # another vehicle is at least half as large
        ("touches_border", pa.bool_()),
        ("area_fraction", pa.float32()),  # share of the photo covered by the mask, or by the box without a mask
        ("stability", pa.float32()),  # of the mask under changes of its threshold, 0 to 1
        ("box", pa.list_(pa.float32())),  # x1, y1, x2, y2 in the source dataset's pixels
        ("mask", pa.string()),  # compressed COCO RLE over the source dataset's photo
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
    ]
)
MASKED_ROW = pa.schema([*ROW, *DETECTION])
QUARANTINE = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("attempts", pa.int32()),
    ]
)
SPLITS = ("train", "val", "test")
CONTENT_KEY = b"carclass.content"
"""Key of a part's metadata with the hash of its content, see publishing.content_digest."""


class Part(NamedTuple):
    """A Parquet part of a dataset as its manifest names it."""

    uri: str
    content: str | None  # see publishing.content_digest; None in a manifest of format 1

    def read(self, columns: Sequence[str], filters: pc.Expression | None = None) -> pa.Table:
        """Read columns of the rows that pass the filters, see read_part."""
        return read_part(self.uri, columns, filters, self.content)


class Place(NamedTuple):
    """Place of a row."""

    part: str  # URI
    position: int  # in the part


@dataclass(frozen=True)
class Dataset:
    """A published dataset."""

    uri: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the last component of the URI."""
        return self.uri.rsplit("/", 1)[1]

    @property
    def classes(self) -> list[str]:
        """Return the class names in the order of their indices."""
        return list(self.manifest["classes"])

    @property
    def parts(self) -> list[Part]:
        """Return the Parquet parts, in the order of the manifest."""
        return [Part(storage.join(self.uri, path), self.contents.get(path)) for path in self.manifest["parts"]]

    @property
    def part_uris(self) -> list[str]:
        """Return the URIs of the Parquet parts, in the order of the manifest."""
        return [part.uri for part in self.parts]

    @property
    def quarantine(self) -> list[str]:
        """Return the paths of the quarantine's files; none in a manifest of format 1, which does not list them."""
        return list(self.manifest.get("quarantine", []))

    @cached_property
    def contents(self) -> dict[str, str]:
        """Return the hash of the content of every file by its path; none in a manifest of format 1, which has none."""
        if self.manifest.get("format", 1) == 1:
            return {}
        return {**self.manifest["parts"], **self.manifest.get("quarantine", {})}

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of the classes and the content of all rows, by which runs identify their dataset.

        It depends neither on the order of rows nor on the files that hold them. A manifest of format 1 has no hashes of
        parts: its digest is, as it was, the sha256 of the manifest.
        """
        if self.manifest.get("format", 1) == 1:
            return storage.sha256(to_json({key: self.manifest[key] for key in self.manifest if key != "format"}))
        content = sum(int(part, 16) for part in self.manifest["parts"].values()) % 2**256
        return storage.sha256(to_json([self.classes, f"{content:064x}"]))

    @property
    def held_out(self) -> dict[str, float]:
        """Return the splits whose photos come from the source's train subset, with their shares of it."""
        # Former formats held out val alone.
        former = {"val": float(self.manifest["settings"].get("val_fraction", 0))}
        shares: dict[str, float] = self.manifest.get("held_out", former)
        return {split: share for split, share in shares.items() if share}

    @property
    def source_digest(self) -> str:
        """Return the digest of the dataset that a masked dataset was made from."""
        digest: str = self.manifest.get("source_digest") or self.manifest["settings"]["source_digest"]
        return digest

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read columns of all rows, in the order of the parts. Raise UserError if they are not all there."""
        if not self.parts:
            return pa.schema([MASKED_ROW.field(name) for name in columns]).empty_table()
        return pa.concat_tables(self.read_parts(columns))

    def read_parts(self, columns: Sequence[str], filters: pc.Expression | None = None) -> Iterator[pa.Table]:
        """Yield columns of the rows that pass the filters, part by part, in a memory that depends on no number of rows.

        Raise UserError at the end if the rows of a read without filters are not all there.
        """
        num_rows = 0
        # Row groups are small, and in memory each is a chunk larger than its rows.
        for rows in storage.in_parallel(lambda part: part.read(columns, filters).combine_chunks(), self.parts):
            num_rows += rows.num_rows
            yield rows.replace_schema_metadata()
        if filters is None:
            self.check_rows(num_rows)

    def check_rows(self, num_rows: int) -> None:
        """Raise DamagedFileError if all parts together have another number of rows than the manifest."""
        if num_rows != self.manifest["rows"]:
            uri = storage.join(self.uri, "manifest.json")
            expected = f"`rows` is {self.manifest['rows']}, but the `parts` have {num_rows}"
            raise formats.damaged("manifest", uri, expected)

    def rows(self, keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read a few rows in the order of the given keys, each as a dict of `key` and the columns."""
        wanted, parts, places = pa.array(keys, pa.string()), self.parts if keys else [], dict[str, Place]()
        for part, found in zip(parts, storage.in_parallel(lambda part: part.read(["key"])["key"], parts), strict=False):
            positions = np.flatnonzero(pc.is_in(found, wanted).to_numpy()).tolist()
            places |= {found[i].as_py(): Place(part.uri, i) for i in positions}
            if len(places) == len(set(keys)):  # the other parts are not read
                break
        rows = rows_at(places, columns)
        return [rows[key] for key in keys]


def class_indices(labels: pa.Array | pa.ChunkedArray, classes: Sequence[str]) -> np.ndarray:
    """Return the index of each label among the classes of its dataset: int64 (N,).

    Raise UserError if a label is none of them.
    """
    indices = pc.index_in(labels, value_set=pa.array(classes, pa.string()))
    if indices.null_count:
        label = pc.filter(labels, pc.is_null(indices))[0].as_py()
        raise UserError(
            f"a photo has the label {label!r}, which is none of the `classes` in its dataset's manifest.json: that was "
            "edited, or a part was replaced. Restore the manifest; or delete it and run the same job again, which "
            "keeps the finished parts."
        )
    return indices.to_numpy(zero_copy_only=False).astype(np.int64)


@contextmanager
def open_parquet(uri: str) -> Iterator[NativeFile]:
    """Open a Parquet file. Raise UserError, in the `with` statement too, if it is missing or damaged."""
    with report_damage(uri), storage.open_file(uri) as file:
        yield file


@contextmanager
def report_damage(uri: str) -> Iterator[None]:
    """Raise UserError if a Parquet file is missing or damaged."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"{uri} is missing or damaged ({cause}). If its dataset was published anew meanwhile, run the same command "
            "again. Otherwise restore it; or delete this one file and run the job that wrote it again, with the same "
            "settings: it makes missing files anew."
        ) from error


def open_part(opened: NativeFile) -> pq.ParquetFile:
    """Return an opened Parquet file for reads of some of its row groups or columns, with checksums verified."""
    return pq.ParquetFile(opened, pre_buffer=True, page_checksum_verification=True)


def read_part(
    uri: str,
    columns: Sequence[str] | None = None,
    filters: pc.Expression | None = None,
    content: str | None = None,
) -> pa.Table:
    """Read columns (default: all) of the rows of one Parquet file that pass the filters (default: all).

    content: hash that the manifest has of it. Raise UserError if the file records another one, as a part of another
    dataset or version, or none, as a file that another program wrote.
    """
    names = None if columns is None else list(columns)
    with open_parquet(uri) as file:
        table = pq.read_table(file, columns=names, filters=filters, page_checksum_verification=True)
    if content is not None and (table.schema.metadata or {}).get(CONTENT_KEY) != content.encode():
        raise _replaced_part(uri)
    return with_plain_lists(table if names is None else table.select(names))


def _replaced_part(uri: str) -> UserError:
    return UserError(
        f"{uri} has other rows than those that manifest.json was published with: it was replaced by a file of another "
        "dataset or version. Restore it; or delete this one file and run the job that wrote the dataset again, with "
        "the same settings: it makes missing files anew."
    )


def with_plain_lists(table: pa.Table) -> pa.Table:
    """Return the table with lists of any length in place of those of a fixed length, as in files of earlier versions.

    Readers before pyarrow 26 fail at a null among the latter.
    """
    for index, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type):
            table = table.set_column(index, field.name, table[field.name].cast(pa.list_(field.type.value_type)))
    return table


def take_rows(part_uri: str, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Read the rows at given positions of a part, in that order; only their row groups are fetched."""
    with open_parquet(part_uri) as opened, open_part(opened) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        groups = (np.searchsorted(starts, positions, side="right") - 1).tolist()
        tables = {group: file.read_row_group(group, columns=list(columns)) for group in set(groups)}
    rows = pa.concat_tables(
        tables[group].slice(position - starts[group], 1) for group, position in zip(groups, positions, strict=True)
    )
    return with_plain_lists(rows.select(columns).replace_schema_metadata())


def rows_at(places: Mapping[str, Place], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read a few rows at known places, each as a dict of `key` and the columns, by key."""
    positions = defaultdict(list)
    for place in places.values():
        positions[place.part].append(place.position)
    read = storage.in_parallel(lambda item: take_rows(*item, ["key", *columns]), positions.items())
    return {row["key"]: row for table in read for row in table.to_pylist()}


def dataset_uri(root: str, name: str) -> str:
    """Return the URI of a dataset."""
    return storage.join(root, "datasets", name)


def find_dataset(root: str, name: str) -> Dataset | None:
    """Return a published dataset, or None. Raise UserError if its URI cannot be read."""
    uri = dataset_uri(root, name)
    try:
        manifest = formats.read(storage.join(uri, "manifest.json"), "manifest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"`root`: {uri} cannot be read ({error}). Check the URI and your credentials.") from error
    _check_counts(manifest, storage.join(uri, "manifest.json"))
    return Dataset(uri, manifest)


def _check_counts(manifest: dict[str, Any], uri: str) -> None:
    """Raise DamagedFileError if the counts of a manifest contradict each other."""
    for total, parts in (("rows", manifest["splits"]), ("quarantined", manifest["reasons"])):
        if manifest[total] != sum(parts.values()):
            raise formats.damaged("manifest", uri, f"`{total}` is {manifest[total]}, not the sum of {parts}")
    if manifest["inputs"] != manifest["rows"] + manifest["quarantined"]:
        raise formats.damaged("manifest", uri, f"`inputs` is {manifest['inputs']}, not `rows` + `quarantined`")


def load_dataset(root: str, name: str) -> Dataset:
    """Return a published dataset. Raise UserError, which lists the published datasets, if it is missing."""
    if (published := find_dataset(root, name)) is not None:
        return published
    published_names = storage.list_folders(storage.join(root, "datasets"), "manifest.json")
    hint = "Masked ones are made by `python jobs/mask.py --config FILE`."
    if not published_names:
        hint = first_step(root, "python jobs/ingest.py --config FILE")
    raise unknown_name("dataset", name, published_names, root, hint)


def first_step(root: str, command: str) -> str:
    """Return what to do where a root has no results of a command."""
    path = storage.local_path(root)
    if path is not None and os.path.isfile(path):
        return f"{root} is a file, not a folder: correct `root`."
    is_missing = path is not None and not os.path.isdir(path)
    return f"{f'There is no folder {root}: correct `root`, or run' if is_missing else 'Run'} `{command}` first."


def find_same_dataset(root: str, name: str, settings: dict[str, Any]) -> Dataset | None:
    """Return the published dataset, or None. Raise UserError if it was made with other settings."""
    published, new = find_dataset(root, name), json.loads(to_json(settings))
    if published is None:
        return None
    old = published.manifest["settings"]
    # The settings of format 1 included those that only select inputs.
    keys = {*old, *new} if published.manifest.get("format", 1) > 1 else old.keys() & new.keys()
    changed = sorted(key for key in keys if old.get(key) != new.get(key))
    if not changed:
        return published
    is_moved = changed == ["photos"] and storage.local_path(old["photos"]) is not None
    moved = f" Photos that were moved are the same ones by a symbolic link at {old['photos']}." if is_moved else ""
    raise UserError(
        f"dataset `{name}` in {root} was made with other settings ({', '.join(changed)}). "
        f"A dataset never changes: choose another name, or delete {published.uri}.{moved}"
    )


def to_json(value: Any) -> bytes:
    """Return a value as canonical JSON: sorted keys, UTF-8."""
    return json_text(value, indent=1, sort_keys=True, ensure_ascii=False).encode()


def _origin_text(published: Dataset, split: str) -> str:
    """Return a remark for a test split that the source does not have itself."""
    share = published.held_out.get(split)
    return f" ({share:.0%} of each class)" if split == "test" and share else ""


def dataset_table(published: Dataset, **extra_rows: str) -> str:
    """Return the counts of a dataset as the table that a job prints at its end."""
    manifest = published.manifest
    counts = {
        "inputs": manifest["inputs"],
        "rows": manifest["rows"],
        **{f"  {split}{_origin_text(published, split)}": number for split, number in manifest["splits"].items()},
        "quarantined": manifest["quarantined"],
        **{f"  {reason}": number for reason, number in manifest["reasons"].items()},
        **{f"outcome {name}": number for name, number in manifest.get("outcomes", {}).items()},
    }
    rows = [(name, number_text(number)) for name, number in counts.items()]
    return table([*rows, *extra_rows.items(), ("uri", published.uri)], title=f"dataset {published.name}")
