"""How good masks are, where the truth is known."""

import json

import numpy as np
import pyarrow.compute as pc
from pycocotools import mask as coco_mask

from carclass import config, dataset, storage
from carclass.errors import UserError
from carclass.masking.detector import decode_mask, mask_iou
from carclass.sample import source as sample


def measure(root: str, masked: dataset.Dataset, settings: config.Mask) -> float | None:
    """Mean IoU of the test split's masks, where the settings name a truth."""
    if settings.truth is None:
        return None
    return mean_iou(masked, sample.place(root).truth if settings.truth == "sample" else settings.truth, "test")


def mean_iou(masked: dataset.Dataset, truth_uri: str, split: str) -> float:
    """Mean intersection over union of a split's masks with the true ones; photos without a vehicle count as 0.

    truth_uri: a COCO file whose annotations marked `main` are the photographed cars, found by file name.
    UserError when it holds none of the split's photos.
    """
    coco = json.loads(storage.read_bytes(truth_uri))
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    truth = {names[item["image_id"]]: item["segmentation"] for item in coco["annotations"] if item["main"]}
    rows = masked.read(["key", "split", "mask", "source_height", "source_width"])
    scores = []
    for row in rows.filter(pc.field("split") == split).to_pylist():
        if (segmentation := truth.get(row["key"].rsplit("/", 1)[-1])) is not None:
            found = decode_mask(row["mask"], row["source_height"], row["source_width"]) if row["mask"] else None
            scores.append(0.0 if found is None else mask_iou(found, coco_mask.decode(segmentation).astype(bool)))
    if not scores:
        raise UserError(f"`mask.truth`: {truth_uri} names none of the {split} photos of dataset `{masked.name}`.")
    return float(np.mean(scores))
