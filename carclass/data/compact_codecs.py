"""Pixels of WebP and AVIF photos by imagecodecs, which keeps them once; PIL keeps four and two more copies.

Files of a single image alone: for the first frame of an animation, imagecodecs writes beyond its memory.
"""

import numpy as np


def decode_webp(data: bytes) -> np.ndarray:
    """Return uint8 (H,W,3) RGB or (H,W,4) RGBA of a WebP. Raise ValueError if it is damaged."""
    import imagecodecs  # late, as few datasets have photos of these formats

    try:
        return np.asarray(imagecodecs.webp_decode(data))
    except imagecodecs.WebpError as error:
        raise ValueError(str(error)) from error


def decode_avif(data: bytes) -> np.ndarray:
    """Return the pixels of an AVIF as they are stored, not yet upright. Raise ValueError if it is damaged.

    (H,W), (H,W,2), (H,W,3) or (H,W,4) of uint8: grey or RGB, with alpha or without; of uint16 if they have more bits.
    """
    import imagecodecs

    try:
        return np.asarray(imagecodecs.avif_decode(data, numthreads=1))
    except imagecodecs.AvifError as error:
        raise ValueError(str(error)) from error
