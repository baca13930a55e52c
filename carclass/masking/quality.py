"""How good masks are, where the truth is known."""

import json

import numpy as np
from pycocotools import mask as coco_mask

from carclass import storage
from carclass.config.schema import MaskSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.masking.rle import decode_mask, mask_iou
from carclass.sample import source as sample


def measure(root: str, masked: dataset.Dataset, settings: MaskSettings) -> float | None:
    """Mean IoU of the test split's masks, where the settings name a truth."""
    uri = truth(root, settings)
    return None if uri is None else mean_iou(masked, uri, "test")


def truth(root: str, settings: MaskSettings) -> str | None:
    """Where the true masks are, if they are known."""
    return sample.write_once(root).truth if settings.truth == "sample" else settings.truth


def mean_iou(masked: dataset.Dataset, truth_uri: str, split: str) -> float:
    """Mean of `ious` over a split. UserError when the truth knows none of its photos."""
    found = ious(masked, truth_uri, split)
    if not found:
        raise UserError(f"`mask.truth`: {truth_uri} names none of the {split} photos of dataset `{masked.name}`.")
    return float(np.mean(list(found.values())))


def ious(masked: dataset.Dataset, truth_uri: str, split: str | None = None) -> dict[str, float]:
    """Intersection over union of each photo's mask with the true one, by key; 0 for a photo without a vehicle.

    truth_uri: a COCO file whose annotations marked `main` are the photographed cars, found by file name; photos that
    it doesn't name are left out.
    """
    coco = json.loads(storage.read_bytes(truth_uri))
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    truth = {names[item["image_id"]]: item["segmentation"] for item in coco["annotations"] if item["main"]}
    rows = masked.read(["key", "split", "mask", "source_height", "source_width"])
    found = {}
    for row in rows.to_pylist():
        segmentation = truth.get(row["key"].rsplit("/", 1)[-1])
        if segmentation is not None and split in (None, row["split"]):
            mask = decode_mask(row["mask"], row["source_height"], row["source_width"]) if row["mask"] else None
            found[row["key"]] = 0.0 if mask is None else mask_iou(mask, coco_mask.decode(segmentation).astype(bool))
    return found
