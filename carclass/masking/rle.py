"""Masks as COCO run-length encodings, and their overlap."""

import numpy as np
from pycocotools import mask as coco_mask


def encode_mask(mask: np.ndarray) -> str:
    """Encode a bool (H,W) mask as COCO's compressed RLE."""
    return str(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


def decode_mask(counts: str, height: int, width: int) -> np.ndarray:
    """Decode COCO's compressed RLE to a bool (H,W) mask."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts.encode()}), dtype=bool)


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two bool masks of the same shape; 1 if both are empty."""
    union = int(np.logical_or(first, second).sum())
    return float(np.logical_and(first, second).sum() / union) if union else 1.0
