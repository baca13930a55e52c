"""Mask quality against true masks."""

import json
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from carclass import storage
from carclass.config.schema import MaskSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.masking.rle import decode_mask, mask_iou
from carclass.sample import source as sample


def mean_test_iou(root: str, masked: dataset.Dataset, settings: MaskSettings) -> float | None:
    """Return the mean IoU of the test split's masks; None if `mask.truth` is not set."""
    uri = resolve_truth(root, settings)
    return None if uri is None else mean_iou(masked, uri, "test")


def resolve_truth(root: str, settings: MaskSettings) -> str | None:
    """Return the URI of the COCO file with the true masks; None if `mask.truth` is not set."""
    return sample.ensure_sample(root).truth if settings.truth == "sample" else settings.truth


def mean_iou(masked: dataset.Dataset, truth_uri: str, split: str) -> float:
    """Return the mean of `ious` over a split; raise UserError if none of its photos has a true mask."""
    values = ious(masked, truth_uri, split)
    if not values:
        raise UserError(
            f"`mask.truth`: {truth_uri} has a mask for none of the {split} photos of dataset `{masked.name}`. "
            "Photos are matched by file name."
        )
    return float(np.mean(list(values.values())))


def ious(masked: dataset.Dataset, truth_uri: str, split: str | None = None) -> dict[str, float]:
    """Return the IoU of each photo's mask with the true one, by key; 0 for photos without a detected vehicle.

    truth_uri: a COCO file whose annotations with `main` are the true masks, matched by file name. Photos that it does
    not list are omitted.
    """
    truth = _read_truth(truth_uri)
    rows = masked.read(["key", "split", "mask", "source_height", "source_width"])
    result = {}
    for row in rows.to_pylist():
        segmentation = truth.get(row["key"].rsplit("/", 1)[-1])
        if segmentation is not None and split in (None, row["split"]):
            mask = decode_mask(row["mask"], row["source_height"], row["source_width"]) if row["mask"] else None
            result[row["key"]] = 0.0 if mask is None else mask_iou(mask, coco_mask.decode(segmentation).astype(bool))
    return result


def _read_truth(uri: str) -> dict[str, dict[str, Any]]:
    """Return the true mask of each photo, as COCO RLE by file name. Raise UserError if it is no such file."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise UserError(f"`mask.truth`: there is no file {uri}. Give a COCO file, or leave `truth` out.") from error
    try:
        coco = json.loads(data)
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        return {names[item["image_id"]]: item["segmentation"] for item in coco["annotations"] if item["main"]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"`mask.truth`: {uri} is not a COCO file with `images`, and `annotations` with `main` and `segmentation` "
            f"({type(error).__name__}: {error}). Correct it, or leave `truth` out."
        ) from error
