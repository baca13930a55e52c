"""Masks as COCO run-length encodings and polygons, their sizes, and their overlap."""

import math
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""Compressed COCO RLE: `size` (height, width) and `counts` (bytes)."""
MAX_OVERHANG = 1.0
"""Share of a photo's side by which a polygon may reach beyond it."""
MAX_SIDE = 2**16
"""Largest side of a mask in pixels: no photo has more."""
CHAR_OFFSET, CHAR_BITS = 48, 5
"""Value and number of bits of a character of COCO's compressed run lengths; above the bits is a continuation flag."""


def encode_mask(mask: np.ndarray) -> str:
    """Encode a bool (H,W) mask as COCO's compressed RLE."""
    return str(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


def decode_mask(counts: str, height: int, width: int) -> np.ndarray:
    """Decode COCO's compressed RLE to a bool (H,W) mask."""
    return decode_rle({"size": [height, width], "counts": counts.encode()})


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two bool masks of the same shape; 1 if both are empty."""
    union = int(np.logical_or(first, second).sum())
    return float(np.logical_and(first, second).sum() / union) if union else 1.0


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a bool mask to (height, width): True where at least half of a pixel is covered."""
    if mask.shape == (height, width):
        return mask
    cover = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
    return np.asarray(cover) >= 128


def segmentation_rle(segmentation: Any, height: Any, width: Any) -> Rle:
    """Convert a COCO `segmentation` to a compressed RLE: polygons, or an RLE with compressed counts or a list.

    height, width: of the photo, which polygons need; an RLE has its own. Raise ValueError if it is neither, or damaged.
    """
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError("its RLE has no `size` of two numbers")
        shape = _check_shape(*size)
        counts = _run_lengths(segmentation.get("counts"))
        if min(counts, default=-1) < 0 or sum(counts) != shape[0] * shape[1]:
            raise ValueError(f"the run lengths of its RLE don't add up to {shape[0]} x {shape[1]} pixels")
        return coco_mask.frPyObjects({"size": [*shape], "counts": counts}, *shape)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its `segmentation` is neither a list of polygons nor an RLE")
    shape = _check_shape(height, width)
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    for polygon in polygons:
        _check_polygon(polygon, *shape)
    return coco_mask.merge(coco_mask.frPyObjects([[float(value) for value in one] for one in polygons], *shape))


def decode_rle(rle: Rle) -> np.ndarray:
    """Decode a compressed RLE to a bool (H,W) mask."""
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def rle_area(rle: Rle) -> int:
    """Return the number of pixels in a mask."""
    return int(coco_mask.area(rle))


def _check_shape(height: Any, width: Any) -> tuple[int, int]:
    """Return a mask's shape. Raise ValueError if a side is no positive integer."""
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= MAX_SIDE:
            raise ValueError(f"its image has no `height` and `width` in whole pixels up to {MAX_SIDE}")
    return height, width


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """Raise ValueError unless it is a list x, y, x, y, … of at least three points in or near the photo."""
    is_list = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    if not is_list or not all(isinstance(value, int | float) and math.isfinite(value) for value in polygon):
        raise ValueError("a polygon is not a list x, y, x, y, … of three points or more")
    for values, side in ((polygon[::2], width), (polygon[1::2], height)):
        if min(values) < -MAX_OVERHANG * side or max(values) > (1 + MAX_OVERHANG) * side:
            raise ValueError(f"a polygon lies outside of its image of {width} x {height} pixels")


def _run_lengths(counts: Any) -> list[int]:
    """Return the run lengths of an RLE, compressed or not. Raise ValueError if they are neither.

    pycocotools decodes lengths that don't add up to the photo's size to random pixels, so they are checked before.
    """
    if isinstance(counts, list) and all(type(count) is int for count in counts):
        return counts
    if not isinstance(counts, str):
        raise ValueError("the `counts` of its RLE are neither text nor a list of whole numbers")
    lengths: list[int] = []
    value = shift = 0
    for char in counts:
        code = ord(char) - CHAR_OFFSET
        if not 0 <= code < 2 ** (CHAR_BITS + 1):
            raise ValueError(f"the `counts` of its RLE have the character {char!r}")
        value |= code % 2**CHAR_BITS << shift
        shift += CHAR_BITS
        if code < 2**CHAR_BITS:  # the last character of a value, whose highest bit is the sign
            value -= (code >> (CHAR_BITS - 1)) << shift
            # From the fourth on, a value is the difference to the last but one.
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("the `counts` of its RLE are cut")
    return lengths
