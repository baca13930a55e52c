"""PNG, WebP, GIF, HEIF and TIFF files: integrity checks, and files without the parts that pixels don't need.

PIL stops at damaged metadata, and doesn't check the pixel data's lengths and checksums.
"""

import io
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple, cast

from carclass.data.orientation import read_orientation
from carclass.data.quarantine import PhotoError, Reason

_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT"})
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, and steps, of each pass of an interlaced PNG."""
_WEBP_PIXELS = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"})
_WEBP_CHUNKS = _WEBP_PIXELS | {b"ICCP", b"EXIF", b"XMP "}
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
_SUBFILE_TYPE, _TILE_WIDTH, _TILE_HEIGHT, _DNG_VERSION = 254, 322, 323, 50706
"""Tags of a TIFF; a camera's raw photo is one, and begins with a reduced copy or has the last tag."""
_TIFF_PIECES = ((273, 279), (324, 325))
"""Tags of offsets and sizes of a TIFF's strips and of its tiles."""
_TIFF_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "I;16", "I;16B"})
MAX_METADATA = 4_000_000
"""Bytes of compressed metadata that are read."""


class Plain(NamedTuple):
    """A file without damaged or unneeded parts, and the orientation that it stated."""

    pieces: Sequence[bytes | memoryview]
    height: int
    width: int
    orientation: int
    profile: bytes  # of colours; empty if there is none
    is_animated: bool = False

    def open(self) -> BinaryIO:
        """Return the file of these pieces."""
        return cast(BinaryIO, io.BufferedReader(_Joined(self.pieces)))


class _Joined(io.RawIOBase):
    """File of several pieces, which are not copied, as they may take much memory."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.pieces, self.position = pieces, 0
        self.ends = list(accumulate(map(len, pieces)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.ends[-1]}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        index = bisect_right(self.ends, self.position)
        if index == len(self.pieces):
            return 0
        piece = self.pieces[index]
        start = self.position - self.ends[index] + len(piece)
        data = piece[start : start + len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def plain_png(data: bytes) -> Plain:
    """Return the PNG with the chunks that determine its pixels, those of the first frame.

    Raise PhotoError if one of them has a wrong checksum, or the end chunk is missing. Other damage is ignored.
    """
    view = memoryview(data)
    pieces: list[bytes | memoryview] = [data[:8]]
    exif, xmp, profile = [], [], b""
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise PhotoError(Reason.TRUNCATED, f"PNG: {len(data)} bytes end before the end chunk")
        kind, body = data[at + 4 : at + 8], view[at + 8 : end - 4]
        sound = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end], "big")
        if not sound and kind != b"IEND" and (kind in _PNG_PIXELS or not _is_ancillary(kind)):
            name = kind.decode("latin-1")
            raise PhotoError(Reason.CORRUPT, f"PNG: the checksum of the {name!r} chunk at byte {at} is wrong")
        if kind in _PNG_PIXELS:
            pieces.append(view[at:end])
        elif kind == b"eXIf":
            exif.append(bytes(body).removeprefix(b"Exif\0\0"))
        elif kind == b"iTXt" and body[: len(_XMP_KEYWORD)] == _XMP_KEYWORD:
            xmp.append(_international_text(bytes(body[len(_XMP_KEYWORD) :])))
        elif kind == b"iCCP" and sound:
            profile = _inflate(bytes(body).partition(b"\0")[2][1:])
        at = end
    if data[12:16] != b"IHDR" or data[8:12] != b"\0\0\0\x0d":
        raise PhotoError(Reason.CORRUPT, "PNG: the first chunk is no header")
    width, height = struct.unpack_from(">II", data, 16)
    return Plain([*pieces, _PNG_END], height, width, read_orientation(exif, xmp), profile)


def check_png_pixels(plain: Plain) -> None:
    """Raise PhotoError if a PNG has fewer rows than its header states; PIL leaves those black."""
    depth, colour, _, _, interlaced = plain.pieces[1][16:21]
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    passes = _PNG_PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [
        (-(-max(0, plain.height - row) // row_step), -(-max(0, plain.width - column) // column_step))
        for row, column, row_step, column_step in passes
    ]
    missing = sum(height * (1 + -(-width * bits // 8)) for height, width in sizes if width)
    inflater = zlib.decompressobj()
    try:
        for body in (piece[8:-4] for piece in plain.pieces[1:] if piece[4:8] == b"IDAT"):
            while body and missing > 0:
                missing -= len(inflater.decompress(body, 1 << 20))
                body = inflater.unconsumed_tail
    except zlib.error as error:
        raise PhotoError(Reason.CORRUPT, f"PNG: {error}") from error
    if missing > 0:
        raise PhotoError(Reason.TRUNCATED, f"PNG: {missing} bytes of pixels are missing")


def _is_ancillary(kind: bytes) -> bool:
    """Return True for chunks that decoders may ignore: their names have a lower-case initial."""
    return kind.isalpha() and kind[:1].islower()


def _international_text(body: bytes) -> bytes:
    """Return the text of an iTXt chunk's body after its keyword, with the names before it; empty if it is damaged."""
    if body[:1] != b"\1":
        return body
    return _inflate(body[2:].split(b"\0", 2)[-1])


def _inflate(data: bytes) -> bytes:
    """Return the first MAX_METADATA bytes of compressed metadata; empty if they are damaged."""
    try:
        return zlib.decompressobj().decompress(data, MAX_METADATA)
    except zlib.error:
        return b""


def plain_webp(data: bytes) -> Plain:
    """Return the WebP with the true length of its chunks. Raise PhotoError if one of pixels is cut off."""
    chunks = list(_webp_chunks(data))
    kind, header = next(((kind, body) for kind, body in chunks if kind in _WEBP_PIXELS), (b"", b""))
    if kind == b"VP8X" and len(header) >= 10:
        width, height = (1 + int.from_bytes(header[at : at + 3], "little") for at in (4, 7))
    elif kind == b"VP8L" and len(header) >= 5:
        bits = int.from_bytes(header[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and len(header) >= 10:
        width, height = (int.from_bytes(header[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    else:
        raise PhotoError(Reason.CORRUPT, "WEBP: no chunk of pixels")
    exif = [body.removeprefix(b"Exif\0\0") for kind, body in chunks if kind == b"EXIF"]
    orientation = read_orientation(exif, [body for kind, body in chunks if kind == b"XMP "])
    body = b"".join(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    profile = next((body for kind, body in chunks if kind == b"ICCP"), b"")
    pieces = [b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP", body]
    is_animated = any(kind in (b"ANIM", b"ANMF") for kind, _ in chunks)
    return Plain(pieces, height, width, orientation, profile, is_animated)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and body of each chunk; the file's stated length may be too small or too large."""
    at, stated_end = 12, 8 + int.from_bytes(data[4:8], "little")
    needed = True  # until the first frame of an animation is complete
    while at < len(data) and (data[at : at + 4] in _WEBP_CHUNKS or at + 8 <= stated_end):
        kind = data[at : at + 4]
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if end > len(data):
            break
        if kind in _WEBP_CHUNKS:
            yield kind, data[at + 8 : end]
        at, needed = end + end % 2, needed and kind not in (b"VP8 ", b"VP8L", b"ANMF")
    if needed:
        raise PhotoError(Reason.TRUNCATED, f"WEBP: {len(data)} bytes are fewer than the header states")


def check_boxes(data: bytes, kind: str) -> bool:
    """Return True if a HEIF or AVIF file may have several images, as it has tracks or layers.

    Raise PhotoError if it ends before its pixels; other bytes may follow these.
    """
    at, found = 0, set()
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        size = size or len(data) - at
        if not 8 <= size <= len(data) - at:
            break
        at += size
        found.add(name)
    if not found & {b"meta", b"moov"} or (at < len(data) and b"mdat" not in found):
        raise PhotoError(Reason.TRUNCATED, f"{kind}: {len(data)} bytes end within a box")
    return b"moov" in data or b"a1lx" in data


def check_tiff(image: Any, num_bytes: int, max_pixels: int) -> None:
    """Raise PhotoError for a TIFF, opened by PIL, that is a camera's raw photo, has other samples or is cut off."""
    tags = image.tag_v2
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE, 0) & 1:
        detail = "a camera's raw format is not supported: convert it to JPEG, PNG or WebP"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, detail)
    if image.mode not in _TIFF_MODES:
        detail = f"TIFF with pixels of kind {image.mode}: save it with 8 or 16 bits, as RGB or grey"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, detail)
    for offsets, sizes in _TIFF_PIECES:
        ends = [start + size for start, size in zip(tags.get(offsets, ()), tags.get(sizes, ()), strict=False)]
        if ends and max(ends) > num_bytes:
            raise PhotoError(Reason.TRUNCATED, f"TIFF: {num_bytes} bytes end before the pixels")
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    if width * height > max_pixels:
        raise PhotoError(Reason.TOO_LARGE, f"TIFF with tiles of {width}x{height} pixels")


def check_gif(data: bytes) -> None:
    """Raise PhotoError if the first frame's data have no end, or nothing follows them."""
    at = 13 + _gif_colours(data[10:11])
    has_frame = False
    while at < len(data):
        block = data[at : at + 1]
        if has_frame or block == b";":
            return
        if block == b",":
            at, has_frame = at + 11 + _gif_colours(data[at + 9 : at + 10]), True
        elif block == b"!":
            at += 2
        else:
            raise PhotoError(Reason.CORRUPT, f"GIF: no block at byte {at}")
        while (size := data[at : at + 1]) not in (b"\0", b""):
            at += 1 + size[0]
        at += 1
    raise PhotoError(Reason.TRUNCATED, "GIF: the end mark is missing")


def _gif_colours(flags: bytes) -> int:
    """Return the bytes of the colour table that a descriptor announces."""
    return 6 << (flags[0] & 7) if flags and flags[0] & 0x80 else 0
