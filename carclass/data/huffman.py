"""Huffman decoding of the last bytes of a sequential JPEG's scan, to tell coded pixels from padding."""

from collections.abc import Iterable, Iterator, Sequence

LOOKAHEAD = 72
"""Bits before the extraneous bytes that libjpeg may have read ahead, and in which the image may end."""
Table = dict[tuple[int, int], int]
"""Symbol by length and bits of its code."""


def continues_image(table_segments: Iterable[bytes], frame: bytes, scan: bytes, coded: bytes, count: int) -> bool:
    """Return True if the last `count` bytes of a scan's coded data are whole units of further pixels.

    A unit has the blocks of all channels; ones fill the last byte. Payloads: `table_segments` of the Huffman tables,
    `frame` and `scan` of a sequential frame and of its scan of all channels.
    """
    tail = coded[-count - LOOKAHEAD // 4 :].replace(b"\xff\0", b"\xff")
    end = 8 * len(tail)
    begin = max(0, end - 8 * len(coded[-count:].replace(b"\xff\0", b"\xff")) - LOOKAHEAD)
    tables = dict(table for payload in table_segments for table in _read_tables(payload))
    try:
        blocks = [(tables[dc], tables[ac]) for dc, ac in _blocks_of_unit(frame, scan)]
    except KeyError:  # the standard tables, which may be left out
        return True
    reader = _Reader(tail)
    visited: set[int] = set()
    for start in range(begin, min(begin + LOOKAHEAD, end)):
        at: int | None = start
        while at is not None and at not in visited:
            visited.add(at)
            at = reader.skip_unit(at, blocks)
            if at is not None and end - at < 8 and reader.bits(at, end - at) == (1 << end - at) - 1:
                return True
    return False


class _Reader:
    """A reader of bits and Huffman codes at any position."""

    def __init__(self, data: bytes) -> None:
        self.end = 8 * len(data)
        self.data = data + bytes(8)

    def bits(self, at: int, count: int) -> int:
        """Return up to 16 bits."""
        window = int.from_bytes(self.data[at >> 3 : (at >> 3) + 3], "big")
        return window >> 24 - (at & 7) - count & (1 << count) - 1

    def skip_unit(self, at: int, blocks: Sequence[tuple[Table, Table]]) -> int | None:
        """Return the position after the blocks of a unit, or None if the bits are no such blocks."""
        for dc, ac in blocks:
            length, size = self._symbol(at, dc)
            at += length + size
            num_coefficients = 1
            while length and num_coefficients < 64:
                length, symbol = self._symbol(at, ac)
                run, size = symbol >> 4, symbol & 15
                at += length + size
                num_coefficients += 64 if not size and run < 15 else run + 1
            if not length or at > self.end:
                return None
        return at

    def _symbol(self, at: int, table: Table) -> tuple[int, int]:
        """Return length and symbol of the code at a position; a length of 0 if there is none."""
        window = self.bits(at, 16)
        for length in range(1, 17):
            if (symbol := table.get((length, window >> 16 - length))) is not None:
                return length, symbol
        return 0, 0


def _read_tables(payload: bytes) -> Iterator[tuple[int, Table]]:
    """Yield number (16 added for AC) and table of each Huffman table in a segment."""
    at = 0
    while at + 17 <= len(payload):
        counts, symbols = payload[at + 1 : at + 17], iter(payload[at + 17 :])
        code, table = 0, {}
        for length, number in enumerate(counts, start=1):
            for _ in range(number):
                table[length, code] = next(symbols, 0)
                code += 1
            code <<= 1
        yield payload[at], table
        at += 17 + sum(counts)


def _blocks_of_unit(frame: bytes, scan: bytes) -> Iterator[tuple[int, int]]:
    """Yield the numbers of the DC and AC table of each block that an interleaved unit has."""
    sampling = {frame[6 + 3 * i]: frame[7 + 3 * i] for i in range(frame[5])}
    for channel, tables in zip(scan[1 : 1 + 2 * scan[0] : 2], scan[2 : 2 + 2 * scan[0] : 2], strict=True):
        factors = sampling[channel]
        num_blocks = (factors >> 4) * (factors & 15) if scan[0] > 1 else 1
        yield from [(tables >> 4, 16 + (tables & 15))] * num_blocks
