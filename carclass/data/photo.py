"""Bytes to pixels and back, strictly: a uint8 RGB array or a named reason.

Read: JPEG (8 bits: RGB, grey, CMYK; baseline and progressive), PNG, WebP, BMP and GIF, told apart by their
first bytes, never by the file's name. Everything else is `unsupported_format` or `not_an_image`.
- The size is checked in the header, before any pixel is decoded or allocated.
- EXIF and PNG/WebP orientation is applied. Colour profiles are ignored: pixels are taken as sRGB.
- An animation is its first frame: the still a browser shows first, as TensorFlow's `decode_image` takes it.
- Transparency is laid over white, the page such cut-outs are drawn for; the colour hidden under a fully
  transparent pixel never shows. 16-bit samples keep their high byte.
- What a format lets be checked is checked: JPEG's entropy coding, PNG's checksums, lengths and end marks
  everywhere. Damage which decodes to legal pixels (in a BMP, a WebP, a few changed bytes of a JPEG whose
  coding falls into step again) leaves no trace that any decoder could see.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

# PIL's own limit warns or raises by its own number; ours is checked before PIL decodes anything.
Image.MAX_IMAGE_PIXELS = None

MAX_JPEG_SIDE = 65_500  # libjpeg's limit: what is larger could be read from a PNG but not stored again

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
}
_KNOWN_BUT_NOT_READ = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
}
# What PIL's readers raise on damaged bytes; a MemoryError is the machine's failure and passes through.
_PIL_ERRORS = (AssertionError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)


class Reason(StrEnum):
    """Why a photo is not in a dataset: the closed vocabulary of the quarantine."""

    EMPTY = "empty"  # no bytes at all
    NOT_AN_IMAGE = "not_an_image"  # the first bytes belong to no image format we know
    UNSUPPORTED_FORMAT = "unsupported_format"  # an image, but of a kind this project does not read
    TOO_SMALL = "too_small"  # a side below the minimum
    TOO_LARGE = "too_large"  # more pixels than the cap, or a side no JPEG can hold
    TRUNCATED = "truncated"  # the end is missing
    CORRUPT = "corrupt"  # all there, but damaged
    MISSING_FILE = "missing_file"  # a label whose photo is absent
    UNREADABLE = "unreadable"  # storage gave an error for this object
    NO_LABEL = "no_label"  # a photo without a label
    LABEL_CONFLICT = "label_conflict"  # the same bytes under two labels
    LEAKAGE = "leakage"  # a train photo whose bytes are also in test
    CRASHED = "crashed"  # every process that worked on it ended
    DOUBTFUL_MASK = "doubtful_mask"  # excluded by the user's own measure


class PhotoError(ValueError):
    """A photo that cannot be used: `reason` for the program, `detail` (one line) for a person."""

    def __init__(self, reason: Reason, detail: str, attempts: int = 1):
        super().__init__(reason, detail, attempts)
        self.reason = reason
        self.detail = detail
        self.attempts = attempts

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode(
    data: bytes, *, min_side: int = 16, max_pixels: int = 100_000_000, max_side: int | None = None
) -> np.ndarray:
    """An encoded photo as (height, width, 3) uint8 RGB, contiguous and upright.

    `max_side` is `shrink` in the same pass: a JPEG at least twice as large is then decoded at 1/2, 1/4 or
    1/8 of its size, in the DCT domain, which reads (and so checks) every coded bit all the same.
    Raises PhotoError for bytes that are not a whole, sound photo of a permitted size (in pixels).
    """
    kind = _detect_format(data)
    if kind == "JPEG":
        header = _jpeg_header(data)
        _check_size(header.height, header.width, min_side, max_pixels)
        pixels = _decode_jpeg(data, header, max_side)
        height, width, orientation = header.height, header.width, header.orientation
    else:
        pixels, orientation = _decode_with_pil(data, kind, min_side, max_pixels)
        height, width = pixels.shape[:2]
    if max_side is not None:
        pixels = _interpolate(pixels, *_fit(height, width, max_side), mode="bicubic")
    return _upright(pixels, orientation)


def encode(pixels: np.ndarray, *, quality: int = 92) -> bytes:
    """(H, W, 3) uint8 RGB as a baseline JPEG.

    Chroma is stored at half resolution (4:2:0), as nearly all source photos hold it already: full chroma
    takes more space and time to keep colour detail which only a shrunk photo has and the eye hardly sees.
    """
    _assert_rgb(pixels)
    rows = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(rows, quality=quality, colorspace="RGB", colorsubsampling="420")


def reencode(
    data: bytes, *, min_side: int, max_pixels: int, max_side: int | None, quality: int
) -> tuple[bytes, int, int]:
    """A source photo as a dataset stores it: (JPEG bytes, width, height), upright RGB within `max_side`.

    A photo which is that already keeps its bytes, and so loses nothing; it's decoded all the same, as a
    check. PhotoError as for `decode`.
    """
    pixels = decode(data, min_side=min_side, max_pixels=max_pixels, max_side=max_side)
    height, width = pixels.shape[:2]
    if not _is_upright_rgb_jpeg(data, height, width):
        data = encode(pixels, quality=quality)
    return data, width, height


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """(H, W, 3) uint8 with its longer side at most `max_side` pixels; never enlarged, aspect kept.

    Antialiased bicubic: what is stored is resampled once more for the classifier, and a second bilinear
    pass would blur it. A photo that fits is returned as it is, not copied.
    """
    height, width = pixels.shape[:2]
    return _interpolate(pixels, *_fit(height, width, max_side), mode="bicubic")


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 as (height, width, 3) uint8, antialiased bilinear; the aspect is not kept.

    The one function that makes the classifier's input, in training and in evaluation alike.
    """
    return _interpolate(pixels, height, width, mode="bilinear")


def _fit(height: int, width: int, max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _interpolate(pixels: np.ndarray, height: int, width: int, *, mode: str) -> np.ndarray:
    import torch  # here, as most processes never resize, and it takes seconds

    _assert_rgb(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    # Torch wants writable memory, while Ray and Arrow lend read-only arrays: only those are copied.
    rows = np.require(pixels, requirements=["C", "W"])
    # HWC memory seen as a channels-last NCHW batch: the vectorised uint8 kernel, and no copy either way.
    batch = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (height, width), mode=mode, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _assert_rgb(pixels: np.ndarray) -> None:
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape


def _detect_format(data: bytes) -> str:
    """The format's name in PIL's spelling; PhotoError for what is not read."""
    if not data:
        raise PhotoError(Reason.EMPTY, "the file has no bytes")
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    if data[:2] == b"BM" and data[15:18] == b"\0\0\0":  # a small header size: a text about a BMW is no BMP
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    other = "HEIF or AVIF" if data[4:8] == b"ftyp" and data[8:10] in (b"he", b"mi", b"av") else None
    for magic, kind in _KNOWN_BUT_NOT_READ.items():
        if data.startswith(magic):
            other = kind
    if other:
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, f"{other} is not read: convert it to JPEG, PNG or WebP")
    raise PhotoError(Reason.NOT_AN_IMAGE, f"{len(data)} bytes that start with {data[:16]!r}")


def _check_size(height: int, width: int, min_side: int, max_pixels: int) -> None:
    if min(height, width) < min_side:
        raise PhotoError(Reason.TOO_SMALL, f"{width}x{height} pixels; a side needs at least {min_side}")
    if height * width > max_pixels:
        raise PhotoError(Reason.TOO_LARGE, f"{width}x{height} pixels; at most {max_pixels} in all are read")
    if max(height, width) > MAX_JPEG_SIDE:
        raise PhotoError(Reason.TOO_LARGE, f"{width}x{height} pixels; a side may have {MAX_JPEG_SIDE}")


# JPEG. Always through simplejpeg (libjpeg-turbo), whose strict mode turns each of libjpeg's warnings into an
# error. PIL drops these warnings and returns an image for most damaged files, so it is no fallback here.


_START_OF_SCAN = 0xDA


class _JpegHeader(NamedTuple):
    height: int
    width: int
    num_channels: int
    sequential: bool
    orientation: int
    scan: int  # where the first scan's data begins


def _decode_jpeg(data: bytes, header: _JpegHeader, max_side: int | None) -> np.ndarray:
    if header.sequential and data[header.scan - 3 : header.scan] != b"\0\x3f\0":
        # Some phones leave the spectral range of a sequential scan unset. It can only be 0-63, decoders
        # ignore it, and libjpeg's warning about it would hide the ones we want to hear.
        data = data[: header.scan - 3] + b"\0\x3f\0" + data[header.scan :]
    factor = _dct_factor(header, max_side)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="CMYK" if header.num_channels == 4 else "RGB",
            min_height=-(-header.height // factor),
            min_width=-(-header.width // factor),
        )
    except ValueError as error:
        if "subsampling" in str(error):
            raise PhotoError(Reason.UNSUPPORTED_FORMAT, "JPEG with an unusual chroma subsampling") from error
        reason = Reason.TRUNCATED if str(error).startswith("Premature end") else Reason.CORRUPT
        raise PhotoError(reason, f"JPEG: {error}") from error
    return _cmyk_to_rgb(pixels) if header.num_channels == 4 else pixels


def _dct_factor(header: _JpegHeader, max_side: int | None) -> int:
    """The largest of 8, 4, 2 which still leaves every pixel `shrink` needs; the ratios between are slower
    than a full decode, having no vector code in libjpeg-turbo."""
    if max_side is None:
        return 1
    longest = max(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if -(-longest // factor) >= max_side), 1)


def _jpeg_header(data: bytes) -> _JpegHeader:
    """Size, channels and orientation from the segments before the first scan."""
    frame: tuple[int, bytes] | None = None
    orientation, scan = 1, 0
    for marker, payload, end in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame: size and process
            frame = marker, payload
        elif marker == 0xE1 and payload.startswith(b"Exif\0"):
            orientation = _orientation(payload[6:])
        elif marker == _START_OF_SCAN:
            scan = end
    if frame is None or len(frame[1]) < 6:
        raise PhotoError(Reason.CORRUPT, "JPEG: no frame header before the first scan")
    marker, payload = frame
    precision, height, width, num_channels = struct.unpack_from(">BHHB", payload)
    if marker > 0xC2 or precision != 8 or num_channels not in (1, 3, 4):
        what = f"{precision} bits, {num_channels} channels, process {marker - 0xC0}"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, f"JPEG of {what}: save it as an 8-bit RGB JPEG")
    return _JpegHeader(height, width, num_channels, marker != 0xC2, orientation, scan)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(marker, payload, end) of each segment, up to and including the first start of scan."""
    at, marker = 2, 0
    while marker != _START_OF_SCAN:
        while data[at : at + 2] == b"\xff\xff":  # fill bytes are allowed before a marker
            at += 1
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 4 > len(data) or end > len(data):
            raise PhotoError(Reason.TRUNCATED, f"JPEG: {len(data)} bytes end within the header")
        if data[at] != 0xFF or end < at + 4:
            raise PhotoError(Reason.CORRUPT, f"JPEG: no header segment at byte {at}")
        marker = data[at + 1]
        yield marker, data[at + 4 : end], end
        at = end


def _is_upright_rgb_jpeg(data: bytes, height: int, width: int) -> bool:
    """Whether bytes that `decode` accepted already are a JPEG of just these pixels."""
    if _detect_format(data) != "JPEG":
        return False
    header = _jpeg_header(data)
    return (header.height, header.width, header.num_channels, header.orientation) == (height, width, 3, 1)


def _cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    """JPEG stores CMYK inverted, as Adobe began it and all followed: 255 is no ink, so channels multiply."""
    product = cmyk[..., :3].astype(np.uint16) * cmyk[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


# The other formats, through PIL, with the checks PIL leaves out.


def _decode_with_pil(data: bytes, kind: str, min_side: int, max_pixels: int) -> tuple[np.ndarray, int]:
    if kind == "WEBP":
        _check_webp(data, min_side, max_pixels)
    elif kind == "PNG":
        _check_png(data)
    elif kind == "GIF" and not data.rstrip(b"\0").endswith(b";"):
        raise PhotoError(Reason.TRUNCATED, "GIF: the end mark is missing")
    with _pil_errors_named(kind):
        image = Image.open(io.BytesIO(data), formats=[kind])
    _check_size(image.height, image.width, min_side, max_pixels)
    with _pil_errors_named(kind):
        image.load()
        return _pil_to_rgb(image), _orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))


@contextmanager
def _pil_errors_named(kind: str) -> Iterator[None]:
    try:
        yield
    except _PIL_ERRORS as error:
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.CORRUPT
        raise PhotoError(reason, f"{kind}: {error}") from error


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL's own conversion saturates
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return np.array(image.convert("RGB"))


def _check_png(data: bytes) -> None:
    """Every chunk whole and true to its checksum, up to the end chunk: PIL skips both in the pixel data."""
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            raise PhotoError(Reason.TRUNCATED, f"PNG: {len(data)} bytes end before the end chunk")
        kind = data[at + 4 : at + 8]
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise PhotoError(Reason.CORRUPT, f"PNG: the checksum of the {kind!r} chunk at byte {at} is wrong")
        at = end


def _check_webp(data: bytes, min_side: int, max_pixels: int) -> None:
    """Length and size, before PIL: opening a WebP already allocates its canvas."""
    if len(data) < max(30, 8 + int.from_bytes(data[4:8], "little")):
        raise PhotoError(Reason.TRUNCATED, f"WEBP: {len(data)} bytes are fewer than the header says")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _check_size(height, width, min_side, max_pixels)


# Orientation, for all formats.


def _orientation(tiff: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the tag is missing or the block unreadable."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(num_entries):
            tag, value = struct.unpack_from(f"{order}H6xH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the block ends early
        pass
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
