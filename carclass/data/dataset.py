"""A dataset on storage: Parquet parts, quarantine, and a manifest that is written last.

<root>/datasets/<name>/parts/*.parquet       a row per photo
<root>/datasets/<name>/quarantine/*.parquet  a row per input that is no row, with its reason
<root>/datasets/<name>/manifest.json         settings, counts, parts: without it nothing is published

Nothing is lost: inputs = rows + quarantined, each key once, checked before the manifest is written. A job that
was killed finds its finished parts by their settings and does the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carclass import storage
from carclass.errors import UserError
from carclass.progress import table

ROW = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the source photo's bytes
        ("key", pa.string()),  # where the photo was, relative to its source
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
        ("several_vehicles", pa.bool_()),  # another one is at least half as large
        ("touches_border", pa.bool_()),
        ("area_fraction", pa.float32()),  # of the photo, covered by the mask (by the box where there is none)
        ("stability", pa.float32()),  # of the mask against its threshold, 0 to 1
        ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in the source dataset's pixels
        ("mask", pa.string()),  # COCO run lengths (compressed) over the source dataset's photo
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


@dataclass(frozen=True)
class Dataset:
    """A published dataset."""

    uri: str
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name."""
        return self.uri.rsplit("/", 1)[1]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of their indices."""
        return list(self.manifest["classes"])

    @property
    def part_uris(self) -> list[str]:
        """The Parquet files, in the order of the manifest."""
        return [storage.join(self.uri, part) for part in self.manifest["parts"]]

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest: what a run records of its data."""
        return storage.sha256(to_json(self.manifest))

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows, in the order of the parts."""
        if not self.part_uris:
            return pa.schema([MASKED_ROW.field(name) for name in columns]).empty_table()
        return pa.concat_tables(read_part(uri, columns) for uri in self.part_uris)

    def rows(self, keys: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows in the order of their keys given, each with its key and the columns; for few rows."""
        found: dict[str, dict[str, Any]] = {}
        for uri in self.part_uris if keys else []:
            there = read_part(uri, ["key"])["key"].to_pylist()
            wanted = [i for i, key in enumerate(there) if key in set(keys)]
            if wanted:  # else the part's photos need not be fetched
                found.update({row["key"]: row for row in take_rows(uri, wanted, ["key", *columns]).to_pylist()})
        return [found[key] for key in keys]


def read_part(uri: str, columns: Sequence[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
    """Columns (all by default) of one Parquet file, or of those of its rows that a filter lets through."""
    names = None if columns is None else list(columns)
    with storage.open_file(uri) as file:
        table = pq.read_table(file, columns=names, filters=filters)
    return table if names is None else table.select(names)


def take_rows(part_uri: str, positions: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Some rows of a part by their positions in it, in the order given; little more than these is read."""
    with storage.open_file(part_uri) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        groups = (np.searchsorted(starts, positions, side="right") - 1).tolist()
        tables = {group: file.read_row_group(group, columns=list(columns)) for group in set(groups)}
    places = zip(groups, positions, strict=True)
    rows = pa.concat_tables(tables[group].slice(position - starts[group], 1) for group, position in places)
    return rows.select(columns).replace_schema_metadata()


def dataset_uri(root: str, name: str) -> str:
    """Where a dataset lies."""
    return storage.join(root, "datasets", name)


def find_dataset(root: str, name: str) -> Dataset | None:
    """A published dataset, or None; UserError when the place can't be read."""
    uri = dataset_uri(root, name)
    try:
        return Dataset(uri, json.loads(storage.read_bytes(storage.join(uri, "manifest.json"))))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"`root`: {uri} cannot be read ({error}). Check the place and your credentials.") from error


def load_dataset(root: str, name: str) -> Dataset:
    """A published dataset; UserError, naming those that are there, when it isn't."""
    if (found := find_dataset(root, name)) is not None:
        return found
    suffix = "/manifest.json"
    files = storage.list_files(storage.join(root, "datasets"))
    known = [path.removesuffix(suffix) for path in files if path.endswith(suffix)]
    there = f"Published there: {', '.join(known)}." if known else "None is published there yet: run jobs/ingest.py."
    raise UserError(f"no dataset `{name}` in {root}. {there}")


def find_same_dataset(root: str, name: str, settings: dict[str, Any]) -> Dataset | None:
    """The dataset if it was made with these settings; UserError if it was made with others."""
    found = find_dataset(root, name)
    if found is None or found.manifest["settings"] == json.loads(to_json(settings)):
        return found
    old = found.manifest["settings"]
    other = sorted(key for key in {*old, *settings} if old.get(key) != json.loads(to_json(settings)).get(key))
    raise UserError(
        f"dataset `{name}` in {root} was made with other settings ({', '.join(other)}). "
        f"A dataset never changes: give this one another name, or delete {found.uri}."
    )


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()


def dataset_table(published: Dataset, **more: str) -> str:
    """What a job that made a dataset says at its end."""
    counts = published.manifest
    rows = [("inputs", f"{counts['inputs']:,}"), ("rows", f"{counts['rows']:,}")]
    rows += [(f"  {split}", f"{number:,}") for split, number in counts["splits"].items()]
    rows += [("quarantined", f"{counts['quarantined']:,}")]
    rows += [(f"  {reason}", f"{number:,}") for reason, number in counts["reasons"].items()]
    rows += [(f"outcome {name}", f"{number:,}") for name, number in counts.get("outcomes", {}).items()]
    return table([*rows, *more.items(), ("place", published.uri)], title=f"dataset {published.name}")
