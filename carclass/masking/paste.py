"""Masks as probabilities on a grid within a box, and as pixels of a photo.

This module does not import torch, so that writing processes start in a second.
"""

import numpy as np


def paste_mask(grid: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels of a photo in which a mask's probability is at least one half: bool (height, width).

    grid: float32 (M,M), probabilities at the centres of the cells of the box, interpolated bilinearly between them and
    towards zero outside; box: float (4,) x1,y1,x2,y2 in pixels. Detectron2's `paste_masks_in_image`, which samples the
    grid at each pixel, as two matrix products.
    """
    mask = np.zeros((height, width), bool)
    x1, y1, x2, y2 = (float(value) for value in box)
    rows, row_weights = _axis_weights(y1, y2, height, len(grid))
    columns, column_weights = _axis_weights(x1, x2, width, len(grid))
    mask[rows, columns] = row_weights @ grid @ column_weights.T >= 0.5
    return mask


def touches_border(mask: np.ndarray) -> bool:
    """Return True if a bool (H,W) mask reaches the photo's edge, where the vehicle may be truncated."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def _axis_weights(start: float, end: float, length: int, cells: int) -> tuple[slice, np.ndarray]:
    """Return the pixels along an axis that a box may cover, and the weight of each cell in them, float32 (P,cells)."""
    first, last = max(0, int(np.floor(start)) - 1), min(length, int(np.ceil(end)) + 1)
    first = min(first, last)
    position = (np.arange(first, last, dtype=np.float32) + np.float32(0.5 - start)) * np.float32(
        cells / max(end - start, 1e-6)
    ) - np.float32(0.5)
    weights = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells, dtype=np.float32)))
    return slice(first, last), weights
