"""A dataset's rows streamed through Ray Data, whole or as places to fetch them from."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from carclass import storage
from carclass.data import dataset

PART_NUMBERS = 2**32
"""Between the number of a part's first row and the next part's."""


class RowNumber(NamedTuple):
    """A row of a dataset. Rows sort by their content's hash."""

    image_id: str
    key: str
    number: int  # its part's number times PART_NUMBERS, and its position there


def number_rows(source: dataset.Dataset) -> Iterator[RowNumber]:
    """All of a dataset, in the order of their numbers."""
    read = partial(dataset.read_part, columns=["image_id", "key"])
    for part, table in enumerate(storage.in_parallel(read, source.part_uris)):
        ids, keys = (table[name].to_pylist() for name in ("image_id", "key"))
        for position, (image_id, key) in enumerate(zip(ids, keys, strict=True)):
            yield RowNumber(image_id, key, part * PART_NUMBERS + position)


def select_rows(source: dataset.Dataset, limit: int | None) -> Iterable[RowNumber]:
    """All rows, or as many as the limit, by the order of their content's hash."""
    return number_rows(source) if limit is None else heapq.nsmallest(limit, number_rows(source))


def places_by_part(source: dataset.Dataset, numbers: Iterable[int]) -> Iterator[tuple[str, list[int]]]:
    """Each part's URI with positions in it. numbers: of rows, sorted."""
    parts = source.part_uris
    for part, found in groupby(numbers, lambda number: number // PART_NUMBERS):
        yield parts[part], [number % PART_NUMBERS for number in found]


BLOCK_ROWS = 64
ROW_PLACE = pa.schema([("part", pa.string()), ("position", pa.int64())])
TASK_CPUS = 0.25
"""CPUs reserved by a reading or writing task and by an actor on a CPU: so little that, next to an actor for every CPU
and Ray's own repartitioning, which takes a whole one, there is always room for writing. Else what is done would wait in
memory, and in ever greater numbers, until nothing is left to do."""


def stream_rows(source: dataset.Dataset, columns: Sequence[str], split: str | None = None) -> ray.data.Dataset:
    """A dataset's rows (or one split's) through Ray Data, in blocks small enough to keep every process busy.

    Parts are read by our own storage, as pyarrow's file systems lose their retries on the way to another process.
    """
    read = partial(read_rows, columns=list(columns), split=split)
    parts = _by_part([{"part": uri} for uri in source.part_uris])
    rows = parts.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=BLOCK_ROWS)


def read_rows(batch: pa.Table, columns: list[str], split: str | None) -> pa.Table:
    """The rows of one part; batch: its uri."""
    filters = None if split is None else pc.field("split") == split
    return dataset.read_part(batch["part"][0].as_py(), columns, filters).replace_schema_metadata()


def stream_places(places: Iterable[tuple[str, list[int]]], block_rows: int) -> ray.data.Dataset:
    """Places of rows (`part`, `position`) in blocks of block_rows, for slow work on large rows.

    Whoever works on a row fetches it by `dataset.take`: what waits in a queue is small, however many photos wait, and
    nothing is read long before its time. places: of each part, its URI and positions in it.
    """
    parts = _by_part([{"part": part, "positions": positions} for part, positions in places])
    spread = parts.map_batches(spread_places, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return spread.repartition(target_num_rows_per_block=block_rows)


def spread_places(batch: pa.Table) -> pa.Table:
    """A row for each place in one part; batch: its `part` and `positions`."""
    (part,), (positions,) = (batch[name].to_pylist() for name in ("part", "positions"))
    return pa.table([[part] * len(positions), positions], schema=ROW_PLACE)


def _by_part(items: list[dict[str, Any]]) -> ray.data.Dataset:
    """What is said of each part, in a block of its own."""
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))
