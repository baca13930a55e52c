"""Streams of a dataset's rows, or of their positions, through Ray Data."""

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

PART_STRIDE = 2**32
"""Difference between the numbers of the first rows of consecutive parts."""
BLOCK_ROWS = 64
ROW_POSITION = pa.schema([("part", pa.string()), ("position", pa.int64())])
TASK_CPUS = 0.25
"""CPUs reserved by a reading or writing task and by an actor on a CPU. The small share lets writing tasks be scheduled
at any time, beside one actor per CPU and Ray's own repartitioning, which takes a whole CPU. Otherwise finished rows
would accumulate in memory until the input is exhausted."""


class RowNumber(NamedTuple):
    """Number of a dataset's row. Rows sort by the hash of their content."""

    image_id: str
    key: str
    number: int  # index of the part * PART_STRIDE + position in the part
    label: str
    split: str


def number_rows(source: dataset.Dataset) -> Iterator[RowNumber]:
    """Yield the numbers of all rows, in ascending order. Raise UserError after the last if they are not all there."""
    columns, num_rows = ["image_id", "key", "label", "split"], 0
    for part, table in enumerate(storage.in_parallel(lambda each: each.read(columns), source.parts)):
        num_rows += table.num_rows
        values = (column.to_pylist() for column in table.columns)
        for position, (image_id, key, label, split) in enumerate(zip(*values, strict=True)):
            yield RowNumber(image_id, key, part * PART_STRIDE + position, label, split)
    source.check_rows(num_rows)


def select_rows(source: dataset.Dataset, limit: int | None) -> Iterable[RowNumber]:
    """Return all rows, or the first `limit` in the order of their content's hash."""
    return number_rows(source) if limit is None else heapq.nsmallest(limit, number_rows(source))


def positions_by_part(source: dataset.Dataset, numbers: Iterable[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the URI of each part with positions in it. numbers: of rows, sorted."""
    parts = source.part_uris
    for part, group in groupby(numbers, lambda number: number // PART_STRIDE):
        yield parts[part], [number % PART_STRIDE for number in group]


def stream_rows(source: dataset.Dataset, columns: Sequence[str], split: str | None = None) -> ray.data.Dataset:
    """Stream the rows of a dataset, or of one split, in blocks small enough to keep every worker busy.

    Parts are read by carclass.storage, as pyarrow's file systems lose their retry settings when they are pickled.
    """
    read = partial(read_part_rows, columns=list(columns), split=split)
    parts = _one_block_each([part._asdict() for part in source.parts])
    rows = parts.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=BLOCK_ROWS)


def read_part_rows(batch: pa.Table, columns: list[str], split: str | None) -> pa.Table:
    """Read the rows of one part, or those of one split. batch: one row with the fields of dataset.Part."""
    filters = None if split is None else pc.field("split") == split
    (part,) = batch.to_pylist()
    return dataset.Part(**part).read(columns, filters).replace_schema_metadata()


def join_blocks(blocks: Iterable[pa.Table]) -> pa.Table:
    """Return the rows of all blocks. Blocks without rows, which Ray Data may keep, have no columns either."""
    return pa.concat_tables([block for block in blocks if block.num_rows])


def stream_positions(positions: Iterable[tuple[str, list[int]]], block_rows: int) -> ray.data.Dataset:
    """Stream rows of ROW_POSITION in blocks of block_rows, for slow work on large rows.

    The consumer fetches rows by `dataset.take_rows`, so that queued blocks stay small and photos are read only when
    they are needed. positions: the URI of each part with positions in it.
    """
    parts = _one_block_each([{"part": part, "positions": in_part} for part, in_part in positions])
    expanded = parts.map_batches(expand_positions, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return expanded.repartition(target_num_rows_per_block=block_rows)


def expand_positions(batch: pa.Table) -> pa.Table:
    """Return a row of ROW_POSITION for each position. batch: one row with `part` and `positions`."""
    (part,), (positions,) = (batch[name].to_pylist() for name in ("part", "positions"))
    return pa.table([[part] * len(positions), positions], schema=ROW_POSITION)


def _one_block_each(items: list[dict[str, Any]]) -> ray.data.Dataset:
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))
