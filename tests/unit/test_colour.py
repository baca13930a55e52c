"""Colour profiles: pixels become sRGB where a profile changes them, and stay as they are elsewhere."""

import io
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from carclass.data import photo
from tests.helpers.photos import saved, scene
from tests.helpers.profiles import (
    ADOBE_PRIMARIES,
    P3_PRIMARIES,
    SRGB_PRIMARIES,
    cmyk_profile,
    grey_profile,
    rgb_profile,
)

pillow_heif.register_heif_opener()
P3, ADOBE, SRGB = rgb_profile(P3_PRIMARIES), rgb_profile(ADOBE_PRIMARIES, (2.19921875,)), rgb_profile(SRGB_PRIMARIES)
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}
LOSSY = {kind: {"quality": 95} for kind in ("JPEG", "HEIF", "AVIF")}
INGEST: dict[str, Any] = {"min_side": 16, "max_pixels": 10**6, "max_side": None, "quality": 92}


def muted() -> np.ndarray:
    """Draw colours that every profile of these tests contains."""
    return (scene() // 2 + 64).astype(np.uint8)


def in_space(pixels: np.ndarray, profile: bytes) -> Image.Image:
    """Return sRGB pixels as the numbers that have the same colours in another space."""
    target = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(Image.fromarray(pixels), ImageCms.createProfile("sRGB"), target)


def reencoded(data: bytes, **changes: Any) -> bytes:
    return photo.reencode(data, **{**INGEST, **changes})[0]


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second).mean())


# Profiles that change pixels


@pytest.mark.parametrize("profile", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_colours_of_another_space_are_converted_to_srgb(kind: str, profile: bytes):
    image = in_space(muted(), profile)
    pixels = photo.decode(saved(image, kind, icc_profile=profile, **{**LOSSLESS, **LOSSY}[kind]))
    assert difference(pixels, muted()) < 2
    assert difference(np.asarray(image), muted()) > 3


def test_colours_are_converted_as_littlecms_does():
    image = in_space(muted(), P3)
    source = ImageCms.ImageCmsProfile(io.BytesIO(P3))
    expected = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    assert np.array_equal(photo.decode(saved(image, "PNG", icc_profile=P3)), np.asarray(expected))


def test_colours_beyond_srgb_are_clipped():
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    assert photo.decode(saved(red, "PNG", icc_profile=P3))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_grey_of_another_gamma_is_converted(kind: str):
    grey = np.full((32, 32), 100, np.uint8)
    pixels = photo.decode(saved(grey, kind, icc_profile=grey_profile(1.0)))
    assert np.abs(pixels.astype(int) - 168).max() <= 1  # the sRGB level of a linear 100/255


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str):
    inks = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    options = {"quality": 100} if kind == "JPEG" else {}
    with_profile = photo.decode(saved(inks, kind, icc_profile=cmyk_profile(), **options))[5, 5]
    without = photo.decode(saved(inks, kind, **options))[5, 5]
    assert np.abs(without.astype(int) - (0, 255, 255)).max() <= 2
    assert with_profile[0] < with_profile[1] < with_profile[2] < 230


def test_paper_stays_white_by_its_profile():
    paper = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
    assert photo.decode(saved(paper, "TIFF", icc_profile=cmyk_profile())).min() >= 250


def test_a_shrunk_photo_is_converted():
    image = in_space(muted(), P3)
    pixels = photo.decode(saved(image, "JPEG", quality=95, icc_profile=P3), max_side=40)
    assert difference(pixels, photo.shrink(muted(), 40)) < 3


def test_a_profile_in_several_segments_is_joined():
    image, profile = in_space(muted(), P3), P3 + bytes(70_000)
    data = saved(image, "JPEG", quality=95, icc_profile=profile)
    assert data.count(b"ICC_PROFILE\0") == 2
    assert difference(photo.decode(data), muted()) < 2


# Datasets


@pytest.mark.parametrize("keep_metadata", [False, True])
def test_a_stored_photo_has_converted_pixels_and_no_profile(keep_metadata: bool):
    data = reencoded(saved(in_space(muted(), P3), "JPEG", quality=95, icc_profile=P3), keep_metadata=keep_metadata)
    assert b"ICC_PROFILE" not in data
    assert difference(photo.decode_stored(data), muted()) < 2


def test_a_photo_of_a_dataset_is_interpreted_as_srgb():
    data = saved(scene(), "JPEG", quality=95, icc_profile=P3)  # as earlier versions stored it with its metadata
    assert np.array_equal(photo.decode_stored(data), photo.decode(saved(scene(), "JPEG", quality=95)))


# Profiles that change nothing


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(SRGB, id="sRGB"),
        pytest.param(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), id="another sRGB"),
        pytest.param(P3[:200], id="cut"),
        pytest.param(b"no profile", id="no profile"),
        pytest.param(grey_profile(1.0), id="of grey"),
        pytest.param(cmyk_profile(), id="of inks"),
        pytest.param(P3 + bytes(5_000_000), id="huge"),
    ],
)
def test_a_photo_keeps_its_coded_pixels(profile: bytes):
    assert reencoded(saved(scene(), "JPEG", icc_profile=profile)) == reencoded(saved(scene(), "JPEG"))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_profile_of_srgb_changes_no_pixel(kind: str):
    assert np.array_equal(photo.decode(saved(scene(), kind, icc_profile=SRGB, **LOSSLESS[kind])), scene())


def test_a_profile_that_lacks_a_segment_is_ignored():
    data = saved(scene(), "JPEG", icc_profile=P3 + bytes(70_000))
    at = data.rindex(b"ICC_PROFILE\0")
    assert reencoded(data.replace(data[at : at + 12], b"OTHER", 1)) == reencoded(saved(scene(), "JPEG"))


def test_a_damaged_profile_of_a_png_is_ignored():
    data = saved(scene(), "PNG", icc_profile=P3)
    at = data.index(b"iCCP") + 20
    assert np.array_equal(photo.decode(data[:at] + bytes(20) + data[at + 20 :]), scene())
