"""Fonts for text of any script in pictures: Pillow's own, matplotlib's DejaVu Sans, or another one of the system."""

import logging
import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import ImageFont

from carclass.formatting import terminal_text

PLAIN = [*range(0x20, 0x7F), ord("·"), ord("…")]
"""Code points that every font must have, for escapes and captions; Pillow's own has few others."""
PLACEHOLDERS = ("last resort", "blank")
"""Parts of the names of fonts that have every character, but draw none of them."""


class SystemFont(NamedTuple):
    """A font file of the system."""

    path: str
    face: int
    """Index of the font in the file."""
    codes: np.ndarray
    """int (N,): code points of its characters."""


def fit_font(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Return a text and the font that has most of its characters; the others are escaped: "\\u65e5" for 日."""
    text = terminal_text(" ".join(unicodedata.normalize("NFC", text).split()))
    codes = np.array([ord(character) for character in text], int)
    if np.isin(codes, PLAIN).all():
        return text, ImageFont.load_default(size=size)
    font = max(_system_fonts(), key=lambda font: np.isin(codes, font.codes).sum())  # the first of equals
    is_drawn = np.isin(codes, font.codes)
    escaped = (c if ok else c.encode("unicode_escape").decode() for c, ok in zip(text, is_drawn, strict=True))
    return "".join(escaped), ImageFont.truetype(font.path, size, font.face)


@cache
def _system_fonts() -> list[SystemFont]:
    """Return all upright fonts: matplotlib's DejaVu Sans first, then regular weights and widths before others."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it notes each font that it can't read
    from matplotlib import font_manager  # takes a second, and few names need it

    def order(entry: font_manager.FontEntry) -> tuple[bool, bool, int, str]:
        weight = entry.weight if isinstance(entry.weight, int) else font_manager.weight_dict[entry.weight]
        is_own = entry.name == "DejaVu Sans" and "matplotlib" in entry.fname
        return not is_own, entry.stretch != "normal", abs(weight - 400), entry.fname

    upright = [entry for entry in font_manager.fontManager.ttflist if entry.style == "normal"]
    drawing = [entry for entry in upright if not any(word in entry.name.lower() for word in PLACEHOLDERS)]
    fonts = (_read_font(entry.fname, entry.index) for entry in sorted(drawing, key=order))
    return [font for font in fonts if font is not None]


def _read_font(path: str, face: int) -> SystemFont | None:
    """Return a font with its characters; None for one that lacks PLAIN or can't be drawn at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path, face_index=face)
        ImageFont.truetype(path, 15, face)
    except (OSError, RuntimeError):  # gone since it was listed, damaged, or made of bitmaps, such as emoji
        return None
    codes = np.array(sorted(font.get_charmap()), int)
    return SystemFont(path, face, codes) if np.isin(PLAIN, codes).all() else None
