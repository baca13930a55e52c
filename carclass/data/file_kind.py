"""Format of a photo's file by its first bytes, whatever its name."""

import re

from carclass.data.quarantine import PhotoError, Reason

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_UNSUPPORTED = {
    b"\0\0\1\0": "ICO",
    b"8BPS": "PSD",
    b"IIRO": "a camera's raw format",
    b"IIRS": "a camera's raw format",
    b"IIU\0": "a camera's raw format",
    b"FUJIFILMCCD-RAW": "a camera's raw format",
    b"\0\0\0\x18ftypcrx ": "a camera's raw format",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
}
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?>\s+|<\?(?>(?:(?!\?>).)*)\?>|<!--(?>(?:(?!-->).)*)-->|<!DOCTYPE\s+svg\b[^\[>]*(?:\[[^\]]*\]\s*)?>)*+"
    rb"<(?:\w+:)?svg[\s/>]",
    re.DOTALL | re.IGNORECASE,
)
"""Start of an SVG file: an XML declaration, comments and a document type may come before its element."""
_SVG_BYTES = 2**16


def detect_kind(data: bytes) -> str:
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
    brands = _read_brands(data)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & _HEIF_BRANDS:
        return "HEIF"
    unsupported = None
    for magic, kind in _UNSUPPORTED.items():
        if data.startswith(magic):
            unsupported = kind
    if _SVG.match(data[:_SVG_BYTES]):
        unsupported = "SVG"
    if unsupported:
        detail = f"{unsupported} is not supported: convert it to JPEG, PNG or WebP"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, detail)
    raise PhotoError(Reason.NOT_AN_IMAGE, f"{len(data)} bytes that start with {_describe_bytes(data[:16])}")


def _describe_bytes(start: bytes) -> str:
    """Return the first bytes of a file as text, or else as hexadecimal numbers."""
    text = start.decode("latin-1")
    is_text = text.isascii() and all(char.isprintable() or char.isspace() for char in text)
    return f"the text {text!r}" if is_text else start.hex(" ")


def _read_brands(data: bytes) -> set[bytes]:
    """Return the brands in the first box of a file; none if it has no such box."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(len(data), int.from_bytes(data[:4], "big"))
    return {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
