"""HEIC, AVIF and TIFF photos: pixels as they were taken, limits before decoding, and reasons of unusable files."""

import io
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from carclass.data import photo
from carclass.data.quarantine import PhotoError, Reason
from tests.helpers.photos import psnr, saved, scene

pillow_heif.register_heif_opener()
KINDS: dict[str, dict[str, Any]] = {"HEIF": {"quality": 95}, "AVIF": {"quality": 95}, "TIFF": {}}


def reason_of(data: bytes, **limits: Any) -> Reason:
    with pytest.raises(PhotoError) as caught:
        photo.decode(data, **limits)
    assert "\n" not in caught.value.detail
    assert " at 0x" not in caught.value.detail
    return caught.value.reason


def tiff(pixels: Any, **tags: Any) -> bytes:
    """Return a TIFF with further tags: name=(number, value)."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.values():
        directory[number] = value
    return saved(pixels, "TIFF", tiffinfo=directory)


def deep_tiff(pixels: bytes, order: str, layout: dict[int, int]) -> bytes:
    """Return a TIFF of 16x16 pixels of 16-bit RGB. order: of bytes, < or >. layout: tags of strips or tiles."""
    end = 8 + len(pixels)
    tags = {256: 16, 257: 16, 258: end, 259: 1, 262: 2, 277: 3, **layout}
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags)]
    entries[2] = struct.pack(f"{order}HHII", 258, 3, 3, end)  # where the bits of the three channels are
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end + 6)
    return start + pixels + struct.pack(f"{order}4H", 16, 16, 16, len(tags)) + b"".join(entries) + bytes(4)


def turned_heic(quarters: int) -> bytes:
    """Return a HEIC of the scene that its container turns counter-clockwise, as phones do."""
    data = bytearray(saved(scene(), "HEIF", quality=95))

    def grow(name: bytes, count: int) -> int:
        at = data.index(name) - 4
        size = int.from_bytes(data[at : at + 4], "big")
        data[at : at + 4] = (size + count).to_bytes(4, "big")
        return at + size

    offset = data.index(b"mdat") + 4
    at = data.index(offset.to_bytes(4, "big"), data.index(b"iloc"))
    data[at : at + 4] = (offset + 10).to_bytes(4, "big")
    grow(b"meta", 10)
    grow(b"iprp", 10)
    end = grow(b"ipma", 1)
    count = data.index(b"ipma") + 14
    data[count] += 1
    data[end:end] = bytes([0x80 | data[count]])  # the last property, essential
    end = grow(b"ipco", 9)
    data[end:end] = b"\0\0\0\x09irot" + bytes([quarters])
    return bytes(data)


# All of them


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_photo(kind: str):
    pixels = photo.decode(saved(scene(), kind, **KINDS[kind]))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (120, 160, 3))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert psnr(pixels, scene()) > 30


@pytest.mark.parametrize("kind", KINDS)
def test_datasets_store_them_as_jpeg(kind: str):
    data, width, height = photo.reencode(
        saved(scene(), kind, **KINDS[kind]), min_side=16, max_pixels=10**6, max_side=80, quality=92, keep_metadata=True
    )
    assert (data[:3], width, height) == (b"\xff\xd8\xff", 80, 60)
    assert psnr(photo.decode_stored(data), photo.shrink(scene(), 80)) > 28


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_pixels_are_white(kind: str):
    rgba = np.dstack([scene(), np.full((120, 160), 255, np.uint8)])
    rgba[:, :80, 3] = 0
    pixels = photo.decode(saved(rgba, kind, **KINDS[kind]))
    assert (pixels[:, :70] >= 250).all()
    assert psnr(pixels[:, 90:], scene()[:, 90:]) > 28


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_checked_before_pixels_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch):
    def load(*_: Any) -> None:
        raise AssertionError("decoded")

    data = saved(scene(), kind, **KINDS[kind])
    for plugin in ("AvifImagePlugin.AvifImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", load)
    monkeypatch.setattr("pillow_heif.as_plugin._LibHeifImageFile.load", load)
    assert reason_of(data, max_pixels=10_000) == Reason.TOO_LARGE
    assert reason_of(data, min_side=121) == Reason.TOO_SMALL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
def test_a_missing_end_is_truncated(kind: str, share: float):
    data = saved(scene(), kind, **KINDS[kind])
    assert reason_of(data[: int(len(data) * share)]) == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_bytes_after_the_end_are_ignored(kind: str):
    data = saved(scene(), kind, **KINDS[kind])
    assert np.array_equal(photo.decode(data + b"a phone's short film"), photo.decode(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_structure_is_corrupt(kind: str):
    data = saved(scene(), kind, **KINDS[kind])
    at = data.index(b"iprp") + 4 if kind != "TIFF" else struct.unpack_from("<I", data, 4)[0]
    assert reason_of(data[:at] + bytes(40) + data[at + 40 :]) == Reason.CORRUPT


def test_readers_of_rare_formats_are_loaded_when_they_are_needed():
    code = "import sys, carclass.data.photo; sys.exit(not {'pillow_heif', 'imagecodecs'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# HEIC and AVIF


@pytest.mark.parametrize("brand", [b"heix", b"mif1", b"msf1"])
def test_heic_is_known_by_any_of_its_brands(brand: bytes):
    data = saved(scene(), "HEIF", quality=95)
    assert np.array_equal(photo.decode(data[:8] + brand + data[12:]), photo.decode(data))


def test_an_avif_whose_main_image_is_missing_is_corrupt():
    data = bytearray(saved(scene(), "AVIF", quality=95))
    data[data.index(b"pitm") + 9] += 9
    assert reason_of(bytes(data)) == Reason.CORRUPT


def test_an_avif_whose_frames_have_no_unit_of_time_is_corrupt():
    data = bytearray(saved(scene(), "AVIF", save_all=True, append_images=[Image.fromarray(scene())]))
    at = data.index(b"mdhd") + 8
    at += 16 if data[at - 4] == 1 else 8
    data[at : at + 4] = bytes(4)
    assert reason_of(bytes(data)) == Reason.CORRUPT


def test_avif_is_known_by_a_compatible_brand():
    data = saved(scene(), "AVIF", quality=95)
    assert np.array_equal(photo.decode(data[:8] + b"mif1" + data[12:]), photo.decode(data))


def test_ten_bit_heic_keeps_its_high_bits():
    deep = scene().astype(np.uint16) * 257
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (160, 120), deep.tobytes()).save(file, quality=95)
    assert Image.open(file).info["bit_depth"] == 10
    assert psnr(photo.decode(file.getvalue()), scene()) > 30


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_of_several_images_is_read(kind: str):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    options: dict[str, Any] = {} if kind == "TIFF" else {"quality": 95}
    pixels = photo.decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert pixels[16, 16, 0] > 240
    assert pixels[16, 16, 2] < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_orientation_is_applied_as_in_pil(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(), kind, exif=exif, **KINDS[kind])
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = photo.decode(data)
    assert pixels.shape == ((160, 120, 3) if orientation >= 5 else (120, 160, 3))
    assert np.array_equal(pixels, upright)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_heic_is_turned_as_its_container_states(quarters: int):
    pixels = photo.decode(turned_heic(quarters))
    assert psnr(pixels, np.rot90(scene(), quarters)) > 30


def test_orientation_in_the_exif_of_a_heic_is_not_applied_to_upright_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert psnr(photo.decode(saved(scene(), "HEIF", quality=95, exif=exif)), scene()) > 30


# TIFF


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_lossless_tiff_gives_the_exact_pixels(compression: str | None):
    assert np.array_equal(photo.decode(saved(scene(), "TIFF", compression=compression)), scene())


def test_sixteen_bit_grey_of_a_tiff_keeps_its_high_byte():
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    assert np.array_equal(photo.decode(saved(deep, "TIFF"))[..., 1], deep >> 8)


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bit_rgb_of_a_tiff_keeps_its_high_byte(order: str):
    pixels = (scene(16, 16) * np.uint16(256) + np.uint16(255)).astype(f"{order}u2").tobytes()
    data = deep_tiff(pixels, order, {273: 8, 278: 16, 279: len(pixels)})
    assert np.array_equal(photo.decode(data), scene(16, 16))


def test_inks_of_a_tiff_are_converted_to_rgb():
    inks = Image.fromarray(scene()).convert("CMYK")
    assert np.array_equal(photo.decode(saved(inks, "TIFF")), scene())


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_of_a_tiff_are_converted_as_in_pil(mode: str):
    image = Image.fromarray(scene()).convert(mode)
    assert np.array_equal(photo.decode(saved(image, "TIFF")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_other_samples_of_a_tiff_are_unsupported(dtype: type):
    assert reason_of(saved(Image.fromarray(scene()[..., 0].astype(dtype)), "TIFF")) == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("tag", [(50706, b"\1\4\0\0"), (254, 1)], ids=["DNG", "reduced copy"])
def test_a_raw_photo_is_not_read_as_its_preview(tag: tuple[int, Any]):
    assert reason_of(tiff(scene(), tag=tag)) == Reason.UNSUPPORTED_FORMAT


def test_tiles_beyond_the_size_limit_are_not_allocated():
    data = deep_tiff(bytes(100), "<", {322: 65536, 323: 65536, 324: 8, 325: 100})
    assert reason_of(data) == Reason.TOO_LARGE
