"""Decoding of photos: pixels of supported formats, and reasons of unusable files."""

import io
import pickle
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from carclass.data import photo
from carclass.data.quarantine import PhotoError, Reason
from tests.helpers.photos import noisy_jpeg, overwritten, psnr, saved, scene


def reason_of(data: bytes, **limits) -> Reason:
    with pytest.raises(PhotoError) as caught:
        photo.decode(data, **limits)
    assert "\n" not in caught.value.detail
    return caught.value.reason


# Supported formats


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_give_the_exact_pixels(kind):
    assert np.array_equal(photo.decode(saved(scene(), kind)), scene())


def test_a_lossless_webp_gives_the_exact_pixels():
    assert np.array_equal(photo.decode(saved(scene(), "WEBP", lossless=True)), scene())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"quality": 95})],
)
def test_lossy_formats_give_nearly_the_same_pixels(kind, options):
    assert psnr(photo.decode(saved(scene(), kind, **options)), scene()) > 30


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_pixels_are_contiguous_writable_uint8_rgb(kind):
    pixels = photo.decode(saved(scene(), kind))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (120, 160, 3))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_grey_photo_has_three_equal_channels(kind):
    grey = Image.fromarray(scene()).convert("L")
    pixels = photo.decode(saved(grey, kind))
    assert np.array_equal(pixels, np.repeat(pixels[..., :1], 3, axis=2))
    assert psnr(pixels[..., 0], np.asarray(grey)) > 35


def test_a_palette_photo_gets_its_palette_colours():
    palette = Image.fromarray(scene()).quantize(32)
    assert np.array_equal(photo.decode(saved(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_a_one_bit_photo_is_black_and_white():
    bits = Image.fromarray(scene()).convert("1")
    assert set(np.unique(photo.decode(saved(bits, "PNG")))) == {0, 255}


def test_sixteen_bit_grey_keeps_its_high_byte():
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    assert np.array_equal(photo.decode(saved(deep, "PNG"))[..., 1], deep >> 8)


def test_sixteen_bit_rgb_keeps_its_high_byte():
    rows = (scene(16, 16) * np.uint16(256) + np.uint16(255)).astype(">u2")
    scanlines = b"".join(b"\0" + row.tobytes() for row in rows)
    assert np.array_equal(photo.decode(png(16, 16, scanlines, depth=16)), scene(16, 16))


def test_inverted_cmyk_jpeg_is_converted_to_rgb():
    cmyk = Image.fromarray(scene()).convert("CMYK")
    pixels = photo.decode(saved(cmyk, "JPEG", quality=98))
    assert psnr(pixels, np.asarray(cmyk.convert("RGB"))) > 30


def test_black_ink_darkens_a_cmyk_jpeg():
    cmyk = Image.new("CMYK", (32, 32), (0, 0, 0, 200))
    assert np.abs(photo.decode(saved(cmyk, "JPEG", quality=98)).astype(int) - 55).max() <= 2


def test_transparent_pixels_are_white():
    rgba = np.dstack([scene(), np.full((120, 160), 255, np.uint8)])
    rgba[:, :80, 3] = 0
    pixels = photo.decode(saved(rgba, "PNG"))
    assert (pixels[:, :80] == 255).all()
    assert np.array_equal(pixels[:, 80:], scene()[:, 80:])


def test_half_transparent_black_is_mid_grey():
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 3] = 128
    assert np.unique(photo.decode(saved(rgba, "WEBP", lossless=True))).tolist() == [127]


def test_a_transparent_palette_entry_is_white():
    palette = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    palette.putpalette([200, 0, 0])
    assert (photo.decode(saved(palette, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_reduced_to_its_first_frame(kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = photo.decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.array_equal(pixels[5, 5], (255, 0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_in_pil(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = photo.decode(data)
    assert pixels.shape == upright.shape
    assert psnr(pixels, upright) > 45


def test_orientation_in_big_endian_exif_is_read():
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    assert photo.decode(saved(scene(), "JPEG", exif=exif)).shape == (160, 120, 3)


def test_a_damaged_exif_block_is_ignored():
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 500)
    assert photo.decode(saved(scene(), "JPEG", exif=exif)).shape == (120, 160, 3)


def test_bytes_after_the_end_of_a_jpeg_are_ignored():
    data = saved(scene(), "JPEG")
    assert np.array_equal(photo.decode(data + b"a phone's short film"), photo.decode(data))


def test_a_phone_jpeg_with_unset_spectral_range_is_read():
    data = saved(scene(), "JPEG")
    scan = data.index(b"\0\x3f\0", data.index(b"\xff\xda"))
    odd = data[:scan] + b"\0\0\0" + data[scan + 3 :]
    with pytest.raises(ValueError, match="Invalid SOS"):
        simplejpeg.decode_jpeg(odd)
    assert np.array_equal(photo.decode(odd), photo.decode(data))


# Unusable files


def test_an_empty_file_is_empty():
    assert reason_of(b"") == Reason.EMPTY


@pytest.mark.parametrize(
    "data", [b"<html>404 Not Found</html>", b"BMW 3 Series Sedan 2012, sold as seen", b"\xff\xd8", bytes(500)]
)
def test_other_bytes_are_not_an_image(data):
    assert reason_of(data) == Reason.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"<!DOCTYPE html>\n<html>", "22 bytes that start with the text '<!DOCTYPE html>\\n'"),
        (b"\xc8\x00ab", "4 bytes that start with c8 00 61 62"),
    ],
)
def test_the_start_of_a_file_that_is_no_image_is_named_in_words(data: bytes, detail: str):
    with pytest.raises(PhotoError) as error:
        photo.decode(data)
    assert error.value.detail == detail


def test_other_image_formats_are_unsupported():
    assert reason_of(saved(scene(), "JPEG2000")) == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "start",
    [b"\0\0\1\0\1\0", b"8BPS\0\1", b"<svg xmlns=", b"\0\0\0\x0cJXL ", b"\0\0\0\x18ftypcrx "],
)
def test_formats_are_known_by_their_first_bytes(start: bytes):
    assert reason_of(start + bytes(100)) == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "start",
    [
        b"<?xml version='1.0'?>\n",
        b"\xef\xbb\xbf<?xml version='1.0' encoding='UTF-8'?>\r\n<!-- drawn > by -->\n",
        b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd" [\n<!ENTITY a "b">\n]>\n',
        b"\n  ",
        b"<!-- x -->",
    ],
)
@pytest.mark.parametrize("element", [b"<svg xmlns=", b"<svg:svg ", b"<SVG>"])
def test_an_svg_is_known_below_its_declaration(start: bytes, element: bytes):
    with pytest.raises(PhotoError, match="unsupported_format: SVG"):
        photo.decode(start + element + bytes(100))


@pytest.mark.parametrize(
    "data",
    [
        b"<?xml version='1.0'?><rss><svg></rss>",
        b"<!DOCTYPE html><svg>",
        b"<!-- <svg> -->",
        b"<?xml <svg",
        b"<svgx>",
        b"<??>" * 20_000,
        b"<!DOCTYPE svg [" * 5_000,
    ],
)
def test_other_markup_is_not_an_image(data: bytes):
    assert reason_of(data) == Reason.NOT_AN_IMAGE


def test_a_twelve_bit_jpeg_is_unsupported():
    data = bytearray(saved(scene(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert reason_of(bytes(data)) == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("missing", [1, 2, 40, 0.5, 0.9])
def test_a_missing_end_is_truncated(kind, missing):
    data = saved(scene(), kind)
    kept = len(data) - missing if isinstance(missing, int) else int(len(data) * (1 - missing))
    assert reason_of(data[:kept]) == Reason.TRUNCATED


@pytest.mark.parametrize("kept", [2, 500])
def test_a_progressive_jpeg_without_its_end_is_truncated(kept):
    assert reason_of(saved(scene(), "JPEG", progressive=True)[:-kept]) == Reason.TRUNCATED


def test_a_jpeg_cut_in_its_header_is_truncated():
    assert reason_of(saved(scene(), "JPEG")[:100]) == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_forty_overwritten_bytes_are_corrupt(kind):
    data = noisy_jpeg() if kind == "JPEG" else saved(scene(), kind)
    assert reason_of(overwritten(data, len(data) // 2)) == Reason.CORRUPT


def test_damage_is_detected_at_reduced_size():
    data = noisy_jpeg()
    assert reason_of(overwritten(data, len(data) // 2), max_side=40) == Reason.CORRUPT


def test_damage_after_an_unset_spectral_range_is_detected():
    data = noisy_jpeg()
    scan = data.index(b"\0\x3f\0", data.index(b"\xff\xda"))
    odd = data[:scan] + b"\0\0\0" + data[scan + 3 :]
    assert reason_of(overwritten(odd, len(odd) // 2)) == Reason.CORRUPT


def test_one_changed_bit_in_a_png_is_corrupt():
    data = bytearray(saved(scene(), "PNG"))
    data[len(data) // 2] ^= 1
    assert reason_of(bytes(data)) == Reason.CORRUPT


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_single_pixel_is_too_small(kind):
    assert reason_of(saved(scene(1, 1), kind)) == Reason.TOO_SMALL


def test_the_minimum_side_is_inclusive():
    assert photo.decode(saved(scene(16, 40), "PNG"), min_side=16).shape == (16, 40, 3)
    assert reason_of(saved(scene(15, 40), "PNG"), min_side=16) == Reason.TOO_SMALL


def test_the_pixel_cap_is_inclusive():
    assert photo.decode(saved(scene(20, 40), "PNG"), max_pixels=800).shape == (20, 40, 3)
    assert reason_of(saved(scene(20, 40), "PNG"), max_pixels=799) == Reason.TOO_LARGE


def test_a_side_beyond_the_jpeg_limit_is_too_large():
    assert reason_of(png(16, 70_000, b"")) == Reason.TOO_LARGE


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(height: int, width: int, scanlines: bytes, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def huge(kind: str, side: int) -> bytes:
    """Return a small file whose header declares side x side pixels."""
    if kind == "PNG":
        return png(side, side, b"")
    data = bytearray(saved(scene(32, 32), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "WEBP":
        canvas = (side - 1).to_bytes(3, "little") * 2
        data[12:12] = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
        data[4:8] = struct.pack("<I", len(data) - 8)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    else:
        data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_a_huge_header_is_refused_without_allocating_or_warning(kind):
    data = huge(kind, 16_000 if kind == "WEBP" else 20_000)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = reason_of(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason == Reason.TOO_LARGE
    assert peak < 1_000_000


def test_a_photo_just_below_the_pixel_cap_causes_no_pil_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(huge("PNG", 9_900)) == Reason.TRUNCATED


def test_photo_errors_have_a_reason_and_can_be_pickled():
    error = pickle.loads(pickle.dumps(PhotoError(Reason.TOO_SMALL, "1x1 pixels")))
    assert (error.reason, error.detail) == (Reason.TOO_SMALL, "1x1 pixels")
    assert str(error) == "too_small: 1x1 pixels"
