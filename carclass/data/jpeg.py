"""JPEG files: their segments, the plain file that datasets store, and strict decoding by libjpeg-turbo.

libjpeg reports everything unusual as a warning and names only the first one of a file. Warnings about pixels that are
missing or damaged make a photo unusable. The others must not, nor hide such a one, so their causes are removed first:
bytes between segments, unknown versions of JFIF, unknown colour transforms of Adobe, spectral ranges of sequential
scans, and padding after the coded data.
"""

import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg

from carclass.data.huffman import continues_image
from carclass.data.orientation import read_orientation
from carclass.data.quarantine import PhotoError, Reason

APP0, APP1, APP2, APP14, DHT, DQT, DRI, SOS, EOI = 0xE0, 0xE1, 0xE2, 0xEE, 0xC4, 0xDB, 0xDD, 0xDA, 0xD9
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
PROGRESSIVE = 0xC2
_PLAIN = FRAMES | {DHT, DQT, DRI, SOS, APP0, APP14}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_MARKER = re.compile(rb"\xff+([^\0\xff])", re.DOTALL)
_ICC = b"ICC_PROFILE\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x(\w+)")


class Segment(NamedTuple):
    """A marker with its payload, and for a start of scan the coded data that follow."""

    marker: int
    payload: bytes
    coded: bytes = b""


class Jpeg(NamedTuple):
    """A JPEG's frame and segments."""

    height: int
    width: int
    num_channels: int
    process: int  # marker of the frame
    segments: Sequence[Segment]

    def orientation(self) -> int:
        """Return the orientation that EXIF or XMP states."""
        payloads = [segment.payload for segment in self.segments if segment.marker == APP1]
        exif = [payload[6:] for payload in payloads if payload.startswith(b"Exif\0")]
        return read_orientation(exif, [payload for payload in payloads if payload.startswith(_XMP)])

    def profile(self) -> bytes:
        """Return the colour profile, joined from its segments; empty if there is none or a segment is missing."""
        payloads = [segment.payload for segment in self.segments if segment.marker == APP2]
        pieces = {payload[12]: payload for payload in payloads if payload.startswith(_ICC) and len(payload) > 14}
        if not pieces or sorted(pieces) != list(range(1, pieces[min(pieces)][13] + 1)):
            return b""
        return b"".join(pieces[number][14:] for number in sorted(pieces))


def parse_jpeg(data: bytes) -> Jpeg:
    """Read the segments up to the end of the image. Raise PhotoError if it has no end or is not supported."""
    segments = _read_segments(data)
    frame = next((segment for segment in segments if segment.marker in FRAMES | {SOS}), None)
    if frame is None or frame.marker == SOS or len(frame.payload) < 6 or not _has(segments, SOS):
        raise PhotoError(Reason.CORRUPT, "JPEG: no frame header before the first scan")
    process, payload, _ = frame
    precision, height, width, num_channels = struct.unpack_from(">BHHB", payload)
    if process > PROGRESSIVE or precision != 8 or num_channels not in (1, 3, 4):
        encoding = f"{precision} bits, {num_channels} channels, process {process - 0xC0}"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, f"JPEG with {encoding}: save it as an 8-bit RGB JPEG")
    if height == 0:
        detail = "JPEG whose height follows its pixels: save it again with any other program"
        raise PhotoError(Reason.UNSUPPORTED_FORMAT, detail)
    return Jpeg(height, width, num_channels, process, segments)


def plain_jpeg(jpeg: Jpeg) -> Jpeg:
    """Return the same image without metadata, thumbnails and colour profile, free of causes of harmless warnings."""
    kept = []
    for segment in jpeg.segments:
        marker, payload, coded = segment
        if marker == APP0:
            if not payload.startswith(b"JFIF\0") or len(payload) < 14:
                continue
            version = payload[5:7] if payload[5] == 1 else b"\1\1"
            payload = payload[:5] + version + payload[7:12] + b"\0\0"
        elif marker == APP14:
            if not payload.startswith(b"Adobe") or len(payload) < 12:
                continue
            # libjpeg assumes the same for an unknown transform.
            assumed = 2 if jpeg.num_channels == 4 else 1
            payload = payload[:11] + bytes([payload[11] if payload[11] in (0, assumed) else assumed]) + payload[12:]
        elif marker == SOS and jpeg.process != PROGRESSIVE:
            payload = payload[:-3] + b"\0\x3f\0"  # the only possible range, which some phones leave unset
        if marker in _PLAIN:
            kept.append(Segment(marker, payload, coded))
    return jpeg._replace(segments=kept)


def to_bytes(jpeg: Jpeg) -> bytes:
    """Return the file of these segments."""
    parts = [b"\xff\xd8"]
    for marker, payload, coded in jpeg.segments:
        parts += [struct.pack(">BBH", 0xFF, marker, len(payload) + 2), payload, coded]
    return b"".join([*parts, b"\xff\xd9"])


def decode_jpeg(jpeg: Jpeg, factor: int) -> tuple[np.ndarray, bytes]:
    """Decode a plain JPEG at 1/factor of its size: (H, W, 3) RGB pixels or (H, W, 4) CMYK, and the bytes decoded.

    Raise PhotoError if pixels are missing or damaged. Padding between coded data and the next marker is removed.
    """
    data = to_bytes(jpeg)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="CMYK" if jpeg.num_channels == 4 else "RGB",
            min_height=-(-jpeg.height // factor),
            min_width=-(-jpeg.width // factor),
        )
    except ValueError as error:
        match = _EXTRANEOUS.search(str(error))
        if match and (trimmed := _trim_scan(jpeg, int(match[1]), int(match[2], 16))):
            return decode_jpeg(trimmed, factor)
        if "subsampling" in str(error):
            raise PhotoError(Reason.UNSUPPORTED_FORMAT, "JPEG with an unusual chroma subsampling") from error
        raise PhotoError(Reason.CORRUPT, f"JPEG: {error}") from error
    _check_scans(jpeg)
    return pixels, data


def _read_segments(data: bytes) -> list[Segment]:
    """Return the segments between the start and the first end of image; bytes between them are skipped, as usual."""
    segments: list[Segment] = []
    scan_ends = np.empty(0, np.int64)
    at = 2
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == EOI:
            return segments
        if marker in _WITHOUT_LENGTH:
            continue
        payload_end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        end = payload_end
        if marker == SOS:
            scan_ends = scan_ends if len(scan_ends) else _find_scan_ends(data)
            later = scan_ends[np.searchsorted(scan_ends, payload_end) :]
            end = int(later[0]) if len(later) else len(data)
        if payload_end > len(data):
            break
        segments.append(Segment(marker, data[at + 2 : payload_end], data[payload_end:end]))
        at = end
    if data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise PhotoError(Reason.CORRUPT, f"JPEG: the segment at byte {at - 2} is longer than the file")
    where = "end mark" if _has(segments, SOS) else "first scan"
    raise PhotoError(Reason.TRUNCATED, f"JPEG: {len(data)} bytes end before the {where}")


def _find_scan_ends(data: bytes) -> np.ndarray:
    """Return the sorted offsets of all markers that end coded data; a pattern's search would be slower by far."""
    values = np.frombuffer(data, np.uint8)
    offsets = np.flatnonzero(values[:-1] == 0xFF)
    codes = values[offsets + 1]
    return offsets[(codes != 0) & (codes != 0xFF) & ((codes < 0xD0) | (codes > 0xD7))]


def _frame(jpeg: Jpeg) -> bytes:
    return next(segment.payload for segment in jpeg.segments if segment.marker in FRAMES)


def _has(segments: Sequence[Segment], marker: int) -> bool:
    return any(segment.marker == marker for segment in segments)


def _trim_scan(jpeg: Jpeg, count: int, next_marker: int) -> Jpeg | None:
    """Remove the last `count` bytes before a marker from the scan that they pad, or return None if they are pixels.

    If a damaged byte puts the decoder out of step, coded pixels remain at the end of a scan. In a sequential scan of
    all channels, these would decode as further pixels. Elsewhere, only bytes that are all equal pass as padding.
    """
    following = [segment.marker for segment in jpeg.segments[1:]] + [EOI]
    for index, (scan, after) in enumerate(zip(jpeg.segments, following, strict=True)):
        if scan.marker != SOS or after != next_marker or len(scan.coded) <= count:
            continue
        is_padding = len(set(scan.coded[-max(count, 2) :].replace(b"\xff\0", b"\xff"))) == 1
        if jpeg.process != PROGRESSIVE and scan.payload[0] == jpeg.num_channels and not is_padding:
            tables = [segment.payload for segment in jpeg.segments[:index] if segment.marker == DHT]
            is_padding = not continues_image(tables, _frame(jpeg), scan.payload, scan.coded, count)
        if is_padding:
            trimmed = scan._replace(coded=scan.coded[:-count])
            return jpeg._replace(segments=[*jpeg.segments[:index], trimmed, *jpeg.segments[index + 1 :]])
    return None


def _check_scans(jpeg: Jpeg) -> None:
    """Raise PhotoError if the scans lack a channel, or a progressive JPEG's last scans are missing.

    libjpeg fills the rest with grey or stays blurred, without a warning.
    """
    frame = _frame(jpeg)
    missing_bits = {frame[6 + 3 * i]: [255] * 64 for i in range(jpeg.num_channels)}
    for marker, payload, _ in jpeg.segments:
        if marker == SOS:
            start, end, low_bit = payload[-3], payload[-2], payload[-1] & 15
            for channel in payload[1 : 1 + 2 * payload[0] : 2]:
                missing_bits[channel][start : end + 1] = [low_bit] * (end + 1 - start)
    if any(any(bits) for bits in missing_bits.values()):
        raise PhotoError(Reason.TRUNCATED, "JPEG: the last scans are missing")
