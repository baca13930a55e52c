"""Which rows of a dataset are masked, and where they lie; a dataset's keys are never all in memory."""

import heapq
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

from carclass import dataset, storage

PART_NUMBERS = 2**32
"""Between the number of a part's first row and the next part's."""


class Row(NamedTuple):
    """A row of a dataset. Rows sort by their content's hash."""

    image_id: str
    key: str
    number: int  # its part's number times PART_NUMBERS, and its position there


def rows(source: dataset.Dataset) -> Iterator[Row]:
    """All of a dataset, in the order of their numbers."""
    read = partial(dataset.read_part, columns=["image_id", "key"])
    for part, table in enumerate(storage.in_parallel(read, source.part_uris)):
        ids, keys = (table[name].to_pylist() for name in ("image_id", "key"))
        for position, (image_id, key) in enumerate(zip(ids, keys, strict=True)):
            yield Row(image_id, key, part * PART_NUMBERS + position)


def chosen(source: dataset.Dataset, limit: int | None) -> Iterable[Row]:
    """All rows, or as many as the limit, by the order of their content's hash."""
    return rows(source) if limit is None else heapq.nsmallest(limit, rows(source))


def by_part(source: dataset.Dataset, numbers: Iterable[int]) -> Iterator[tuple[str, list[int]]]:
    """Each part's URI with positions in it. numbers: of rows, sorted."""
    parts = source.part_uris
    for part, found in groupby(numbers, lambda number: number // PART_NUMBERS):
        yield parts[part], [number % PART_NUMBERS for number in found]
