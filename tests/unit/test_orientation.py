"""Orientation of photos in EXIF and XMP."""

import struct

import pytest
from PIL.PngImagePlugin import PngInfo

from carclass.data import photo
from carclass.data.orientation import read_orientation
from tests.helpers.photos import saved, scene

XMP = b"http://ns.adobe.com/xap/1.0/\0"
ELEMENT = b"<x:xmpmeta><rdf:Description><tiff:Orientation>6</tiff:Orientation></rdf:Description></x:xmpmeta>"
ATTRIBUTE = b"<x:xmpmeta><rdf:Description tiff:Make='x' tiff:Orientation = '6'/></x:xmpmeta>"


def entry(order: str, tag: int, kind: int, value: int) -> bytes:
    code = {1: "B", 3: "H", 4: "I"}.get(kind, "I")
    return struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(order + code, value).ljust(4, b"\0")


def exif(value: int = 6, *, order: str = ">", kind: int = 3, before: int = 0) -> bytes:
    """Return an EXIF block with the tag after `before` others."""
    entries = [entry(order, 0x0100 + i, 4, 7) for i in range(before)] + [entry(order, 0x0112, kind, value)]
    magic = b"MM\0*" if order == ">" else b"II*\0"
    return magic + struct.pack(f"{order}IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def jpeg_with(*payloads: bytes) -> bytes:
    data = saved(scene(), "JPEG")
    segments = [struct.pack(">BBH", 0xFF, 0xE1, len(payload) + 2) + payload for payload in payloads]
    return data[:20] + b"".join(segments) + data[20:]


def is_turned(data: bytes) -> bool:
    return photo.decode(data).shape == (160, 120, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("before", [0, 5])
def test_the_tag_is_read_in_any_byte_order_type_and_position(order, kind, before):
    assert read_orientation([exif(order=order, kind=kind, before=before)], []) == 6


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_impossible_value_means_upright(value):
    assert read_orientation([exif(value)], []) == 1


def test_a_tag_of_another_type_means_upright():
    assert read_orientation([exif(kind=5)], []) == 1


@pytest.mark.parametrize("kept", range(len(exif()) - 8))
def test_a_cut_block_means_upright(kept):
    assert read_orientation([exif()[:kept]], []) == 1


@pytest.mark.parametrize("packet", [ELEMENT, ATTRIBUTE, ELEMENT.decode().encode("utf-16")])
def test_xmp_is_read_as_element_and_as_attribute(packet):
    assert read_orientation([], [packet]) == 6


def test_exif_outranks_xmp():
    assert read_orientation([exif(8)], [ELEMENT]) == 8


def test_xmp_is_used_if_exif_states_no_orientation():
    without = b"MM\0*" + struct.pack(">IH", 8, 1) + entry(">", 0x010F, 4, 7) + bytes(4)
    assert read_orientation([without], [ELEMENT]) == 6


@pytest.mark.parametrize("packet", [b"", b"<tiff:Orientation>up</tiff:Orientation>", ELEMENT.replace(b"6", b"9")])
def test_an_unreadable_packet_means_upright(packet):
    assert read_orientation([], [packet]) == 1


def test_a_jpeg_with_several_blocks_is_turned():
    assert is_turned(jpeg_with(XMP + b"<x:xmpmeta/>", b"Exif\0\0garbage", b"Exif\0\0" + exif(kind=4)))


def test_a_jpeg_with_xmp_alone_is_turned():
    assert is_turned(jpeg_with(XMP + ELEMENT))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_long_tag_is_read_in_png_and_webp(kind):
    assert is_turned(saved(scene(), kind, exif=exif(kind=4)))


def test_a_webp_with_xmp_alone_is_turned():
    assert is_turned(saved(scene(), "WEBP", xmp=ELEMENT))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_png_with_xmp_alone_is_turned(compressed):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", ELEMENT.decode(), zip=compressed)
    assert is_turned(saved(scene(), "PNG", pnginfo=info))
