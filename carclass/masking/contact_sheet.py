"""Pictures to judge masks by: a photo, what was found in it and what became of it, side by side.

Lines and captions are drawn after the photo is scaled, so they are as sharp on a photo of 8000 pixels as on one of 80.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from carclass.data import photo as pixels

CELL_HEIGHT, CELL_WIDTH = 180, 240
"""Pixels of each of the three pictures in a panel."""
MAX_ENLARGEMENT = 3
"""A tiny photo stays visibly tiny: it is no blur that fills the cell."""
GAP = 4
NUM_COLUMNS = 2
MARGIN, CAPTION_HEIGHT, TITLE_HEIGHT = 20, 46, 44
JPEG_QUALITY = 85

PADDING = (38, 43, 51)  # none of the colours a background is commonly painted in, and easy on a light or dark page
SEPARATOR = (108, 115, 127)
TINT, TINT_STRENGTH = (255, 0, 144), 0.32  # magenta: rare in streets and in the paint of cars
CONTOUR = (255, 255, 255)
CONTOUR_WIDTH = 2
BOX = (255, 214, 10)
INK, MUTED = (23, 29, 39), (86, 97, 114)


@dataclass(kw_only=True, slots=True)
class MaskedPhoto:
    """A photo, what the detector found in it and what was made of it."""

    key: str
    """Source key of the photo."""
    photo: np.ndarray
    """uint8 (H,W,3) RGB."""
    box: np.ndarray | None
    """float (4,): x1, y1, x2, y2 in pixels of `photo`."""
    mask: np.ndarray | None
    """bool (H,W)."""
    result: np.ndarray
    """uint8 (h,w,3) RGB: what the dataset keeps."""
    outcome: str
    """`vehicle` or `no_vehicle`."""
    vehicle_class: str | None
    score: float | None
    """0 to 1."""
    notes: list[str]
    """What a person should know of it: "several vehicles", "IoU 0.41"."""

    def __post_init__(self) -> None:
        assert self.mask is None or self.mask.shape == self.photo.shape[:2], (self.key, self.photo.shape)

    @property
    def headline(self) -> str:
        """What was found and how surely: "car 0.98", "no vehicle"."""
        name = self.vehicle_class or self.outcome.replace("_", " ")
        return name if self.score is None else f"{name} {self.score:.2f}"


def shrink_photo(look: MaskedPhoto) -> MaskedPhoto:
    """The look at the size at which a panel shows it, so that many can be held in memory; never enlarged."""
    return _scale(look, max_scale=1)


def draw_panel(look: MaskedPhoto) -> np.ndarray:
    """Photo, photo with mask and box, result: uint8 (CELL_HEIGHT, 3 * CELL_WIDTH + 2 * GAP, 3).

    Each keeps its aspect within its cell. Without a vehicle the middle one says so and shows the bare photo.
    """
    look = _scale(look, max_scale=MAX_ENLARGEMENT)
    pictures = [look.photo, _overlay(look), look.result]
    strip = np.full((CELL_HEIGHT, 3 * CELL_WIDTH + 2 * GAP, 3), PADDING, np.uint8)
    for position, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        top, left = (CELL_HEIGHT - height) // 2, (CELL_WIDTH - width) // 2 + position * (CELL_WIDTH + GAP)
        strip[top : top + height, left : left + width] = picture
    for position in (1, 2):
        strip[:, position * (CELL_WIDTH + GAP) - GAP : position * (CELL_WIDTH + GAP)] = SEPARATOR
    return _draw_caption(strip, look.headline) if look.outcome == "no_vehicle" else strip


def draw_contact_sheet(looks: Sequence[MaskedPhoto], title: str = "") -> bytes:
    """Panels in two columns with captions (class, score and notes; key), as one JPEG file; at most 500 looks."""
    width = 3 * CELL_WIDTH + 2 * GAP
    row_height = CELL_HEIGHT + CAPTION_HEIGHT + MARGIN
    top = MARGIN + (TITLE_HEIGHT if title else 0)
    height = top + math.ceil(len(looks) / NUM_COLUMNS) * row_height
    sheet = Image.new("RGB", (MARGIN + NUM_COLUMNS * (width + MARGIN), max(height, top + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(size=size) for size in (24, 15, 13))
    draw.text((MARGIN, MARGIN - 4), _fit_text(title, large, sheet.width - 2 * MARGIN), INK, large)
    for number, look in enumerate(looks):
        row, column = divmod(number, NUM_COLUMNS)
        x, y = MARGIN + column * (width + MARGIN), top + row * row_height
        sheet.paste(Image.fromarray(draw_panel(look)), (x, y))
        line = " · ".join([look.headline, *look.notes])
        draw.text((x, y + CELL_HEIGHT + 6), _fit_text(line, middle, width), INK, middle)
        draw.text((x, y + CELL_HEIGHT + 26), _fit_text(look.key, small, width, keep_end=True), MUTED, small)
    return pixels.encode(np.asarray(sheet), quality=JPEG_QUALITY)


def _scale(look: MaskedPhoto, max_scale: float) -> MaskedPhoto:
    height, width = _fit(look.photo, max_scale)
    box, mask = look.box, look.mask
    if box is not None:
        box = box * np.tile([width / look.photo.shape[1], height / look.photo.shape[0]], 2)
    if mask is not None:
        cover = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX)
        mask = np.asarray(cover) >= 128
    photo = pixels.resize(look.photo, height, width)
    return replace(
        look, photo=photo, box=box, mask=mask, result=pixels.resize(look.result, *_fit(look.result, max_scale))
    )


def _fit(picture: np.ndarray, max_scale: float) -> tuple[int, int]:
    height, width = picture.shape[:2]
    scale = min(CELL_HEIGHT / height, CELL_WIDTH / width, max_scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _overlay(look: MaskedPhoto) -> np.ndarray:
    """The photo with the mask as a tint inside a contour, and the box around it."""
    picture = look.photo.copy()
    if look.mask is not None:
        tinted = (1 - TINT_STRENGTH) * picture[look.mask] + TINT_STRENGTH * np.array(TINT)
        picture[look.mask] = tinted.astype(np.uint8)
        picture[look.mask & ~_erode(look.mask, CONTOUR_WIDTH)] = CONTOUR
    if look.box is None:
        return picture
    height, width = picture.shape[:2]
    corners = np.clip(look.box, 0, [width - 1, height - 1] * 2)
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).rectangle(corners.round().tolist(), outline=BOX, width=2)
    return np.asarray(image)


def _erode(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask less its edge; where the photo ends is no edge of the vehicle."""
    for _ in range(width):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _draw_caption(strip: np.ndarray, words: str) -> np.ndarray:
    """Words on a plate at the foot of the middle cell."""
    image = Image.fromarray(strip)
    foot = (strip.shape[1] // 2, CELL_HEIGHT - 14)
    font = ImageFont.load_default(size=17)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox(foot, words, font, anchor="ms")
    draw.rounded_rectangle((left - 12, top - 8, right + 12, bottom + 8), 6, INK)
    draw.text(foot, words, "white", font, anchor="ms")
    return np.asarray(image)


def _fit_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, keep_end: bool = False) -> str:
    """One line of at most `width` pixels; what does not fit is an ellipsis at its end, or at its start."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text

    def cut(length: int) -> str:
        return f"…{text[len(text) - length :]}" if keep_end else f"{text[:length]}…"

    def width_of(length: int) -> int:
        return math.ceil(font.getlength(cut(length)))

    return cut(bisect.bisect_right(range(len(text)), width, key=width_of) - 1)
