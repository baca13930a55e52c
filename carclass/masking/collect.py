"""Collection of a masked dataset's report and contact sheet."""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carclass import storage
from carclass.data import dataset, photo
from carclass.formatting import percent_text
from carclass.masking import quality
from carclass.masking.contact_sheet import MaskedPhoto, draw_contact_sheet, shrink_photo
from carclass.masking.report import FLAGS, MaskingReport, doubt_score, histogram, render
from carclass.masking.rle import decode_mask

NUM_SHEET, NUM_DOUBTFUL, NUM_EMPTY = 40, 50, 15
"""Photos on the contact sheet; doubtful photos in the report, and those of them without a vehicle."""
BATCH_ROWS = 1000
DOUBT_COLUMNS = ("outcome", "score", "stability", "several_vehicles", "touches_border", "area_fraction")
"""Parameters of doubt_score."""
PHOTO_COLUMNS = (
    "image", *DOUBT_COLUMNS, "num_vehicles", "vehicle_class", "box", "mask", "source_width", "source_height"
)  # fmt: skip


def write_report(
    masked: dataset.Dataset, source: dataset.Dataset, truth: str | None, *, num_sheet: int = NUM_SHEET
) -> None:
    """Write report.html and contact_sheet.jpg of a masked dataset.

    source: the unmasked dataset; truth: URI of a COCO file with true masks, by which photos are then ranked; num_sheet:
    photos on the sheet, chosen by content.
    """
    index = read_index(masked)
    ious = {} if truth is None else quality.ious(masked, truth, source=source)
    sampled = first_by_content(index, num_sheet)
    doubtful = most_doubtful(index, ious)
    photos = _masked_photos(masked, source, list({*sampled, *doubtful}), ious)
    sheet = [photos[key] for key in sampled]
    report = _report(masked, index, ious, doubtful=[photos[key] for key in doubtful], sheet=sheet)
    storage.write_bytes(storage.join(masked.uri, "contact_sheet.jpg"), draw_contact_sheet(sheet, report.title))
    storage.write_bytes(storage.join(masked.uri, "report.html"), render(report).encode())


def read_index(masked: dataset.Dataset) -> pa.Table:
    """Read the columns of all rows by which photos are chosen and counted."""
    return masked.read(["image_id", "key", "vehicle_class", *DOUBT_COLUMNS])


def first_by_content(index: pa.Table, number: int) -> list[str]:
    """Return the keys of the first rows in the order of their content's hash."""
    order = [("image_id", "ascending"), ("key", "ascending")]
    return list(index["key"].take(pc.select_k_unstable(index, number, order)).to_pylist())


def most_doubtful(index: pa.Table, ious: dict[str, float]) -> list[str]:
    """Return keys, worst first: by IoU where a true mask is known, else by doubt_score.

    Photos without a vehicle are alike, so at most NUM_EMPTY of them are listed.
    """
    is_empty = pc.field("outcome") == "no_vehicle"
    worst = [
        *heapq.nsmallest(NUM_DOUBTFUL, _ranks(index.filter(~is_empty), ious)),
        *heapq.nsmallest(NUM_EMPTY, _ranks(index.filter(is_empty), ious)),
    ]
    return [key for _, key in sorted(worst)[:NUM_DOUBTFUL]]


def _ranks(index: pa.Table, ious: dict[str, float]) -> Iterator[tuple[float, str]]:
    """Yield the negative doubt of each row with its key, batch by batch: a row takes a kilobyte as Python's objects."""
    for batch in index.select(["key", *DOUBT_COLUMNS]).to_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            key = row.pop("key")
            yield -(1 - ious[key] if key in ious else doubt_score(**row)), key


def _masked_photos(
    masked: dataset.Dataset, source: dataset.Dataset, keys: Sequence[str], ious: dict[str, float]
) -> dict[str, MaskedPhoto]:
    """Return the photos of these keys, at the size of a panel."""
    originals = {row["key"]: row["image"] for row in source.rows(keys, ["image"])}
    rows = masked.rows(keys, PHOTO_COLUMNS)
    return {row["key"]: shrink_photo(_masked_photo(row, originals[row["key"]], ious)) for row in rows}


def _masked_photo(row: dict[str, Any], original: bytes, ious: dict[str, float]) -> MaskedPhoto:
    mask = row["mask"]
    return MaskedPhoto(
        key=row["key"],
        photo=photo.decode_stored(original),
        box=None if row["box"] is None else np.array(row["box"]),
        mask=None if mask is None else decode_mask(mask, row["source_height"], row["source_width"]),
        result=photo.decode_stored(row["image"]),
        outcome=row["outcome"],
        vehicle_class=row["vehicle_class"],
        score=row["score"],
        notes=_notes(row, ious),
    )


def _notes(row: dict[str, Any], ious: dict[str, float]) -> list[str]:
    notes = [f"IoU {ious[row['key']]:.2f}"] if row["key"] in ious else []
    if row["outcome"] == "no_vehicle":
        return notes
    notes += [f"one of {row['num_vehicles']} vehicles"] if row["several_vehicles"] else []
    notes += ["touches the border"] if row["touches_border"] else []
    notes += [f"covers {percent_text(row['area_fraction'], 0)}"]
    return notes if row["stability"] is None else [*notes, f"stability {row['stability']:.2f}"]


def _report(
    masked: dataset.Dataset, index: pa.Table, ious: dict[str, float], **pictures: list[MaskedPhoto]
) -> MaskingReport:
    settings, manifest = masked.manifest["settings"], masked.manifest
    detector, cutout = settings["detector"], settings["cutout"]
    return MaskingReport(
        title=f"Dataset {masked.name}: masks of {settings['source']}",
        facts=[
            ("Source", f"{settings['source']} (sha256 {masked.source_digest[:12]}…)"),
            ("Detector", f"{detector['model'].rsplit('/', 1)[-1]}, weights sha256 {detector['weights'][:12]}…"),
            ("Input", f"{detector['short_side']} px, {detector['num_proposals']} proposals ({detector['profile']})"),
            ("Selection", f"{settings['choice'].replace('_', ' ')} {' or '.join(detector['classes'].values())}"),
            ("Cutout", f"{cutout['mode']}, margin {cutout['margin']:g}"),
        ],
        outcomes=manifest["outcomes"],
        quarantined=manifest["reasons"],
        flags={flag: pc.sum(index[flag]).as_py() or 0 for flag in FLAGS},
        classes=_count_values(index["vehicle_class"].drop_null()),
        scores=_column_histogram(index, "score"),
        areas=_column_histogram(index, "area_fraction"),
        stabilities=_column_histogram(index, "stability"),
        mean_iou=float(np.mean(list(ious.values()))) if ious else None,
        ious=histogram(np.array(list(ious.values()))),
        **pictures,
    )


def _count_values(values: pa.ChunkedArray) -> dict[str, int]:
    """Return the number of each value, most frequent first."""
    counts = sorted(values.value_counts().to_pylist(), key=lambda row: -row["counts"])
    return {row["values"]: row["counts"] for row in counts}


def _column_histogram(index: pa.Table, column: str) -> list[int]:
    return histogram(index[column].drop_null().to_numpy())
