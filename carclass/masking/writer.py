"""What was detected → rows with the vehicle cut out, in parts, and quarantine.

Nothing here needs the networks or torch, so a process that only writes starts in a second.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from carclass.config.schema import ExcludeSettings, MaskSettings
from carclass.data import dataset, photo, publishing
from carclass.data.photo import Reason
from carclass.masking.cutout import cut
from carclass.masking.rle import encode_mask

WRITTEN = pa.schema([("outcome", pa.string()), ("reason", pa.string())])


def write_batch(batch: pa.Table, uri: str, settings: MaskSettings, identity: dict[str, Any]) -> pa.Table:
    """Cuts the vehicles out and makes a part (and a part of quarantine); returns rows of WRITTEN."""
    rows, rejected = cut_batch(batch, settings)
    if rows:
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.MASKED_ROW), identity)
    if rejected:
        publishing.write_part(uri, "quarantine", pa.Table.from_pylist(rejected, dataset.QUARANTINE), identity)
    outcomes = [*(row["outcome"] for row in rows), *([None] * len(rejected))]
    return pa.table([outcomes, [*([None] * len(rows)), *(row["reason"] for row in rejected)]], schema=WRITTEN)


def cut_batch(batch: pa.Table, settings: MaskSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of DETECTED as (rows of MASKED_ROW, their photos cut out, and rows of QUARANTINE)."""
    rows, rejected = [], []
    for row in batch.to_pylist():
        if row["reason"] is None and (doubts := exclusion_reasons(row, settings.exclude)):
            row |= {"reason": str(Reason.DOUBTFUL_MASK), "detail": ", ".join(doubts), "attempts": 1}
        if row["reason"] is None:
            rows.append(_cut_row(row, settings))
        else:
            trouble = [row[name] for name in ("key", "reason", "detail", "image_id", "attempts")]
            rejected.append(publishing.quarantine_row(*trouble))
    return rows, rejected


def _cut_row(row: dict[str, Any], settings: MaskSettings) -> dict[str, Any]:
    """A row of DETECTED as one of MASKED_ROW, its photo cut out; a photo without a vehicle stays whole."""
    if row["outcome"] == "no_vehicle":
        return row
    mask = row["mask_pixels"]
    if mask is not None:
        mask = np.frombuffer(mask, bool).reshape(row["source_height"], row["source_width"])
    pixels = cut(photo.decode(row["image"], min_side=1), np.array(row["box"]), mask, settings.cutout)
    return {
        **row,
        "mask": None if mask is None else encode_mask(mask),
        "image": photo.encode(pixels, quality=settings.quality),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
    }


def exclusion_reasons(row: dict[str, Any], exclude: ExcludeSettings) -> list[str]:
    """What the user's own measures have against a photo, in words. row: the columns of dataset.DETECTION."""
    if row["outcome"] == "no_vehicle":
        return ["no vehicle"] if exclude.no_vehicle else []
    doubts = []
    if exclude.several_vehicles and row["several_vehicles"]:
        doubts.append(f"one of {row['num_vehicles']} vehicles")
    if exclude.touches_border and row["touches_border"]:
        doubts.append("touches the border")
    if row["area_fraction"] < exclude.min_area_fraction:
        doubts.append(f"covers {row['area_fraction']:.3f} of the photo")
    if row["stability"] is not None and row["stability"] < exclude.min_stability:
        doubts.append(f"mask stability {row['stability']:.2f}")
    return doubts
