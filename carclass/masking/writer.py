"""Writing of detections: rows with the background removed, in parts, and quarantine.

This module does not import torch, so that writing processes start in a second.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from carclass.config.schema import ExcludeSettings, MaskSettings
from carclass.data import dataset, photo, publishing
from carclass.data.quarantine import Reason
from carclass.masking.cutout import cut
from carclass.masking.paste import paste_mask, touches_border
from carclass.masking.rle import encode_mask

FAILURE = pa.schema([("reason", pa.string()), ("detail", pa.string()), ("attempts", pa.int32())])
"""Columns of a photo that failed; null for all others."""
DETECTED = pa.schema([*dataset.MASKED_ROW, *FAILURE, ("grid", pa.binary())])
"""Rows of detections; `grid`: the mask as detected, see Detection. `mask` and what is measured on it are null."""
OF_VEHICLES = [name for name in dataset.DETECTION.names if not name.startswith("source_")]
"""Columns that are null without a vehicle, but for the outcome and the number of vehicles."""
SUMMARY = pa.schema([*publishing.RECORDS, ("outcome", pa.string())])
"""Result of a written photo: the record of its row, and its outcome, null for one in quarantine."""


def write_batch(batch: pa.Table, uri: str, settings: MaskSettings, identity: dict[str, Any]) -> pa.Table:
    """Write rows of DETECTED as a part and a part of quarantine, and return rows of SUMMARY.

    There are several parts if photos are large.
    """
    summary = [SUMMARY.empty_table()]
    for group in publishing.split_by_bytes(cut_rows(batch, settings)):
        photos = [row for row in group if row["reason"] is None]
        rejected = [row for row in group if row["reason"] is not None]
        for folder, schema, written in (
            ("parts", dataset.MASKED_ROW, photos),
            ("quarantine", dataset.QUARANTINE, rejected),
        ):
            if written:
                table = pa.Table.from_pylist(written, schema)
                # A masked photo is masked again if its source photo is replaced.
                table = table.append_column("fingerprint", table["image_id"])
                records = publishing.to_records(publishing.write_part(uri, folder, table, identity))
                outcomes = table["outcome"] if folder == "parts" else pa.nulls(len(table), pa.string())
                summary.append(records.append_column(SUMMARY.field("outcome"), outcomes))
    return pa.concat_tables(summary)


def cut_rows(batch: pa.Table, settings: MaskSettings) -> Iterator[dict[str, Any]]:
    """Convert rows of DETECTED one by one to rows of MASKED_ROW without the background, or of QUARANTINE."""
    for i in range(len(batch)):
        (row,) = batch.slice(i, 1).to_pylist()
        mask = _place_vehicle(row) if row["outcome"] == "vehicle" else None
        if row["reason"] is None and (reasons := exclusion_reasons(row, settings.exclude)):
            row |= {"reason": str(Reason.DOUBTFUL_MASK), "detail": ", ".join(reasons), "attempts": 1}
        if row["reason"] is None:
            yield _cut_row(row, mask, settings)
        else:
            yield {name: row[name] for name in dataset.QUARANTINE.names}


def _place_vehicle(row: dict[str, Any]) -> np.ndarray | None:
    """Add the mask and its measures to a row of DETECTED, and return it: bool (H,W); None if only a box was detected.

    The outcome is changed if the mask is smaller than a pixel.
    """
    height, width, box = row["source_height"], row["source_width"], np.array(row["box"])
    if row["grid"] is None:
        row["area_fraction"] = float(np.prod(box[2:] - box[:2]) / (height * width))
        row["touches_border"] = bool((box[:2] < 1).any() or box[2] > width - 1 or box[3] > height - 1)
        return None
    grid = np.frombuffer(row["grid"], np.float32)
    side = math.isqrt(len(grid))
    mask = paste_mask(grid.reshape(side, side), box, height, width)
    if not mask.any():
        row |= dict.fromkeys(OF_VEHICLES) | {"outcome": "no_vehicle", "num_vehicles": 0}
        return None
    row |= {"mask": encode_mask(mask), "area_fraction": float(mask.mean()), "touches_border": touches_border(mask)}
    return mask


def _cut_row(row: dict[str, Any], mask: np.ndarray | None, settings: MaskSettings) -> dict[str, Any]:
    """Return a row of DETECTED with the background removed; a photo without a vehicle is unchanged."""
    if row["outcome"] == "no_vehicle":
        return row
    pixels = cut(photo.decode_stored(row["image"]), np.array(row["box"]), mask, settings.cutout)
    return {
        **row,
        "image": photo.encode(pixels, quality=settings.quality),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
    }


def exclusion_reasons(row: dict[str, Any], exclude: ExcludeSettings) -> list[str]:
    """Return the reasons to exclude a photo by `mask.exclude`, in words. row: columns of dataset.DETECTION."""
    if row["outcome"] == "no_vehicle":
        return ["no vehicle"] if exclude.no_vehicle else []
    reasons = []
    if exclude.several_vehicles and row["several_vehicles"]:
        reasons.append(f"one of {row['num_vehicles']} vehicles")
    if exclude.touches_border and row["touches_border"]:
        reasons.append("touches the border")
    if row["area_fraction"] < exclude.min_area_fraction:
        reasons.append(f"covers {row['area_fraction']:.3f} of the photo")
    if row["stability"] is not None and row["stability"] < exclude.min_stability:
        reasons.append(f"mask stability {row['stability']:.2f}")
    return reasons
