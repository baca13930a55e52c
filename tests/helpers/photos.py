"""Photos for tests, and their similarity."""

import io

import numpy as np
from PIL import Image


def scene(height: int = 120, width: int = 160) -> np.ndarray:
    """Draw smooth colours with a few edges and no symmetry, uint8: little JPEG loss, and every flip changes it."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2)
    pixels[height // 8 : height // 4, width // 8 : width // 2] = (230, 40, 30)
    return pixels.astype(np.uint8)


def saved(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy_jpeg() -> bytes:
    noise = np.random.default_rng(7).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    return saved(noise, "JPEG", quality=90)


def overwritten(data: bytes, start: int, count: int = 40) -> bytes:
    damaged = bytearray(data)
    damaged[start : start + count] = np.random.default_rng(3).bytes(count)
    return bytes(damaged)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB."""
    return 10 * np.log10(255**2 / max(1e-9, np.mean((first.astype(float) - second) ** 2)))
