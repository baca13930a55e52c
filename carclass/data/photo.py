"""Strict decoding, encoding and resizing of photos: a uint8 RGB array, or a PhotoError with a reason.

Supported formats: JPEG (8 bits: RGB, grey, CMYK; baseline and progressive), PNG, WebP, HEIC, AVIF, TIFF, BMP and GIF,
detected by their first bytes, not by the file name. Everything else is `unsupported_format` or `not_an_image`.
- The size is checked in the header, before any pixel is decoded or allocated.
- EXIF's orientation is applied, or else XMP's; of HEIC and AVIF, that of the container.
- Colours are converted to sRGB where the profile changes them. Photos of a dataset are interpreted as sRGB.
- An animation is reduced to its first frame, as in TensorFlow's `decode_image`; a TIFF to its first page.
- Transparent images are composited over white. 16-bit samples keep their high byte.
- Integrity is checked as far as the format allows: JPEG's entropy coding and scans, PNG's checksums, lengths and end
  marks of all formats. Damage that decodes to valid pixels (in a BMP, WebP, HEIC, AVIF or TIFF, or a few bytes of a
  JPEG whose entropy coding resynchronizes) cannot be detected.
- Faults that leave all pixels intact are ignored: bytes after the end or between segments, damaged metadata.
"""

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from carclass.data.colour import STRIP_ROWS, find_transform, transform_pixels
from carclass.data.compact_codecs import decode_avif, decode_webp
from carclass.data.containers import check_boxes, check_gif, check_png_pixels, check_tiff, plain_png, plain_webp
from carclass.data.file_kind import detect_kind
from carclass.data.jpeg import decode_jpeg, parse_jpeg, plain_jpeg
from carclass.data.orientation import make_upright, read_orientation
from carclass.data.quarantine import PhotoError, Reason

# Printed for each damaged TIFF, which is quarantined with its reason.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
# Disables PIL's limit: `_check_size` enforces ours before PIL decodes anything.
Image.MAX_IMAGE_PIXELS = None

MAX_JPEG_SIDE = 65_500
"""libjpeg's limit: larger photos can be read from a PNG, but not encoded as a JPEG."""

PIL_ERRORS = (
    *(
        ArithmeticError,
        AssertionError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ),
    struct.error,
)
"""Exceptions of PIL's readers on damaged bytes; a MemoryError is a failure of the machine and propagates."""


class _Limits(NamedTuple):
    """Sizes of photos in pixels."""

    min_side: int = 16  # of the photo, and of its shrunk form
    max_pixels: int = 100_000_000
    max_side: int | None = None  # larger photos are shrunk


class _Decoded(NamedTuple):
    """Pixels of a file before they are shrunk to their final size and turned upright."""

    pixels: np.ndarray
    height: int  # of the file
    width: int
    orientation: int
    plain: bytes | None = None  # an RGB JPEG without metadata
    profile: bytes = b""  # of the colours of these pixels
    mode: str = "RGB"  # or L, if all channels are equal


def decode(
    data: bytes, *, min_side: int = 16, max_pixels: int = 100_000_000, max_side: int | None = None
) -> np.ndarray:
    """Decode a photo to (height, width, 3) uint8 RGB, contiguous and upright.

    With `max_side`, shrink it in the same pass: a JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its
    size in the DCT domain, which still reads and checks every coded bit. Raise PhotoError if the bytes are not a
    complete, undamaged photo of a permitted size, `min_side` before and after shrinking.
    """
    limits = _Limits(min_side, max_pixels, max_side)
    return _finish(_to_srgb(_decode_file(data, limits)), limits)


def decode_stored(data: bytes) -> np.ndarray:
    """Decode a photo of a dataset: ingestion has checked its size and converted its colours."""
    limits = _Limits(min_side=1, max_pixels=MAX_JPEG_SIDE**2)
    return _finish(_decode_file(data, limits), limits)


def decode_photos(images: Sequence[bytes], size: int) -> np.ndarray:
    """Decode photos of a dataset and resize them to squares: uint8 (N,size,size,3) RGB."""
    return np.stack([resize(decode_stored(data), size, size) for data in images])


def encode(pixels: np.ndarray, *, quality: int = 92) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG.

    Chroma is stored at half resolution (4:2:0), as in nearly all source photos: full chroma takes more space and time
    for colour detail that only shrunk photos have.
    """
    _assert_rgb(pixels)
    rows = np.ascontiguousarray(pixels)
    return simplejpeg.encode_jpeg(rows, quality=quality, colorspace="RGB", colorsubsampling="420")


def reencode(
    data: bytes, *, min_side: int, max_pixels: int, max_side: int | None, quality: int, keep_metadata: bool = False
) -> tuple[bytes, int, int]:
    """Convert a source photo to the form datasets store, and return (JPEG bytes, width, height).

    This is an upright RGB JPEG within `max_side`. A photo in this form is decoded as a check, but keeps its coded
    pixels, unless its colours are converted; `keep_metadata` keeps the file as it is, else metadata, thumbnails, colour
    profile and trailing bytes are removed. Raise PhotoError as `decode` does.
    """
    limits = _Limits(min_side, max_pixels, max_side)
    decoded = _to_srgb(_decode_file(data, limits))
    pixels = _finish(decoded, limits)
    height, width = pixels.shape[:2]
    if decoded.plain is None or decoded.orientation != 1 or (height, width) != (decoded.height, decoded.width):
        return encode(pixels, quality=quality), width, height
    return data if keep_metadata else decoded.plain, width, height


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink (H, W, 3) uint8 so that its longer side has at most `max_side` pixels; keep the aspect ratio.

    The filter is antialiased bicubic, as stored photos are resampled again for the classifier and two bilinear passes
    would blur them. A photo that fits is returned without a copy.
    """
    _assert_rgb(pixels)
    height, width = pixels.shape[:2]
    return _resample(pixels, *_fit(height, width, max_side))


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3), antialiased bilinear; the aspect ratio is not kept.

    Training, evaluation and prediction all use it for the classifier's input.
    """
    import torch  # takes seconds and much memory, and most processes never resize

    _assert_rgb(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    # Torch needs writable memory: only the read-only arrays of Ray and Arrow are copied.
    rows = np.require(pixels, requirements=["C", "W"])
    # HWC memory viewed as a channels-last NCHW batch selects the vectorized uint8 kernel and needs no copy.
    batch = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _fit(height: int, width: int, max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resample(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8, antialiased bicubic; without a copy if it has the size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return _read_strips(lambda top, bottom: Image.fromarray(pixels[top:bottom]), pixels.shape[:2], (height, width))


def _read_strips(
    read: Callable[[int, int], Image.Image], source: tuple[int, int], target: tuple[int, int]
) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 of the target's size, resized antialiased bicubic.

    read: (first row, last row + 1) → these rows in RGB. Only a strip is in memory beside source and result; PIL, unlike
    torch, adds nothing else. Sizes are (height, width).
    """
    pixels = np.empty((*target, 3), np.uint8)
    scale = source[0] / target[0]
    strip, margin = max(1, int(STRIP_ROWS / scale)), math.ceil(2 * scale) + 1  # the filter spans four pixels
    for top in range(0, target[0], strip):
        bottom = min(top + strip, target[0])
        first = max(0, int(top * scale) - margin)
        rows = read(first, min(source[0], math.ceil(bottom * scale) + margin))
        if source == target:
            rows = rows.crop((0, top - first, source[1], bottom - first))
        else:
            # Rows before columns, as PIL chooses the order by the size of the strip, which changes the rounding.
            box = (0, top * scale - first, target[1], bottom * scale - first)
            rows = rows.resize((target[1], rows.height), Image.Resampling.BICUBIC)
            rows = rows.resize((target[1], bottom - top), Image.Resampling.BICUBIC, box)
        pixels[top:bottom] = np.asarray(rows)
    return pixels


def _assert_rgb(pixels: np.ndarray) -> None:
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape


def _check_size(height: int, width: int, limits: _Limits) -> None:
    size = f"{width}x{height} pixels"
    if height * width > limits.max_pixels:
        raise PhotoError(Reason.TOO_LARGE, f"{size}; at most {limits.max_pixels} in all are read")
    if max(height, width) > MAX_JPEG_SIDE:
        raise PhotoError(Reason.TOO_LARGE, f"{size}; a side may have {MAX_JPEG_SIDE}")
    if min(height, width) >= limits.min_side and limits.max_side is not None:
        height, width = _fit(height, width, limits.max_side)
        size += f", {width}x{height} when shrunk"
    if min(height, width) < limits.min_side:
        raise PhotoError(Reason.TOO_SMALL, f"{size}; a side needs at least {limits.min_side}")


def _decode_file(data: bytes, limits: _Limits) -> _Decoded:
    kind = detect_kind(data)
    if kind == "JPEG":
        return _decode_jpeg(data, limits)
    return _decode_webp(data, limits) if kind == "WEBP" else _decode_with_pil(data, kind, limits)


def _to_srgb(decoded: _Decoded) -> _Decoded:
    """Convert the colours of pixels to sRGB."""
    transform = find_transform(decoded.profile, decoded.mode) if decoded.profile else None
    if transform is None:
        return decoded
    return decoded._replace(pixels=transform_pixels(decoded.pixels, transform), plain=None)


def _finish(decoded: _Decoded, limits: _Limits) -> np.ndarray:
    """Shrink pixels and turn them upright."""
    pixels = decoded.pixels
    if limits.max_side is not None:
        pixels = _resample(pixels, *_fit(decoded.height, decoded.width, limits.max_side))
    return make_upright(pixels, decoded.orientation)


# JPEG: always decoded by simplejpeg (libjpeg-turbo), as PIL returns an image for most damaged files.


def _decode_jpeg(data: bytes, limits: _Limits) -> _Decoded:
    jpeg = parse_jpeg(data)
    _check_size(jpeg.height, jpeg.width, limits)
    pixels, plain = decode_jpeg(plain_jpeg(jpeg), _dct_factor(jpeg.height, jpeg.width, limits.max_side))
    profile = jpeg.profile()
    if jpeg.num_channels == 4:
        pixels, profile = _cmyk_to_rgb(pixels, profile), b""
    stored, mode = plain if jpeg.num_channels == 3 else None, "L" if jpeg.num_channels == 1 else "RGB"
    return _Decoded(pixels, jpeg.height, jpeg.width, jpeg.orientation(), stored, profile, mode)


def _dct_factor(height: int, width: int, max_side: int | None) -> int:
    """Return the largest of 8, 4, 2 that keeps the longer side at `max_side` or above, else 1.

    Other ratios have no vector code in libjpeg-turbo and are slower than a full decode.
    """
    if max_side is None:
        return 1
    longest = max(height, width)
    return next((factor for factor in (8, 4, 2) if -(-longest // factor) >= max_side), 1)


def _cmyk_to_rgb(cmyk: np.ndarray, profile: bytes) -> np.ndarray:
    """Convert (H, W, 4) uint8 CMYK to (H, W, 3) RGB. JPEG stores it inverted (255 is no ink), so channels multiply."""
    if profile and (transform := find_transform(profile, "CMYK")) is not None:
        return transform_pixels(~cmyk, transform)
    rgb = np.empty((*cmyk.shape[:2], 3), np.uint8)
    for top in range(0, len(cmyk), STRIP_ROWS):
        strip = cmyk[top : top + STRIP_ROWS]
        rgb[top : top + STRIP_ROWS] = (strip[..., :3].astype(np.uint16) * strip[..., 3:] + 127) // 255
    return rgb


# Other formats: decoded by PIL, with the checks that PIL omits, or by imagecodecs.


def _decode_webp(data: bytes, limits: _Limits) -> _Decoded:
    plain = plain_webp(data)
    _check_size(plain.height, plain.width, limits)  # PIL allocates the canvas when it opens the file
    with _pil_errors("WEBP"):
        if plain.is_animated:
            pixels, mode = _image_to_rgb(Image.open(plain.open(), formats=["WEBP"]), b"", limits)
        else:
            pixels, mode = _array_to_rgb(decode_webp(b"".join(plain.pieces)), limits)
    return _Decoded(pixels, plain.height, plain.width, plain.orientation, profile=plain.profile, mode=mode)


def _decode_with_pil(data: bytes, kind: str, limits: _Limits) -> _Decoded:
    file: BinaryIO = io.BytesIO(data)
    orientation, profile, is_single = 1, b"", False
    if kind == "PNG":
        plain = plain_png(data)
        _check_size(plain.height, plain.width, limits)
        file, orientation, profile = plain.open(), plain.orientation, plain.profile
    elif kind == "GIF":
        check_gif(data)
    elif kind in ("HEIF", "AVIF"):
        is_single = not check_boxes(data, kind)
    with _pil_errors(kind):
        image = _open_heif(file) if kind == "HEIF" else Image.open(file, formats=[kind])
    _check_size(image.height, image.width, limits)
    with _pil_errors(kind):
        if kind in ("HEIF", "AVIF", "TIFF"):
            profile = image.info.get("icc_profile") or b""
        if kind == "TIFF":
            check_tiff(image, len(data), limits.max_pixels)
        elif kind == "AVIF":  # PIL states the container's orientation as EXIF; others are upright when they are loaded
            orientation = read_orientation([image.info.get("exif", b"").removeprefix(b"Exif\0\0")], [])
        if kind == "AVIF" and is_single and (array := decode_avif(data)).dtype == np.uint8:
            pixels, mode = _array_to_rgb(array, limits)
        else:
            pixels, mode = _image_to_rgb(image, profile, limits)
    if kind == "PNG":
        check_png_pixels(plain)
    profile = b"" if image.mode == "CMYK" else profile
    return _Decoded(pixels, image.height, image.width, orientation, profile=profile, mode=mode)


def _image_to_rgb(image: Image.Image, profile: bytes, limits: _Limits) -> tuple[np.ndarray, str]:
    """Return an opened image in RGB, shrunk if it has to be, and `L` if it is grey, else `RGB`."""
    image.load()
    to_rgb, size = _rgb_converter(image, profile), (image.height, image.width)
    target = size if limits.max_side is None else _fit(*size, limits.max_side)
    pixels = _read_strips(lambda top, bottom: to_rgb(image.crop((0, top, size[1], bottom))), size, target)
    return pixels, "L" if image.mode[0] in "L1I" else "RGB"


def _array_to_rgb(pixels: np.ndarray, limits: _Limits) -> tuple[np.ndarray, str]:
    """Return pixels of any channels as _image_to_rgb does; of RGB no second copy is made."""
    if pixels.shape[2:] == (3,):
        return pixels, "RGB"
    return _image_to_rgb(Image.fromarray(pixels), b"", limits)


def _open_heif(file: BinaryIO) -> Image.Image:
    import pillow_heif  # takes a tenth of a second, and most datasets have no photos of this format

    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return Image.open(file, formats=["HEIF"])


@contextmanager
def _pil_errors(kind: str) -> Iterator[None]:
    """Convert PIL's exceptions to PhotoError."""
    try:
        yield
    except PhotoError:
        raise
    except UnidentifiedImageError as error:
        raise PhotoError(Reason.CORRUPT, f"{kind}: its structure is damaged or unknown") from error
    except PIL_ERRORS as error:
        reason = Reason.TRUNCATED if "truncated" in str(error).lower() else Reason.CORRUPT
        raise PhotoError(reason, f"{kind}: {error}") from error


def _rgb_converter(image: Image.Image, profile: bytes) -> Callable[[Image.Image], Image.Image]:
    """Return the conversion of an image's strips to RGB. profile: applied here if it is one of CMYK."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which PIL's conversion saturates
        return lambda strip: Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK" and profile and (transform := find_transform(profile, "CMYK")) is not None:
        return lambda strip: transform.apply(strip)
    unused_alpha = image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
    if image.has_transparency_data and not unused_alpha:
        return lambda strip: Image.alpha_composite(
            Image.new("RGBA", strip.size, "white"), strip.convert("RGBA")
        ).convert("RGB")
    return lambda strip: strip.convert("RGB")
