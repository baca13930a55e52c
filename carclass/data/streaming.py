"""Streams of a dataset's rows, or of their positions, through Ray Data."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from carclass.data import dataset, publishing

PART_STRIDE = 2**32
"""Difference between the numbers of the first rows of consecutive parts."""
BLOCK_ROWS = 64
BLOCK_POSITIONS = 2**17
"""Positions that one task expands: a few megabytes."""
MAX_READ_BLOCKS = 4096
"""Largest number of tasks that read all parts of a dataset, each of which costs the driver milliseconds."""
PART = pa.schema([("uri", pa.string()), ("content", pa.string())])
"""Fields of dataset.Part."""
POSITIONS = pa.schema([("part", pa.string()), ("positions", pa.list_(pa.int64()))])
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
    columns = ["image_id", "key", "label", "split"]
    for part, table in enumerate(source.read_parts(columns)):
        values = (column.to_pylist() for column in table.columns)
        for position, (image_id, key, label, split) in enumerate(zip(*values, strict=True)):
            yield RowNumber(image_id, key, part * PART_STRIDE + position, label, split)


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
    parts = pa.Table.from_pylist([part._asdict() for part in source.parts], PART)
    per_block = max(1, math.ceil(len(parts) / MAX_READ_BLOCKS))
    blocks = [parts.slice(start, per_block) for start in range(0, max(1, len(parts)), per_block)]
    rows = ray.data.from_arrow(blocks).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=BLOCK_ROWS)


def read_part_rows(batch: pa.Table, columns: list[str], split: str | None) -> pa.Table:
    """Read the rows of one part, or those of one split. batch: one row with the fields of dataset.Part."""
    filters = None if split is None else pc.field("split") == split
    (part,) = batch.to_pylist()
    return dataset.Part(**part).read(columns, filters).replace_schema_metadata()


def rows_per_write(source: dataset.Dataset, part_rows: int) -> int:
    """Return the rows that a task gets to write: part_rows, or as many as fill a file, of photos like the first part's.

    A part ends after publishing.PART_BYTES, so more rows would only be in memory, several times each.
    """
    if not source.parts:
        return part_rows
    with dataset.open_parquet(source.part_uris[0]) as opened, dataset.open_part(opened) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "image")
        return max(1, min(part_rows, publishing.PART_BYTES * file.metadata.num_rows // max(1, size)))


def join_blocks(blocks: Iterable[pa.Table]) -> pa.Table:
    """Return the rows of all blocks. Blocks without rows, which Ray Data may keep, have no columns either."""
    return pa.concat_tables([block for block in blocks if block.num_rows])


def stream_positions(positions: Iterable[tuple[str, list[int]]], block_rows: int) -> ray.data.Dataset:
    """Stream rows of ROW_POSITION in blocks of block_rows, for slow work on large rows.

    The consumer fetches rows by `dataset.take_rows`, so that queued blocks stay small and photos are read only when
    they are needed. positions: the URI of each part with positions in it.
    """
    blocks = ray.data.from_arrow(list(_position_tables(positions)))
    expanded = blocks.map_batches(expand_positions, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return expanded.repartition(target_num_rows_per_block=block_rows)


def _position_tables(positions: Iterable[tuple[str, list[int]]]) -> Iterator[pa.Table]:
    """Yield tables of POSITIONS with about BLOCK_POSITIONS positions each: a block costs the driver milliseconds."""
    parts: list[str] = []
    lists: list[list[int]] = []
    number = 0
    for part, in_part in positions:
        parts.append(part)
        lists.append(in_part)
        number += len(in_part)
        if number >= BLOCK_POSITIONS:
            yield pa.table([parts, lists], schema=POSITIONS)
            parts, lists, number = [], [], 0
    yield pa.table([parts, lists], schema=POSITIONS)


def expand_positions(batch: pa.Table) -> pa.Table:
    """Return a row of ROW_POSITION for each position. batch: one row with `part` and `positions`."""
    (part,), (positions,) = (batch[name].to_pylist() for name in ("part", "positions"))
    return pa.table([[part] * len(positions), positions], schema=ROW_POSITION)
