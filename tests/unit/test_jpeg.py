"""JPEG files with harmless faults, which are read, and with missing or damaged pixels, which are not."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from carclass.data import photo
from carclass.data.quarantine import PhotoError, Reason
from tests.helpers.photos import overwritten, saved, scene

JPEG = saved(scene(), "JPEG", quality=90)
PROGRESSIVE = saved(scene(), "JPEG", quality=90, progressive=True)
JFIF = slice(2, 20)
END = b"\xff\xd9"


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def with_header(inserted: bytes, *, jfif: bool = True) -> bytes:
    """Return JPEG with bytes inserted after its JFIF segment, or in its place."""
    return JPEG[:2] + (JPEG[JFIF] if jfif else b"") + inserted + JPEG[JFIF.stop :]


def before_end(padding: bytes, data: bytes = JPEG) -> bytes:
    return data[:-2] + padding + END


def in_unset_range(data: bytes) -> bytes:
    return data.replace(b"\0\x3f\0", b"\0\0\0")


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def scan_starts(data: bytes) -> list[int]:
    return [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]


def reason_of(data: bytes) -> Reason:
    with pytest.raises(PhotoError) as caught:
        photo.decode(data)
    return caught.value.reason


# Warnings of libjpeg that are about no pixel


HARMLESS = {
    "JFIF 2.01": JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\2\1"),
    "JFIF 0.00": JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"),
    "a byte between segments": with_header(b"\x07"),
    "bytes between segments": with_header(b"left over"),
    "a stuffed byte between segments": with_header(b"\xff\0\x12"),
    "a segment without length": with_header(b"\xff\xe5\0\0abc"),
    "an unknown colour transform": with_header(adobe(7), jfif=False),
    "an unset spectral range": in_unset_range(JPEG),
    "zeros before the end": before_end(bytes(20)),
    "text before the end": before_end(b"some left-over text"),
    "padding in a progressive file": before_end(bytes(20), PROGRESSIVE),
}


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_warning_leaves_the_pixels_as_they_are(data):
    with pytest.raises(ValueError, match=r".+"):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(photo.decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_a_harmless_warning_hides_no_missing_pixels(data):
    scan = scan_starts(data)[-1]
    assert reason_of(data[: scan + 40] + END) in (Reason.CORRUPT, Reason.TRUNCATED)


@pytest.mark.parametrize(
    "inserted",
    [
        segment(0xF1, b"of an extension"),
        segment(0x42, b"reserved"),
        b"\xff\xd8",
        b"\xff\x01",
        segment(0xEE, b"Adobe"),
    ],
    ids=["extension", "reserved", "a second start", "temporary", "a short Adobe segment"],
)
def test_a_segment_without_influence_on_pixels_is_skipped(inserted):
    assert np.array_equal(photo.decode(with_header(inserted)), photo.decode(JPEG))


def test_stored_rgb_is_not_converted():
    data = saved(scene(), "JPEG", keep_rgb=True)
    assert np.array_equal(photo.decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_an_unknown_colour_transform_of_cmyk_is_read_as_libjpeg_does():
    data = saved(Image.fromarray(scene()).convert("CMYK"), "JPEG")
    odd = data.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\x09")
    assert odd != data
    expected = np.asarray(Image.open(io.BytesIO(odd)).convert("RGB"))
    assert np.abs(photo.decode(odd).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("padding", [bytes(1), bytes(300), b"\x11" * 30, bytes(range(1, 200)), b"\0\xff\0" * 9])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
def test_padding_before_the_end_is_ignored(options, padding):
    data = saved(scene(), "JPEG", **options)
    assert np.array_equal(photo.decode(before_end(padding, data)), photo.decode(data))


# Missing and damaged pixels


def noise_jpeg(**options) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC), "JPEG", **options)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 2}, {"progressive": True}])
def test_pixels_left_over_by_damage_are_no_padding(options):
    data = noise_jpeg(quality=85, **options)
    start = scan_starts(data)[0] + 14
    damaged = [overwritten(data, at) for at in range(start, len(data) - 50, (len(data) - start) // 40)]
    left_over = [item for item in damaged if b"extraneous" in warning_of(item)]
    assert left_over
    assert {reason_of(item) for item in left_over} <= {Reason.CORRUPT, Reason.TRUNCATED}


def warning_of(data: bytes) -> bytes:
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError as error:
        return str(error).encode()
    return b""


@pytest.mark.parametrize("num_scans", [1, 3, -1])
def test_a_progressive_jpeg_without_its_last_scans_is_truncated(num_scans):
    scan = scan_starts(PROGRESSIVE)[num_scans]
    cut = PROGRESSIVE.rindex(b"\xff\xc4", 0, scan)
    assert reason_of(PROGRESSIVE[:cut] + END) == Reason.TRUNCATED


def test_a_segment_longer_than_a_complete_file_is_corrupt():
    assert reason_of(with_header(b"\xff\xe5\xff\xf0")) == Reason.CORRUPT


def test_a_height_after_the_pixels_is_unsupported():
    assert reason_of(JPEG.replace(struct.pack(">HH", 120, 160), struct.pack(">HH", 0, 160))) == (
        Reason.UNSUPPORTED_FORMAT
    )
