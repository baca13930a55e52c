"""Masks as COCO's run lengths, and how alike two are."""

import numpy as np
from pycocotools import mask as coco_mask


def encode_mask(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a bool (H,W) mask."""
    return str(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


def decode_mask(counts: str, height: int, width: int) -> np.ndarray:
    """The bool (H,W) mask of COCO's compressed run lengths."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts.encode()}), dtype=bool)


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks of the same shape; 1 when both are empty."""
    union = int(np.logical_or(one, other).sum())
    return float(np.logical_and(one, other).sum() / union) if union else 1.0
