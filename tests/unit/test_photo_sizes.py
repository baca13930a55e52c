"""Shrinking, resizing and encoding of photos, and their stored form."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from carclass.data import photo
from carclass.data.quarantine import PhotoError
from tests.helpers.photos import noisy_jpeg, overwritten, psnr, saved, scene

# Shrinking, resizing, encoding


@pytest.mark.parametrize(("shape", "expected"), [((120, 160), (48, 64)), ((160, 120), (64, 48)), ((7, 900), (1, 64))])
def test_shrink_keeps_the_aspect_ratio(shape, expected):
    assert photo.shrink(scene(*shape), 64).shape == (*expected, 3)


def test_shrink_never_enlarges():
    assert np.array_equal(photo.shrink(scene(), 160), scene())


def test_shrink_is_antialiased():
    board = np.repeat((np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    assert np.abs(photo.shrink(board, 32).astype(int) - 127).max() < 20


def test_resize_gives_the_exact_size_and_matches_pil():
    expected = np.asarray(Image.fromarray(scene()).resize((64, 56), Image.Resampling.BILINEAR))
    resized = photo.resize(scene(), 56, 64)
    assert resized.shape == (56, 64, 3)
    assert np.abs(resized.astype(int) - expected).max() <= 1


def test_resize_can_enlarge():
    assert photo.resize(scene(), 200, 300).shape == (200, 300, 3)


def test_resize_accepts_read_only_pixels_without_a_warning():
    pixels = scene()
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert photo.resize(pixels, 64, 64).flags.c_contiguous


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("max_side", [33, 64, 79, 80, 100, 159, 160, 500])
def test_decoding_at_reduced_size_equals_decoding_then_shrinking(kind, max_side):
    data = saved(scene(121, 161), kind)
    reduced, expected = photo.decode(data, max_side=max_side), photo.shrink(photo.decode(data), max_side)
    assert reduced.shape == expected.shape
    assert psnr(reduced, expected) > 30


def test_decoding_at_reduced_size_applies_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(scene(), "JPEG", exif=exif)
    reduced, expected = photo.decode(data, max_side=40), photo.shrink(photo.decode(data), 40)
    assert reduced.shape == (40, 30, 3)
    assert psnr(reduced, expected) > 30


def test_encoded_pixels_are_decoded_nearly_unchanged():
    assert psnr(photo.decode(photo.encode(scene(), quality=95)), scene()) > 30


def test_encode_accepts_non_contiguous_pixels():
    assert np.array_equal(
        photo.decode(photo.encode(scene()[::2, ::-1])), photo.decode(photo.encode(scene()[::2, ::-1].copy()))
    )


def test_higher_quality_needs_more_bytes():
    assert len(photo.encode(scene(), quality=95)) > len(photo.encode(scene(), quality=60))


# Storing


LIMITS = {"min_side": 16, "max_pixels": 1_000_000, "quality": 92}


def test_an_upright_rgb_jpeg_that_fits_keeps_its_bytes():
    data = saved(scene(), "JPEG", quality=70)
    assert photo.reencode(data, max_side=160, **LIMITS) == (data, 160, 120)


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return saved(scene(), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("data", "max_side", "size"),
    [
        pytest.param(saved(scene(), "JPEG"), 80, (80, 60), id="too large"),
        pytest.param(rotated_jpeg(), None, (120, 160), id="rotated"),
        pytest.param(saved(Image.fromarray(scene()).convert("L"), "JPEG"), None, (160, 120), id="grey"),
        pytest.param(saved(scene(), "PNG"), None, (160, 120), id="png"),
    ],
)
def test_any_other_photo_is_stored_as_an_upright_rgb_jpeg(data, max_side, size):
    stored, width, height = photo.reencode(data, max_side=max_side, **LIMITS)
    assert (width, height) == size
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        assert image.getexif().get(0x0112, 1) == 1


def test_a_damaged_jpeg_that_fits_is_not_stored():
    data = noisy_jpeg()
    with pytest.raises(PhotoError):
        photo.reencode(overwritten(data, len(data) // 2), max_side=None, **LIMITS)


def phone_jpeg() -> bytes:
    """Return an upright JPEG with all that a phone adds: EXIF with a thumbnail, colour profile, comment and a film."""
    exif = Image.Exif()
    exif[0x8825] = {1: "N", 2: (48.0, 12.0, 30.0)}
    data = saved(scene(), "JPEG", exif=exif, icc_profile=b"a colour profile", comment=b"a comment")
    return data + b"a film" * 1000


def test_metadata_and_trailing_bytes_are_not_stored():
    stored, _, _ = photo.reencode(phone_jpeg(), max_side=None, **LIMITS)
    assert stored == saved(scene(), "JPEG")


def test_metadata_are_stored_on_request():
    assert photo.reencode(phone_jpeg(), max_side=None, keep_metadata=True, **LIMITS)[0] == phone_jpeg()


def test_a_stored_rgb_jpeg_keeps_the_segment_that_says_so():
    data = saved(scene(), "JPEG", keep_rgb=True)
    assert photo.reencode(data, max_side=None, **LIMITS)[0] == data


def test_an_embedded_thumbnail_is_not_stored():
    data = saved(scene(), "JPEG")
    thumbnail = data[:2] + b"\xff\xe0\0\x1c" + data[6:18] + b"\2\2" + bytes(12) + data[20:]
    assert photo.reencode(thumbnail, max_side=None, **LIMITS)[0] == data


def test_the_minimum_side_holds_after_shrinking():
    with pytest.raises(PhotoError, match=r"too_small: 4000x40 pixels, 800x8 when shrunk"):
        photo.reencode(saved(scene(40, 4000), "JPEG"), max_side=800, **LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_the_minimum_side_holds_after_shrinking_other_formats(kind):
    with pytest.raises(PhotoError, match=r"too_small"):
        photo.decode(saved(scene(20, 1000), kind), max_side=500)
