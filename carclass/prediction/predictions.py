"""What is said of new photos: a row for each, in parts while it's made, then in one Parquet and one CSV file.

<run>/predictions/<name>/settings.json         what decides the rows: written first
<run>/predictions/<name>/parts/*.parquet       rows as they come: a job that was killed goes on with the others
<run>/predictions/<name>/predictions.csv       all rows in the order of keys
<run>/predictions/<name>/predictions.parquet   the same, written last: with it the predictions are finished
"""

import json
import mmap
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from carclass import storage
from carclass.data import publishing
from carclass.data.inventory import Inventory, chunks
from carclass.errors import UserError

PREDICTION = pa.schema(
    [
        ("key", pa.string()),  # where the photo is, relative to `predict.photos`
        ("image_id", pa.string()),  # sha256 of its bytes, null where they could not be read
        ("label", pa.string()),  # the likeliest class, null for a photo that can't be classified
        ("probability", pa.float32()),  # of it, calibrated
        ("rejected", pa.bool_()),  # the probability is below the threshold
        ("top5", pa.list_(pa.string())),  # the likeliest classes, best first
        ("top5_probabilities", pa.list_(pa.float32())),
        ("outcome", pa.string()),  # vehicle or no_vehicle; null, as the three below, where nothing is masked
        ("vehicle_class", pa.string()),
        ("score", pa.float32()),  # of the detection
        ("box", pa.list_(pa.float32(), 4)),  # x1, y1, x2, y2 in pixels of the photo as read: upright, within max_side
        ("reason", pa.string()),  # why a photo can't be classified, a photo.Reason
        ("detail", pa.string()),
    ]
)
SETTINGS, TABLE, CSV = "settings.json", "predictions.parquet", "predictions.csv"
TOP = 5
CHUNK_ROWS = 50_000
"""Rows in memory at once while the files are made: some 25 MB."""
READ_PARTS = 256
"""Parts fetched at once."""
CORNERS = ("x1", "y1", "x2", "y2")


class Counts(NamedTuple):
    """How many photos came out in which way."""

    photos: int
    predicted: int  # the rejected among them
    rejected: int
    reasons: dict[str, int]


def predictions_uri(run_uri: str, name: str) -> str:
    """Where predictions lie."""
    return storage.join(run_uri, "predictions", name)


def begin_predictions(uri: str, settings: dict[str, Any]) -> bool:
    """Starts predictions or finds them begun; whether they are finished. UserError when begun with other settings."""
    try:
        old = json.loads(storage.read_bytes(storage.join(uri, SETTINGS)))
    except FileNotFoundError:
        storage.write_bytes(storage.join(uri, SETTINGS), json.dumps(settings, indent=1).encode())
        return False
    new = json.loads(json.dumps(settings))
    if other := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        raise UserError(
            f"{uri} was begun with other settings ({', '.join(other)}). Choose another `predict.name`, or delete it."
        )
    return storage.exists(storage.join(uri, TABLE))


def describe_predictions(probabilities: np.ndarray, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """The columns about classes, for each row of calibrated probabilities, float (N,C); equal ones in class order."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    found = np.take_along_axis(probabilities, top, axis=1)
    return [
        {
            "label": classes[order[0]],
            "probability": row[0],
            "rejected": bool(row[0] < threshold),
            "top5": [classes[i] for i in order],
            "top5_probabilities": row.tolist(),
        }
        for order, row in zip(top, found, strict=True)
    ]


def write_batch(batch: pa.Table, uri: str, settings: dict[str, Any]) -> pa.Table:
    """Makes a part of rows of PREDICTION; returns `rejected` and `reason` of each."""
    publishing.write_part(uri, "parts", batch, settings)
    return batch.select(["rejected", "reason"])


def publish_predictions(uri: str, inventory: Inventory) -> None:
    """Writes the files from the parts, whose rows the inventory has; AssertionError when a key is missing or unknown.

    Processes of a job that was killed may write for a moment after the next one has looked for what is missing, so a
    photo may be in two parts. Both say the same of it, and one of them is taken.
    """
    wrong = inventory.lost() + inventory.unknown()
    assert not wrong, f"{uri}: photos are lost or unknown, such as {wrong}"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_files:
        files = Path(folder, CSV), Path(folder, TABLE)
        sheet = open_files.enter_context(pyarrow.csv.CSVWriter(files[0], to_csv(PREDICTION.empty_table()).schema))
        table = open_files.enter_context(pq.ParquetWriter(files[1], PREDICTION, compression="zstd"))
        for rows in _in_order(uri, inventory):
            sheet.write_table(to_csv(rows))
            table.write_table(rows)
        open_files.close()
        for file in files:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = memoryview(data)
                storage.write_bytes(storage.join(uri, file.name), view)
                view.release()


def to_csv(rows: pa.Table) -> pa.Table:
    """Rows of PREDICTION as a CSV file can hold them: the box in four columns, the lists as JSON."""
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for name in rows.schema.names:
        if name == "box":
            corners = [box or [None] * 4 for box in rows["box"].to_pylist()]
            columns |= {corner: pa.array([box[i] for box in corners], pa.float32()) for i, corner in enumerate(CORNERS)}
        elif pa.types.is_list(rows.schema.field(name).type):
            columns[name] = pa.array([_as_text(value) for value in rows[name].to_pylist()], pa.string())
        else:
            columns[name] = rows[name]
    return pa.table(columns)


def _as_text(value: list[Any] | None) -> str | None:
    short = [float(f"{item:.6g}") if isinstance(item, float) else item for item in value or []]
    return None if value is None else json.dumps(short, ensure_ascii=False)


def read_counts(uri: str) -> Counts:
    """Those of finished predictions."""
    with storage.open_file(storage.join(uri, TABLE)) as file:
        found = pq.read_table(file, columns=["rejected", "reason"])
    rejected = found["rejected"].drop_null()
    reasons = Counter(found["reason"].drop_null().to_pylist())
    return Counts(len(found), len(rejected), pc.sum(rejected).as_py() or 0, dict(sorted(reasons.items())))


def _in_order(uri: str, inventory: Inventory) -> Iterator[pa.Table]:
    """All rows in the order of keys, CHUNK_ROWS at a time, each time from the parts that have some of them."""
    for chunk in chunks(inventory.files_of_keys(), CHUNK_ROWS):
        wanted = defaultdict(list)
        for key, part in chunk:
            wanted[part].append(key)
        tables = zip(wanted.values(), _read(uri, [*wanted], PREDICTION.names), strict=True)
        rows = pa.concat_tables(table.filter(pc.is_in(table["key"], pa.array(keys))) for keys, table in tables)
        assert len(rows) == len(chunk), f"{uri}: a part holds a photo twice"
        yield rows.sort_by("key")


def _read(uri: str, parts: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
    """Columns of parts in the order given; small files, so that it's the number of requests that takes time."""
    for start in range(0, len(parts), READ_PARTS):
        some = parts[start : start + READ_PARTS]
        for data in storage.read_many(storage.join(uri, part) for part in some):
            if isinstance(data, OSError):
                raise data
            yield pq.read_table(pa.BufferReader(data), columns=columns).select(columns).replace_schema_metadata()
