"""Measures of a single photo: size, brightness, contrast and sharpness, and a grey thumbnail for comparisons."""

from typing import NamedTuple

import numpy as np

from carclass.audit.near_duplicates import SIDE
from carclass.data import photo

SHARPNESS_SIDE = 128
"""Side in pixels at which sharpness is measured, so that it does not depend on the photo's size."""
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""


class PhotoMeasures(NamedTuple):
    """Measures of a photo."""

    shorter_side: int  # pixels
    brightness: float  # mean, 0 to 1
    contrast: float  # standard deviation, 0 to 0.5
    sharpness: float  # variance of the Laplacian, in units of the variance of the pixels


def measure_photo(pixels: np.ndarray) -> PhotoMeasures:
    """Return the measures of a photo: uint8 (H,W,3) RGB."""
    grey = _grey(pixels, SHARPNESS_SIDE)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    variance = float(grey.var())
    return PhotoMeasures(
        min(pixels.shape[:2]),
        float(grey.mean()),
        variance**0.5,
        float(laplacian.var()) / max(variance, 1e-6),
    )


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return the grey thumbnail of a photo: uint8 (H,W,3) → uint8 (SIDE,SIDE)."""
    return (_grey(pixels, SIDE) * 255).round().astype(np.uint8)


def _grey(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return the photo as a grey square: float32 (side,side), 0 to 1."""
    return photo.resize(pixels, side, side).astype(np.float32) @ GREY / 255
