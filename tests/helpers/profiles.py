"""Colour profiles (ICC) for tests, built from their numbers."""

import struct
from collections.abc import Sequence

import numpy as np

SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3_PRIMARIES = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_PRIMARIES = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
WHITE = (0.9642, 1.0, 0.8249)


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(parameters: Sequence[float]) -> bytes:
    return struct.pack(">4s4xHxx", b"para", 0 if len(parameters) == 1 else 3) + _fixed(parameters)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += padded
    header = struct.pack(">I4xI4s4s4s12x4s", at + len(data), 0x04300000, kind, space, connection, b"acsp")
    header += bytes(28) + _fixed(WHITE)
    return header.ljust(128, b"\0") + table + data


def rgb_profile(primaries: Sequence[Sequence[float]], curve: Sequence[float] = SRGB_CURVE) -> bytes:
    """Return a profile of RGB by the XYZ of its primaries and its transfer curve: (gamma,), or that of sRGB."""
    tags = {b"wtpt": _xyz(WHITE)}
    tags |= {name + b"XYZ": _xyz(primary) for name, primary in zip((b"r", b"g", b"b"), primaries, strict=True)}
    tags |= {name + b"TRC": _curve(curve) for name in (b"r", b"g", b"b")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """Return a profile of grey with a gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(WHITE), b"kTRC": _curve((gamma,))})


def cmyk_profile() -> bytes:
    """Return a profile of inks: cyan is (140, 91, 78) of 8-bit Lab, black and other inks are dark, paper is white."""
    nodes = np.full((2, 2, 2, 2, 3), (40, 128, 128), np.uint8)
    nodes[0, 0, 0, 0] = (255, 128, 128)
    nodes[1, 0, 0, 0] = (140, 91, 78)
    identity = bytes(range(256))
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + _fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    table += identity * 4 + nodes.tobytes() + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(WHITE), b"A2B0": table})
