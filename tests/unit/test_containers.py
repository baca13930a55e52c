"""PNG, WebP, GIF and BMP files with harmless faults, which are read, and with missing pixels, which are not."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from carclass.data import photo
from carclass.data.quarantine import PhotoError, Reason
from tests.helpers.photos import saved, scene

PNG, GIF = saved(scene(), "PNG"), saved(scene(), "GIF")
WEBP = {"lossy": saved(scene(), "WEBP"), "lossless": saved(scene(), "WEBP", lossless=True)}
FRAMES = [Image.fromarray(scene()), Image.fromarray(255 - scene())]


def chunk(kind: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def with_chunk(inserted: bytes) -> bytes:
    return PNG[:33] + inserted + PNG[33:]


def reason_of(data: bytes) -> Reason:
    with pytest.raises(PhotoError) as caught:
        photo.decode(data)
    return caught.value.reason


def animation(kind: str) -> bytes:
    return saved(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])


@pytest.mark.parametrize(
    "inserted",
    [
        chunk(b"tEXt", b"Comment\0none", wrong=1),
        chunk(b"gAMA", b"\0\0\xb1\x8f", wrong=1),
        chunk(b"prVt", b"private", wrong=1),
        chunk(b"gAMA", b"\0"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0garbage"),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))),
    ],
    ids=["text checksum", "gamma checksum", "private checksum", "gamma length", "EXIF", "XMP", "text bomb"],
)
def test_damaged_metadata_of_a_png_are_ignored(inserted):
    assert np.array_equal(photo.decode(with_chunk(inserted)), scene())


def test_a_damaged_palette_of_a_png_is_corrupt():
    data = bytearray(saved(Image.fromarray(scene()).quantize(16), "PNG"))
    data[data.index(b"PLTE") + 5] ^= 1
    assert reason_of(bytes(data)) == Reason.CORRUPT


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
@pytest.mark.parametrize("tail", [b"\n", b"\r\n", bytes(9), b"<html>"])
def test_bytes_after_the_end_are_ignored(kind, tail):
    data = saved(scene(), kind)
    assert np.array_equal(photo.decode(data + tail), photo.decode(data))


@pytest.mark.parametrize("name", WEBP)
@pytest.mark.parametrize("error", [-8, -2, -1, 1, 2, 100])
def test_a_wrong_length_of_a_complete_webp_is_ignored(name, error):
    data = WEBP[name]
    (size,) = struct.unpack_from("<I", data, 4)
    assert np.array_equal(photo.decode(data[:4] + struct.pack("<I", size + error) + data[8:]), photo.decode(data))


@pytest.mark.parametrize("name", WEBP)
def test_a_webp_of_fewer_pixels_than_its_chunk_states_is_truncated(name):
    data = WEBP[name][:-30]
    assert reason_of(data[:4] + struct.pack("<I", len(data) - 8) + data[8:]) == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_cut_after_its_first_frame_is_read(kind):
    data = animation(kind)
    assert np.array_equal(photo.decode(data[:-40]), photo.decode(data))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_cut_in_its_first_frame_is_truncated(kind):
    data = animation(kind)
    assert reason_of(data[: len(data) // 4]) == Reason.TRUNCATED


def test_a_damaged_later_frame_of_a_png_is_ignored():
    data = bytearray(animation("PNG"))
    data[data.index(b"fdAT") + 20] ^= 1
    assert np.array_equal(photo.decode(bytes(data)), scene())


@pytest.mark.parametrize("missing", [1, 481, 20_000])
def test_a_png_with_too_few_rows_is_truncated(missing):
    rows = b"".join(b"\0" + row.tobytes() for row in scene())
    short = chunk(b"IDAT", zlib.compress(rows[:-missing]))
    assert reason_of(PNG[:33] + short + PNG[-12:]) == Reason.TRUNCATED


# One row per pass, after its filter byte: the pixels of a 2x2 image are in passes 1, 6 and 7.
INTERLACED = b"\0\x10" + b"\0\x20" + b"\0\x30\x40"


def interlaced(rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 1)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + PNG[-12:]


def test_an_interlaced_png_is_read():
    pixels = photo.decode(interlaced(INTERLACED), min_side=1)
    assert pixels[..., 0].tolist() == [[0x10, 0x20], [0x30, 0x40]]


def test_an_interlaced_png_with_too_few_rows_is_truncated():
    with pytest.raises(PhotoError, match="truncated"):
        photo.decode(interlaced(INTERLACED[:-1]), min_side=1)


def bmp(bits: int, compression: int, masks: bytes, pixel: bytes) -> bytes:
    """Return 32x32 equal pixels with the longest kind of header."""
    start = 14 + 124
    header = struct.pack("<IiiHHIIiiII", 124, 32, -32, 1, bits, compression, 0, 0, 0, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, start) + header.ljust(124, b"\0") + pixel * 1024


MASKS = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)


def test_an_alpha_channel_of_zeros_in_a_bmp_is_unused():
    assert np.unique(photo.decode(bmp(32, 3, MASKS, bytes([10, 20, 200, 0]))), axis=1)[0].tolist() == [[200, 20, 10]]


def test_a_sixteen_bit_bmp_is_read():
    assert np.unique(photo.decode(bmp(16, 0, b"", b"\0\x7c")), axis=1)[0].tolist() == [[255, 0, 0]]
