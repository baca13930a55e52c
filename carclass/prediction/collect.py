"""Contents of the page of predictions, read from their table and thumbnails."""

import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from carclass import storage
from carclass.data import dataset
from carclass.prediction import predictions
from carclass.prediction.report import FailedPhoto, PredictedClass, PredictionReport, ShownPhoto

MAX_SHOWN = 2000
"""Largest number of photos on the page."""
MAX_SHOWN_BYTES = 24 * 2**20
"""Largest size of their thumbnails, which take a third more on the page."""
MAX_FAILED = 200
"""Largest number of files on the page that could not be classified."""
THUMBNAIL_SIDE = 160
COLUMNS = ("key", "image_id", "top5", "top5_probabilities", "rejected", "outcome", "vehicle_class", "score")
Row = dict[str, Any]


def shown_share(num_photos: int) -> float:
    """Return the share of the photos that the page shows."""
    return min(1.0, MAX_SHOWN / max(1, num_photos))


def is_shown(key: str, share: float) -> bool:
    """Return True if a photo is in a share of all photos, which is chosen by a hash of their names."""
    return zlib.crc32(key.encode()) < share * 2**32


def collect_report(
    uri: str,
    table: Path,
    title: str,
    facts: list[tuple[str, str]],
    *,
    threshold: float,
    is_calibrated: bool,
    report_link: str | None,
) -> PredictionReport:
    """Return the contents of the page. uri: of the predictions, with thumbnails; table: local file of all rows."""
    counted = dataset.read_part(str(table), ["label", "probability", "rejected"])
    failed, others = predictions.read_failed(str(table))
    return PredictionReport(
        title=title,
        facts=facts,
        threshold=threshold,
        is_calibrated=is_calibrated,
        report_link=report_link,
        classes=_count_classes(counted),
        shown=_read_shown(uri, table, shown_share(len(counted))),
        others=others.text if others.number else None,
        reasons=dict(sorted(Counter(failed["reason"].to_pylist()).items())),
        failed=[
            FailedPhoto(row["key"], row["reason"], row["detail"] or "")
            for row in failed.slice(0, MAX_FAILED).to_pylist()
        ],
    )


def _count_classes(rows: pa.Table) -> list[PredictedClass]:
    """Count the photos of each predicted class, most frequent first."""
    classified = rows.filter(pc.is_valid(rows["label"]))
    sums = classified.group_by("label").aggregate([("label", "count"), ("rejected", "sum"), ("probability", "mean")])
    columns = ("label", "label_count", "rejected_sum", "probability_mean")
    found = [PredictedClass(*(row[name] for name in columns)) for row in sums.to_pylist()]
    return sorted(found, key=lambda each: (-each.num_photos, each.name))


def _read_shown(uri: str, table: Path, share: float) -> list[ShownPhoto]:
    """Return the shown photos, the least probable first, up to the limits of the page."""
    pictures: dict[tuple[str, str], Row] = {}
    parts = [path for path in storage.list_files(uri) if path.startswith("thumbnails/") and path.endswith(".parquet")]
    read = partial(dataset.read_part, columns=["key", "image_id", "photo", "cutout"])
    for rows in storage.in_parallel(read, [storage.join(uri, path) for path in parts]):
        chosen = rows.filter(pa.array([is_shown(key.as_py(), share) for key in rows["key"]], pa.bool_()))
        pictures |= {(row["key"], row["image_id"]): row for row in chosen.to_pylist()}
    keys = pa.array({key for key, _ in pictures}, pa.string())
    classified = dataset.read_part(str(table), COLUMNS, pc.is_valid(pc.field("label")) & pc.field("key").isin(keys))
    shown: list[ShownPhoto] = []
    size = 0
    # In the order of the hash, the first of them are a sample too.
    for row in sorted(classified.to_pylist(), key=lambda row: zlib.crc32(row["key"].encode())):
        picture = pictures.get((row["key"], row["image_id"]))  # none of a photo that has been replaced
        size += 0 if picture is None else len(picture["photo"]) + len(picture["cutout"] or b"")
        if picture is not None and len(shown) < MAX_SHOWN and size <= MAX_SHOWN_BYTES:
            shown.append(_to_photo(row, picture))
    return sorted(shown, key=lambda photo: (photo.top[0][1], photo.key))


def _to_photo(row: Row, picture: Row) -> ShownPhoto:
    detection = None
    if row["outcome"] is not None:
        is_found = row["vehicle_class"] is not None
        detection = f"{row['vehicle_class']}, score {row['score']:.2f}" if is_found else "no vehicle found"
    top = list(zip(row["top5"], row["top5_probabilities"], strict=True))
    return ShownPhoto(row["key"], picture["photo"], picture["cutout"], top, row["rejected"], detection)
