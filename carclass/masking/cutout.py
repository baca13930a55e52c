"""Background removal: crop to the vehicle and paint over everything else."""

import numpy as np
from PIL import Image

from carclass.config.schema import CutoutSettings


def cut(photo: np.ndarray, box: np.ndarray, mask: np.ndarray | None, settings: CutoutSettings) -> np.ndarray:
    """Return the photo without its background: uint8 (h,w,3), smaller than the photo only if the mode crops.

    photo: uint8 (H,W,3) RGB; box: float (4,) x1,y1,x2,y2 in its pixels; mask: bool (H,W), required unless the
    mode is `crop`.
    """
    if "mask" in settings.mode:
        assert mask is not None
        photo = paint_background(photo, mask, settings.fill)
    if "crop" in settings.mode:
        x1, y1, x2, y2 = crop_window(box, photo.shape[:2], settings.margin)
        photo = np.ascontiguousarray(photo[y1:y2, x1:x2])
    return photo


def paint_background(photo: np.ndarray, mask: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Return the photo with all pixels outside the mask set to the fill colour."""
    canvas = Image.new("RGB", (photo.shape[1], photo.shape[0]), fill)
    canvas.paste(Image.fromarray(photo), mask=Image.fromarray(mask.astype(np.uint8) * 255))
    return np.asarray(canvas)


def crop_window(box: np.ndarray, shape: tuple[int, ...], margin: float) -> tuple[int, int, int, int]:
    """Return the integer window x1,y1,x2,y2 of a box with its margin, clipped to the photo and at least 1x1."""
    height, width = shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    pad_x, pad_y = margin * (x2 - x1), margin * (y2 - y1)
    left, top = max(0, int(x1 - pad_x)), max(0, int(y1 - pad_y))
    left, top = min(left, width - 1), min(top, height - 1)
    right, bottom = min(width, int(np.ceil(x2 + pad_x))), min(height, int(np.ceil(y2 + pad_y)))
    return left, top, max(right, left + 1), max(bottom, top + 1)
