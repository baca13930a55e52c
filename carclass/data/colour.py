"""Colour profiles (ICC) of photos: conversion to sRGB where it changes pixels."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_ROUNDING = 2
"""Largest difference between versions of sRGB itself, in levels of 8 bits: such a profile changes nothing."""
MAX_PROFILE = 4_000_000
"""Bytes of the largest profile that is applied; those of printers take half as much."""
STRIP_ROWS = 256
"""Rows converted at a time, so that temporary copies of large photos stay small."""
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile → PIL's mode of the pixels that it describes."""


@lru_cache(maxsize=16)  # photos of one camera have the same profile
def find_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of pixels of a mode (RGB, L or CMYK) to sRGB.

    Return None if the profile changes nothing, is damaged, or is one of pixels of another mode.
    """
    if len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        colours = _sample_colours(mode)
        converted = transform_pixels(colours, transform).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "CMYK" and np.abs(converted - colours).max() <= MAX_ROUNDING:
        return None
    return transform


def transform_pixels(pixels: np.ndarray, transform: ImageCms.ImageCmsTransform) -> np.ndarray:
    """Convert (H, W, channels) uint8 pixels to (H, W, 3) sRGB. Of grey pixels, the first channel is read."""
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), STRIP_ROWS):
        strip = pixels[top : top + STRIP_ROWS]
        image = Image.fromarray(np.ascontiguousarray(strip[..., 0] if transform.input_mode == "L" else strip))
        if transform.input_mode == "CMYK":
            image = Image.frombytes("CMYK", image.size, image.tobytes())
        rgb[top : top + STRIP_ROWS] = np.asarray(transform.apply(image))
    return rgb


def _sample_colours(mode: str) -> np.ndarray:
    """Return (N, 1, channels) pixels from all of a colour space."""
    if mode == "L":
        return np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    levels = np.linspace(0, 255, 18 if mode == "RGB" else 3).astype(np.uint8)
    return np.stack(np.meshgrid(*[levels] * len(mode)), axis=-1).reshape(-1, 1, len(mode))
