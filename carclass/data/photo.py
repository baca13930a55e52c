"""Strict decoding, encoding and resizing of photos: a uint8 RGB array, or a PhotoError with a reason.

Supported formats: JPEG (8 bits: RGB, grey, CMYK; baseline and progressive), PNG, WebP, BMP and GIF, detected by their
first bytes, not by the file name. Everything else is `unsupported_format` or `not_an_image`.
- The size is checked in the header, before any pixel is decoded or allocated.
- EXIF and PNG/WebP orientation is applied. Colour profiles are ignored: pixels are interpreted as sRGB.
- An animation is reduced to its first frame, as in TensorFlow's `decode_image`.
- Transparent images are composited over white. 16-bit samples keep their high byte.
- Integrity is checked as far as the format allows: JPEG's entropy coding, PNG's checksums, lengths and end marks of
  all formats. Damage that decodes to valid pixels (in a BMP, a WebP, or a few bytes of a JPEG whose entropy coding
  resynchronizes) cannot be detected.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from carclass.data.quarantine import PhotoError, Reason

# Disables PIL's limit: `_check_size` enforces ours before PIL decodes anything.
Image.MAX_IMAGE_PIXELS = None

MAX_JPEG_SIDE = 65_500
"""libjpeg's limit: larger photos can be read from a PNG, but not encoded as a JPEG."""

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
}
_UNSUPPORTED = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
}
# Exceptions of PIL's readers on damaged bytes; a MemoryError is a failure of the machine and propagates.
_PIL_ERRORS = (AssertionError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)


def decode(
    data: bytes, *, min_side: int = 16, max_pixels: int = 100_000_000, max_side: int | None = None
) -> np.ndarray:
    """Decode a photo to (height, width, 3) uint8 RGB, contiguous and upright.

    With `max_side`, shrink it in the same pass: a JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its
    size in the DCT domain, which still reads and checks every coded bit. Raise PhotoError if the bytes are not a
    complete, undamaged photo of a permitted size.
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
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG.

    Chroma is stored at half resolution (4:2:0), as in nearly all source photos: full chroma takes more space and time
    for colour detail that only shrunk photos have.
    """
    _assert_rgb(pixels)
    rows = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(rows, quality=quality, colorspace="RGB", colorsubsampling="420")


def reencode(
    data: bytes, *, min_side: int, max_pixels: int, max_side: int | None, quality: int
) -> tuple[bytes, int, int]:
    """Convert a source photo to the form datasets store, and return (JPEG bytes, width, height).

    This is an upright RGB JPEG within `max_side`. A photo in this form is decoded as a check, but keeps its bytes.
    Raise PhotoError as `decode` does.
    """
    pixels = decode(data, min_side=min_side, max_pixels=max_pixels, max_side=max_side)
    height, width = pixels.shape[:2]
    if not _is_upright_rgb_jpeg(data, height, width):
        data = encode(pixels, quality=quality)
    return data, width, height


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink (H, W, 3) uint8 so that its longer side has at most `max_side` pixels; keep the aspect ratio.

    The filter is antialiased bicubic, as stored photos are resampled again for the classifier and two bilinear passes
    would blur them. A photo that fits is returned without a copy.
    """
    height, width = pixels.shape[:2]
    return _interpolate(pixels, *_fit(height, width, max_side), mode="bicubic")


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3), antialiased bilinear; the aspect ratio is not kept.

    Training, evaluation and prediction all use it for the classifier's input.
    """
    return _interpolate(pixels, height, width, mode="bilinear")


def _fit(height: int, width: int, max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _interpolate(pixels: np.ndarray, height: int, width: int, *, mode: str) -> np.ndarray:
    import torch  # takes seconds, and most processes never resize

    _assert_rgb(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    # Torch needs writable memory: only the read-only arrays of Ray and Arrow are copied.
    rows = np.require(pixels, requirements=["C", "W"])
    # HWC memory viewed as a channels-last NCHW batch selects the vectorized uint8 kernel and needs no copy.
    batch = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (height, width), mode=mode, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _assert_rgb(pixels: np.ndarray) -> None:
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape


def _detect_format(data: bytes) -> str:
    """Return the name of the format in PIL's spelling. Raise PhotoError if it is not supported."""
    if not data:
        raise PhotoError(Reason.EMPTY, "the file has no bytes")
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    if data[:2] == b"BM" and data[15:18] == b"\0\0\0":  # header size below 256, unlike a text that starts with "BM"
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    unsupported = "HEIF or AVIF" if data[4:8] == b"ftyp" and data[8:10] in (b"he", b"mi", b"av") else None
    for magic, kind in _UNSUPPORTED.items():
        if data.startswith(magic):
            unsupported = kind
    if unsupported:
        detail = f"{unsupported} is not supported: convert it to JPEG, PNG or WebP"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, detail)
    raise PhotoError(Reason.NOT_AN_IMAGE, f"{len(data)} bytes that start with {data[:16]!r}")


def _check_size(height: int, width: int, min_side: int, max_pixels: int) -> None:
    if min(height, width) < min_side:
        raise PhotoError(Reason.TOO_SMALL, f"{width}x{height} pixels; a side needs at least {min_side}")
    if height * width > max_pixels:
        raise PhotoError(Reason.TOO_LARGE, f"{width}x{height} pixels; at most {max_pixels} in all are read")
    if max(height, width) > MAX_JPEG_SIDE:
        raise PhotoError(Reason.TOO_LARGE, f"{width}x{height} pixels; a side may have {MAX_JPEG_SIDE}")


# JPEG: always decoded by simplejpeg (libjpeg-turbo), whose strict mode turns libjpeg's warnings into errors. PIL
# ignores these warnings and returns an image for most damaged files.

_START_OF_SCAN = 0xDA


class _JpegHeader(NamedTuple):
    height: int
    width: int
    num_channels: int
    sequential: bool
    orientation: int
    scan: int  # offset of the first scan's data


def _decode_jpeg(data: bytes, header: _JpegHeader, max_side: int | None) -> np.ndarray:
    if header.sequential and data[header.scan - 3 : header.scan] != b"\0\x3f\0":
        # Some phones leave the spectral range of a sequential scan unset. It can only be 0-63 and decoders ignore it,
        # but libjpeg's warning about it would hide other warnings.
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
    """Return the largest of 8, 4, 2 that keeps the longer side at `max_side` or above, else 1.

    Other ratios have no vector code in libjpeg-turbo and are slower than a full decode.
    """
    if max_side is None:
        return 1
    longest = max(header.height, header.width)
    return next((factor for factor in (8, 4, 2) if -(-longest // factor) >= max_side), 1)


def _jpeg_header(data: bytes) -> _JpegHeader:
    """Read size, channels and orientation from the segments before the first scan."""
    frame: tuple[int, bytes] | None = None
    orientation, scan = 1, 0
    for marker, payload, end in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
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
        encoding = f"{precision} bits, {num_channels} channels, process {marker - 0xC0}"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, f"JPEG with {encoding}: save it as an 8-bit RGB JPEG")
    return _JpegHeader(height, width, num_channels, marker != 0xC2, orientation, scan)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (marker, payload, end offset) of each segment up to and including the first start of scan."""
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
    """Return True if a decodable photo is an upright RGB JPEG of this size."""
    if _detect_format(data) != "JPEG":
        return False
    header = _jpeg_header(data)
    return (header.height, header.width, header.num_channels, header.orientation) == (height, width, 3, 1)


def _cmyk_to_rgb(cmyk: np.ndarray) -> np.ndarray:
    """Convert (H, W, 4) uint8 CMYK to (H, W, 3) RGB. JPEG stores it inverted (255 is no ink), so channels multiply."""
    product = cmyk[..., :3].astype(np.uint16) * cmyk[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


# Other formats: decoded by PIL, with the checks that PIL omits.


def _decode_with_pil(data: bytes, kind: str, min_side: int, max_pixels: int) -> tuple[np.ndarray, int]:
    if kind == "WEBP":
        _check_webp(data, min_side, max_pixels)
    elif kind == "PNG":
        _check_png(data)
    elif kind == "GIF" and not data.rstrip(b"\0").endswith(b";"):
        raise PhotoError(Reason.TRUNCATED, "GIF: the end mark is missing")
    with _pil_errors(kind):
        image = Image.open(io.BytesIO(data), formats=[kind])
    _check_size(image.height, image.width, min_side, max_pixels)
    with _pil_errors(kind):
        image.load()
        return _pil_to_rgb(image), _orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))


@contextmanager
def _pil_errors(kind: str) -> Iterator[None]:
    """Convert PIL's exceptions to PhotoError."""
    try:
        yield
    except _PIL_ERRORS as error:
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.CORRUPT
        raise PhotoError(reason, f"{kind}: {error}") from error


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL's conversion saturates
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return np.array(image.convert("RGB"))


def _check_png(data: bytes) -> None:
    """Check length and checksum of every chunk up to the end chunk; PIL skips both for pixel data."""
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
    """Check length and size before PIL opens the file, which allocates the canvas."""
    if len(data) < max(30, 8 + int.from_bytes(data[4:8], "little")):
        raise PhotoError(Reason.TRUNCATED, f"WEBP: {len(data)} bytes are fewer than the header states")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _check_size(height, width, min_side, max_pixels)


# Orientation, common to all formats.


def _orientation(tiff: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if the tag is missing or the block is unreadable."""
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
