"""Contact sheet of masked photos: the photo, its box and mask, and the result, side by side.

Lines and captions are drawn after scaling, so they are sharp at any size of the photo.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from carclass.data.photo import encode, resize
from carclass.reporting.fonts import fit_font

CELL_HEIGHT, CELL_WIDTH = 180, 240
"""Size in pixels of each of the three pictures in a panel."""
MAX_ENLARGEMENT = 3
"""Largest scale of small photos, so that they stay recognisable as small."""
GAP = 4
NUM_COLUMNS = 2
MARGIN, CAPTION_HEIGHT, TITLE_HEIGHT = 20, 46, 44
JPEG_QUALITY = 85

PADDING = (38, 43, 51)  # distinct from common fill colours, on light and dark pages
SEPARATOR = (108, 115, 127)
TINT, TINT_STRENGTH = (255, 0, 144), 0.32  # magenta: rare in street scenes and car paint
CONTOUR = (255, 255, 255)
CONTOUR_WIDTH = 2
BOX = (255, 214, 10)
INK, MUTED = (23, 29, 39), (86, 97, 114)


@dataclass(kw_only=True, slots=True)
class MaskedPhoto:
    """A photo with its detection and the masked result."""

    key: str
    """Source key of the photo."""
    photo: np.ndarray
    """uint8 (H,W,3) RGB."""
    box: np.ndarray | None
    """float (4,): x1, y1, x2, y2 in pixels of `photo`."""
    mask: np.ndarray | None
    """bool (H,W)."""
    result: np.ndarray
    """uint8 (h,w,3) RGB: the photo in the masked dataset."""
    outcome: str
    """`vehicle` or `no_vehicle`."""
    vehicle_class: str | None
    score: float | None
    """0 to 1."""
    notes: list[str]
    """Remarks for the caption, such as "touches the border" or "IoU 0.41"."""

    def __post_init__(self) -> None:
        assert self.mask is None or self.mask.shape == self.photo.shape[:2], (self.key, self.photo.shape)

    @property
    def headline(self) -> str:
        """Return the vehicle class with the score, or the outcome: "car 0.98", "no vehicle"."""
        name = self.vehicle_class or self.outcome.replace("_", " ")
        return name if self.score is None else f"{name} {self.score:.2f}"


def shrink_photo(masked: MaskedPhoto) -> MaskedPhoto:
    """Shrink a photo to the size of its panel, to hold many in memory; never enlarge it."""
    return _scale(masked, max_scale=1)


def draw_panel(masked: MaskedPhoto) -> np.ndarray:
    """Draw photo, photo with mask and box, and result: uint8 (CELL_HEIGHT, 3 * CELL_WIDTH + 2 * GAP, 3).

    Aspect ratios are kept. Without a vehicle, the middle picture is the photo with a caption.
    """
    masked = _scale(masked, max_scale=MAX_ENLARGEMENT)
    pictures = [masked.photo, _overlay(masked), masked.result]
    strip = np.full((CELL_HEIGHT, 3 * CELL_WIDTH + 2 * GAP, 3), PADDING, np.uint8)
    for position, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        top, left = (CELL_HEIGHT - height) // 2, (CELL_WIDTH - width) // 2 + position * (CELL_WIDTH + GAP)
        strip[top : top + height, left : left + width] = picture
    for position in (1, 2):
        strip[:, position * (CELL_WIDTH + GAP) - GAP : position * (CELL_WIDTH + GAP)] = SEPARATOR
    return _draw_caption(strip, masked.headline) if masked.outcome == "no_vehicle" else strip


def draw_contact_sheet(photos: Sequence[MaskedPhoto], title: str = "") -> bytes:
    """Draw panels in two columns, with class, score, notes and key, as a JPEG file; for at most 500 photos."""
    width = 3 * CELL_WIDTH + 2 * GAP
    row_height = CELL_HEIGHT + CAPTION_HEIGHT + MARGIN
    top = MARGIN + (TITLE_HEIGHT if title else 0)
    height = top + math.ceil(len(photos) / NUM_COLUMNS) * row_height
    sheet = Image.new("RGB", (MARGIN + NUM_COLUMNS * (width + MARGIN), max(height, top + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    _draw_line(draw, (MARGIN, MARGIN - 4), title, sheet.width - 2 * MARGIN, INK, 24)
    for number, masked in enumerate(photos):
        row, column = divmod(number, NUM_COLUMNS)
        x, y = MARGIN + column * (width + MARGIN), top + row * row_height
        sheet.paste(Image.fromarray(draw_panel(masked)), (x, y))
        line = " · ".join([masked.headline, *masked.notes])
        _draw_line(draw, (x, y + CELL_HEIGHT + 6), line, width, INK, 15)
        _draw_line(draw, (x, y + CELL_HEIGHT + 26), masked.key, width, MUTED, 13, keep_end=True)
    return encode(np.asarray(sheet), quality=JPEG_QUALITY)


def _scale(masked: MaskedPhoto, max_scale: float) -> MaskedPhoto:
    height, width = _fit(masked.photo, max_scale)
    box, mask = masked.box, masked.mask
    if box is not None:
        box = box * np.tile([width / masked.photo.shape[1], height / masked.photo.shape[0]], 2)
    if mask is not None:
        cover = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
        mask = np.asarray(cover) >= 128
    photo, result = resize(masked.photo, height, width), resize(masked.result, *_fit(masked.result, max_scale))
    return replace(masked, photo=photo, box=box, mask=mask, result=result)


def _fit(picture: np.ndarray, max_scale: float) -> tuple[int, int]:
    height, width = picture.shape[:2]
    scale = min(CELL_HEIGHT / height, CELL_WIDTH / width, max_scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _overlay(masked: MaskedPhoto) -> np.ndarray:
    """Return the photo with a tinted and outlined mask, and the box."""
    picture, mask = masked.photo.copy(), masked.mask
    if mask is not None:
        tinted = (1 - TINT_STRENGTH) * picture[mask] + TINT_STRENGTH * np.array(TINT)
        picture[mask] = tinted.astype(np.uint8)
        picture[mask & ~_erode(mask, CONTOUR_WIDTH)] = CONTOUR
    if masked.box is None:
        return picture
    height, width = picture.shape[:2]
    corners = np.clip(masked.box, 0, [width - 1, height - 1] * 2)
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).rectangle(corners.round().tolist(), outline=BOX, width=2)
    return np.asarray(image)


def _erode(mask: np.ndarray, width: int) -> np.ndarray:
    """Erode a mask by `width` pixels, but not along the photo's edge."""
    for _ in range(width):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _draw_caption(strip: np.ndarray, caption: str) -> np.ndarray:
    """Return the strip with a caption at the bottom of the middle cell."""
    image = Image.fromarray(strip)
    anchor = (strip.shape[1] // 2, CELL_HEIGHT - 14)
    caption, font = fit_font(caption, 17)
    caption = _fit_text(caption, font, CELL_WIDTH - 24)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox(anchor, caption, font, anchor="ms")
    draw.rounded_rectangle((left - 12, top - 8, right + 12, bottom + 8), 6, INK)
    draw.text(anchor, caption, "white", font, anchor="ms")
    return np.asarray(image)


def _draw_line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    colour: tuple[int, int, int],
    size: int,
    keep_end: bool = False,
) -> None:
    """Draw a line of text of any script, shortened to `width` pixels; size: of its font in pixels."""
    text, font = fit_font(text, size)
    draw.text(place, _fit_text(text, font, width, keep_end), colour, font)


def _fit_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, keep_end: bool = False) -> str:
    """Shorten text to one line of at most `width` pixels, with an ellipsis at the end or, if keep_end, at the start."""
    if font.getlength(text) <= width:
        return text

    def cut(length: int) -> str:
        return f"…{text[len(text) - length :]}" if keep_end else f"{text[:length]}…"

    def width_of(length: int) -> int:
        return math.ceil(font.getlength(cut(length)))

    return cut(bisect.bisect_right(range(len(text)), width, key=width_of) - 1)
