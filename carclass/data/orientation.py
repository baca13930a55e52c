"""Orientation of photos, as EXIF or XMP states it: 1 to 8, where 1 is upright."""

import re
import struct
from collections.abc import Iterable

import numpy as np

_TAG = 0x0112
_TYPES = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's integer types: byte, short, long, and the signed ones
_XMP = re.compile(rb"""\btiff:Orientation\s*(?:=\s*["']|>)\s*(\d+)\s*["'<]""")


def read_orientation(exif_blocks: Iterable[bytes], xmp_packets: Iterable[bytes]) -> int:
    """Return the orientation of the first EXIF block (a TIFF header and its directories) that states one, else XMP's.

    Return 1 if there is none or it is not 1 to 8.
    """
    stated = [value for block in exif_blocks if (value := _from_exif(block)) is not None]
    if not stated:
        # A UTF-16 packet without its zero bytes reads like UTF-8.
        found = [_XMP.search(packet.replace(b"\0", b"")) for packet in xmp_packets]
        stated = [int(match[1]) for match in found if match]
    return stated[0] if stated and 1 <= stated[0] <= 8 else 1


def make_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror (H, W, 3) pixels of this orientation to upright, contiguous ones."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _from_exif(tiff: bytes) -> int | None:
    """Return the value of the tag in the first directory, or None if it is missing or the block ends before it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * num_entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == _TAG:
                return int(struct.unpack_from(order + _TYPES[kind], tiff, at + 8)[0]) if kind in _TYPES else 1
    except struct.error:
        pass
    return None
