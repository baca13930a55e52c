"""Table of predictions: a row per photo, first in parts, then in one Parquet and one CSV file.

<run>/predictions/<name>/settings.json          settings that determine the rows, written first
<run>/predictions/<name>/parts/*.parquet        rows as they are made; a resumed job predicts the others
<run>/predictions/<name>/thumbnails/*.parquet   small pictures of photos and cutouts, for the page
<run>/predictions/<name>/predictions.csv        all rows ordered by key
<run>/predictions/<name>/predictions.html       a page of them
<run>/predictions/<name>/predictions.parquet    all rows, written last: it marks the predictions as finished
"""

import json
import mmap
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from carclass import storage
from carclass.data import formats, publishing
from carclass.data.dataset import open_parquet, read_part, report_damage, with_plain_lists
from carclass.data.formats import json_text
from carclass.data.inventory import Inventory, chunks
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion.names import is_junk

PREDICTION = pa.schema(
    [
        ("key", pa.string()),  # path of the photo relative to `predict.photos`
        ("image_id", pa.string()),  # sha256 of its bytes; null if they could not be read
        ("label", pa.string()),  # the most probable class; null for a photo that cannot be classified
        ("probability", pa.float32()),  # of the label, calibrated
        ("rejected", pa.bool_()),  # the probability is below the threshold
        ("top5", pa.list_(pa.string())),  # the most probable classes, best first
        ("top5_probabilities", pa.list_(pa.float32())),
        ("outcome", pa.string()),  # vehicle or no_vehicle; null, like the next three, for unmasked photos
        ("vehicle_class", pa.string()),
        ("score", pa.float32()),  # of the detection
        ("box", pa.list_(pa.float32())),  # x1, y1, x2, y2 in pixels of the photo as ingested: upright, within max_side
        ("reason", pa.string()),  # reason of failure, a photo.Reason; null for classified photos
        ("detail", pa.string()),
    ]
)
THUMBNAIL = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        ("fingerprint", pa.string()),  # see inventory.Listed
        ("photo", pa.binary()),  # JPEG file
        ("cutout", pa.binary()),  # JPEG file of the classifier's input; null if it is the whole photo
    ]
)
PREDICTED = pa.unify_schemas([PREDICTION, THUMBNAIL])
"""Columns of a predicted row, before its thumbnails are written apart; null for photos that the page does not show."""
SETTINGS, TABLE, CSV, PAGE = "settings.json", "predictions.parquet", "predictions.csv", "predictions.html"
LISTING = "list of photos"
"""Key of format 1 of the settings, and of the table's metadata: digest of the inputs that the table has."""
THRESHOLD = "threshold"
"""Setting of the first job, and key of the table's metadata: the threshold of `rejected`, which may change."""
NO_PHOTO_REASONS = (Reason.NOT_AN_IMAGE, Reason.UNSUPPORTED_FORMAT, Reason.EMPTY)
"""Reasons of files that may be no photos at all, which their names tell."""
MAX_EXAMPLES = 5
"""Files that are no photos and are named."""
TOP_K = 5
CHUNK_ROWS = 50_000
"""Rows in memory while the files are written: about 25 MB."""
READ_PARTS = 256
"""Parts fetched concurrently."""
CORNERS = ("x1", "y1", "x2", "y2")
FORMULA_START = r"\A([=+\-@\t\r])"
"""Beginnings of text that spreadsheets evaluate when they open a CSV file; an apostrophe before them prevents it."""


class OtherFiles(NamedTuple):
    """Files that are no photos, neither by their names nor by their content, such as Thumbs.db: nobody misses them."""

    number: int
    examples: list[str]  # keys

    @property
    def text(self) -> str:
        """Return the number of photos and the names of the first few."""
        more = ", …" if self.number > len(self.examples) else ""
        return f"{self.number:,} ({', '.join(self.examples)}{more})"


class Counts(NamedTuple):
    """Numbers of files by result."""

    files: int
    predicted: int  # including the rejected
    rejected: int
    others: OtherFiles
    reasons: dict[str, int]  # without `others`


def predictions_uri(run_uri: str, name: str) -> str:
    """Return the URI of a run's predictions by name."""
    return storage.join(run_uri, "predictions", name)


def check_photos(uri: str, photos: str) -> None:
    """Raise UserError if there are predictions of other photos. photos: see listing.spelled_once."""
    try:
        old = formats.read(storage.join(uri, SETTINGS), "predictions")["photos"]
    except FileNotFoundError:
        return
    if old != photos:
        raise UserError(
            f"{uri} has the predictions of {old}. Give those of {photos} another name, e.g. "
            f"--name {re.sub('[^A-Za-z0-9_-]+', '-', photos.rsplit('/', 1)[-1]).strip('-') or 'second'}."
        )


def begin_predictions(uri: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Begin or resume predictions, and return their settings as they were stored first.

    Raise UserError if they were begun with other settings than another threshold.
    """
    new = json.loads(formats.to_json(settings))
    try:
        old = formats.read(storage.join(uri, SETTINGS), "predictions")
    except FileNotFoundError:
        formats.write(storage.join(uri, SETTINGS), "predictions", new)
        return dict(new)
    old.pop("format", None)
    keys = {*old, *new} - {LISTING, THRESHOLD}
    if changed := sorted(key for key in keys if old.get(key) != new.get(key)):
        raise UserError(
            f"{uri} was begun with other settings ({', '.join(changed)}). Choose another name (--name), or delete it."
        )
    return old


def is_finished(uri: str, settings: dict[str, Any], listing: str, threshold: float) -> bool:
    """Return True if nothing is left to do. settings: as stored; listing, threshold: the inputs and setting of today.

    Photos that storage could not deliver are left to do.
    """
    if not all(storage.exists(storage.join(uri, file)) for file in (TABLE, CSV, PAGE)):
        return False
    with open_parquet(storage.join(uri, TABLE)) as file:
        metadata = pq.read_schema(file).metadata or {}
    recorded = {key: metadata.get(key.encode(), b"").decode() or settings.get(key) for key in (LISTING, THRESHOLD)}
    is_same = recorded[LISTING] == listing and float(recorded[THRESHOLD] or 0) == threshold
    return is_same and not read_counts(uri).reasons.get(Reason.UNREADABLE)


def prediction_columns(probabilities: np.ndarray, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """Return the class columns of PREDICTION for each row of calibrated probabilities, float (N,C).

    Equally probable classes are in the order of `classes`.
    """
    top_classes = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP_K]
    top_probabilities = np.take_along_axis(probabilities, top_classes, axis=1)
    return [
        {
            "label": classes[indices[0]],
            "probability": values[0],
            "rejected": bool(values[0] < threshold),
            "top5": [classes[i] for i in indices],
            "top5_probabilities": values.tolist(),
        }
        for indices, values in zip(top_classes, top_probabilities, strict=True)
    ]


def write_batch(batch: pa.Table, uri: str, settings: dict[str, Any]) -> pa.Table:
    """Write rows of PREDICTED as a part, thumbnails as another, and return publishing.RECORDS with `rejected`."""
    pictures = [name for name in ("photo", "cutout") if name in batch.column_names]
    part = publishing.write_part(uri, "parts", batch.drop(pictures), settings)
    if pictures and len(shown := batch.filter(pc.is_valid(batch["photo"]))):
        publishing.write_part(uri, "thumbnails", shown.select(THUMBNAIL.names), settings)
    return publishing.to_records(part).append_column("rejected", batch["rejected"])


def write_unread(uri: str, inventory: Inventory, settings: dict[str, Any]) -> None:
    """Write the inputs that are not read at all, such as those with names that are not UTF-8, with their reasons."""
    names = ("key", "reason", "detail", "fingerprint")
    for rows in chunks(inventory.rejected_inputs(), CHUNK_ROWS):
        unread = [dict(zip(names, row, strict=True)) for row in rows]
        write_batch(pa.Table.from_pylist(unread, PREDICTED), uri, settings)


def publish_predictions(
    uri: str, inventory: Inventory, listing: str, threshold: float, render: Callable[[Path], str]
) -> None:
    """Write all rows as CSV and Parquet, and the page before the latter. Rows of photos that are gone are kept.

    Workers of a killed job may write for a moment after its successor has listed the missing photos, so a photo may be
    in two parts; their rows are equal, and one is used. Raise AssertionError if an input is missing. listing: digest of
    the inputs; threshold: of `rejected`, in place of that of the parts; render: local Parquet file → page.
    """
    missing = inventory.missing_keys()
    assert not missing, f"{uri}: keys are missing, such as {missing}"
    with tempfile.TemporaryDirectory() as folder:
        csv, table = Path(folder, CSV), Path(folder, TABLE)
        with ExitStack() as writers:
            csv_writer = writers.enter_context(pyarrow.csv.CSVWriter(csv, to_csv(PREDICTION.empty_table()).schema))
            schema = PREDICTION.with_metadata({LISTING: listing, THRESHOLD: repr(threshold)})
            options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
            parquet_writer = writers.enter_context(pq.ParquetWriter(table, schema, **options))
            for stored in _rows_by_key(uri, inventory):
                rows = _apply_threshold(stored, threshold)
                csv_writer.write_table(to_csv(rows))
                parquet_writer.write_table(rows.cast(schema))
        _publish_file(uri, csv)
        storage.write_bytes(storage.join(uri, PAGE), render(table).encode())
        _publish_file(uri, table)


def _apply_threshold(rows: pa.Table, threshold: float) -> pa.Table:
    """Return rows of PREDICTION with `rejected` by a threshold."""
    rejected = pc.less(rows["probability"], pa.scalar(threshold, pa.float32()))
    return rows.set_column(rows.schema.get_field_index("rejected"), "rejected", rejected)


def _publish_file(uri: str, file: Path) -> None:
    """Copy a file that is not empty from the local disk to the folder `uri`."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        storage.write_bytes(storage.join(uri, file.name), view)
        view.release()


def to_csv(rows: pa.Table) -> pa.Table:
    """Convert rows of PREDICTION to columns for CSV: the box as four columns, lists as JSON, text without formulas."""
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for name in rows.schema.names:
        if name == "box":
            corners = [box or [None] * 4 for box in rows["box"].to_pylist()]
            columns |= {corner: pa.array([box[i] for box in corners], pa.float32()) for i, corner in enumerate(CORNERS)}
        elif pa.types.is_list(rows.schema.field(name).type):
            columns[name] = pa.array([_to_json(value) for value in rows[name].to_pylist()], pa.string())
        elif pa.types.is_string(rows.schema.field(name).type):
            columns[name] = pc.replace_substring_regex(rows[name], FORMULA_START, r"'\1")
        else:
            columns[name] = rows[name]
    return pa.table(columns)


def _to_json(value: list[Any] | None) -> str | None:
    rounded = [float(f"{item:.6g}") if isinstance(item, float) else item for item in value or []]
    return None if value is None else json_text(rounded, ensure_ascii=False)


def read_counts(uri: str) -> Counts:
    """Count the files of finished predictions by result."""
    table = storage.join(uri, TABLE)
    rejected = read_part(table, ["rejected"])["rejected"]
    failed = read_failed(table)
    predicted = len(rejected) - rejected.null_count
    reasons = Counter(failed.photos["reason"].to_pylist())
    num_rejected = pc.sum(rejected).as_py() or 0
    return Counts(len(rejected), predicted, num_rejected, failed.others, dict(sorted(reasons.items())))


class Failed(NamedTuple):
    """Files without a prediction."""

    photos: pa.Table  # key, reason, detail
    others: OtherFiles


def read_failed(table: str) -> Failed:
    """Return the files without a prediction. table: URI of TABLE."""
    rows = read_part(table, ["key", "reason", "detail"], pc.is_valid(pc.field("reason")))
    is_odd = pc.is_in(rows["reason"], pa.array(NO_PHOTO_REASONS))
    is_other = [odd and is_junk(key) for odd, key in zip(is_odd.to_pylist(), rows["key"].to_pylist(), strict=True)]
    others = rows.filter(pa.array(is_other, pa.bool_()))
    photos = rows.filter(pc.invert(pa.array(is_other, pa.bool_())))
    return Failed(photos, OtherFiles(len(others), others["key"].slice(0, MAX_EXAMPLES).to_pylist()))


def _rows_by_key(uri: str, inventory: Inventory) -> Iterator[pa.Table]:
    """Yield all rows ordered by key, CHUNK_ROWS at a time, reading the parts that hold any of them."""
    for chunk in chunks(inventory.files_by_key(), CHUNK_ROWS):
        keys_by_part = defaultdict(list)
        for key, part in chunk:
            keys_by_part[part].append(key)
        tables = zip(keys_by_part.values(), _read_parts(uri, [*keys_by_part], PREDICTION.names), strict=True)
        rows = pa.concat_tables(table.filter(pc.is_in(table["key"], pa.array(keys))) for keys, table in tables)
        assert len(rows) == len(chunk), f"{uri}: a part has a duplicate key"
        yield rows.sort_by("key")


def _read_parts(uri: str, parts: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
    """Yield columns of the parts in order; whole files are fetched concurrently, as they are small."""
    for start in range(0, len(parts), READ_PARTS):
        group = parts[start : start + READ_PARTS]
        uris = [storage.join(uri, part) for part in group]
        for part_uri, data in zip(uris, storage.read_many(uris), strict=True):
            with report_damage(part_uri):
                if isinstance(data, OSError):
                    raise data
                file = pa.BufferReader(data)
                table = pq.read_table(file, columns=columns, page_checksum_verification=True)
            yield with_plain_lists(table.select(columns).replace_schema_metadata())
