"""Selection of rows and their positions in parts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from carclass.data import dataset, publishing, streaming
from carclass.data.inventory import Inventory
from tests.helpers import inventories

PARTS = ("dab", "fce")


@pytest.fixture
def source(tmp_path: Path) -> dataset.Dataset:
    """Publish a dataset of two parts whose rows sort by content in the reverse order of their keys."""
    uri = dataset.dataset_uri(str(tmp_path), "v1")
    rest = {"label": "a", "split": "train", "width": 1, "height": 1, "image": b"x"}
    for keys in PARTS:
        rows = [{"image_id": f"{ord('z') - ord(key)}", "key": key, **rest} for key in keys]
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), {})
    args = {"settings": {}, "classes": ["a", "b"], "facts": {"kind": "photos"}}
    return publishing.publish_manifest(inventories.complete_dataset(uri, "".join(PARTS), **args))


def keys_at(source: dataset.Dataset, numbers: list[int]) -> list[str]:
    parts = streaming.positions_by_part(source, sorted(numbers))
    return [key for part, positions in parts for key in dataset.take_rows(part, positions, ["key"])["key"].to_pylist()]


def test_row_numbers_are_resolved_to_positions(source: dataset.Dataset):
    rows = list(streaming.select_rows(source, None))
    assert sorted(row.key for row in rows) == sorted("".join(PARTS))
    assert keys_at(source, [row.number for row in rows]) == [row.key for row in rows]


def test_a_limit_selects_the_first_rows_by_content_hash(source: dataset.Dataset):
    assert sorted(row.key for row in streaming.select_rows(source, 2)) == ["e", "f"]


def test_written_rows_are_not_pending(source: dataset.Dataset):
    with Inventory() as inventory:
        rows = streaming.select_rows(source, None)
        inventory.add_numbered_inputs((row.number, row.key, row.image_id, row.label, row.split) for row in rows)
        inventory.add_part("parts/1.parquet", pa.table({"key": ["a", "f", "c", "e"]}), content="")
        inventory.commit_parts(removed=[])
        assert sorted(keys_at(source, list(inventory.pending_numbers()))) == ["b", "d"]


def test_positions_are_expanded_to_rows():
    table = streaming.expand_positions(pa.table({"part": ["x.parquet"], "positions": [[3, 5]]}))
    assert table.to_pylist() == [{"part": "x.parquet", "position": position} for position in (3, 5)]


@pytest.mark.parametrize(("part_rows", "image_bytes", "expected"), [(64, 100, 64), (4096, 10**6, 33), (8, 10**8, 1)])
def test_a_task_gets_as_many_rows_to_write_as_fill_a_file(
    tmp_path: Path, part_rows: int, image_bytes: int, expected: int
):
    uri = dataset.dataset_uri(str(tmp_path), "v1")
    rng = np.random.default_rng(0)
    rows = [
        {"image_id": "00", "key": key, "label": "a", "split": "train", "image": rng.bytes(image_bytes)} for key in "ab"
    ]
    publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), {})
    args = {"settings": {}, "classes": ["a", "b"], "facts": {"kind": "photos"}}
    published = publishing.publish_manifest(inventories.complete_dataset(uri, "ab", **args))
    assert streaming.rows_per_write(published, part_rows) == expected
