"""The inventory of a job: pending inputs and their order, missing, duplicate and withdrawn rows."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from carclass.data.inventory import INPUT, Inventory, chunks
from carclass.errors import UserError
from tests.helpers.inventories import add_keys


@pytest.fixture
def inventory() -> Iterator[Inventory]:
    with Inventory() as inventory:
        yield inventory


def add_part(inventory: Inventory, path: str, keys: Sequence[str], **constants: str) -> None:
    columns = {"key": list(keys), **{name: [value] * len(keys) for name, value in constants.items()}}
    inventory.add_part(path, pa.table(columns), content="")
    inventory.commit_parts(removed=[])


def pending_keys(inventory: Inventory, batch_rows: int = 10) -> list[str]:
    return [key for table in inventory.pending(batch_rows, hash_order=False) for key in table["key"].to_pylist()]


def test_inputs_that_are_not_written_are_pending(inventory: Inventory):
    add_keys(inventory, "abcd")
    add_part(inventory, "parts/1.parquet", "b")
    add_part(inventory, "quarantine/2.parquet", "d", reason="empty")
    assert (inventory.count_pending(), pending_keys(inventory)) == (2, ["a", "c"])


def test_pending_tables_have_the_requested_number_of_rows(inventory: Inventory):
    add_keys(inventory, (f"{i:03d}" for i in range(25)))
    tables = list(inventory.pending(10))
    assert [len(table) for table in tables] == [10, 10, 5]
    assert {table.schema for table in tables} == {INPUT}


def test_a_batch_is_spread_over_all_folders(inventory: Inventory):
    add_keys(inventory, (f"folder {i // 1000}/{i:05d}.jpg" for i in range(10_000)))
    for table in inventory.pending(500):
        folders = [key.split("/")[0] for key in table["key"].to_pylist()]
        assert max(folders.count(folder) for folder in set(folders)) < 100  # 50, and seven standard deviations


def test_pending_inputs_can_keep_the_order_of_their_source(inventory: Inventory):
    add_keys(inventory, ["z", "a", "m"])
    assert pending_keys(inventory, batch_rows=2) == ["z", "a", "m"]


def test_parts_can_be_added_while_pending_inputs_are_read(inventory: Inventory):
    add_keys(inventory, (f"{i:05d}" for i in range(5000)))
    for number, table in enumerate(inventory.pending(100)):
        inventory.add_part(f"parts/{number}.parquet", table.select(["key"]), content="")
    assert inventory.count_pending() == 5000
    inventory.commit_parts(removed=[])
    assert (inventory.count_pending(), inventory.missing_keys(), inventory.unexpected_keys()) == (0, [], [])


def test_rows_of_a_removed_file_are_pending_again(inventory: Inventory):
    add_keys(inventory, "ab")
    add_part(inventory, "parts/1.parquet", "a")
    add_part(inventory, "parts/2.parquet", "b")
    inventory.commit_parts(removed=["parts/1.parquet"])
    assert (pending_keys(inventory), list(inventory.contents())) == (["a"], ["parts/2.parquet"])


def test_files_that_repeat_keys_of_kept_files_are_duplicates(inventory: Inventory):
    for path, keys in {"parts/1": "ab", "parts/2": "bc", "parts/3": "cd", "parts/4": "e"}.items():
        add_part(inventory, path, keys)
    assert inventory.duplicate_parts() == ["parts/2"]


def test_rows_that_are_also_in_quarantine_are_grouped_by_part(inventory: Inventory):
    add_part(inventory, "parts/1", "abc")
    add_part(inventory, "parts/2", "de")
    add_part(inventory, "quarantine/1", "cad", reason="leakage")
    assert [(path, sorted(keys)) for path, keys in inventory.withdrawn_rows()] == [
        ("parts/1", ["a", "c"]),
        ("parts/2", ["d"]),
    ]


def test_the_temporary_folder_is_removed():
    with Inventory() as inventory:
        folder = Path(inventory._folder.name)
        add_keys(inventory, "a")
        assert list(folder.iterdir())
    assert not folder.exists()


def test_an_error_of_the_disk_is_reported_with_a_remedy(tmp_path: Path):
    """Files of at most 40 KiB, as SQLite sees a quota: not as a full disk."""
    script = """
import resource, signal
from carclass.data.inventory import Inventory, Listed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Inventory() as inventory:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_960, 40_960))
    inventory.add_inputs(Listed(f"{i:06d}.jpg") for i in range(100_000))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "UserError: no space left in" in process.stderr
    assert "disk I/O error" in process.stderr


def test_a_full_disk_is_reported_with_a_remedy(inventory: Inventory):
    inventory.execute("PRAGMA max_page_count = 20")  # causes the same error as a full disk
    with pytest.raises(UserError, match=r"no space left in .*TMPDIR"):
        add_keys(inventory, (f"{i:06d}.jpg" for i in range(10_000)))


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [3, 1])])
def test_chunks_contain_all_items(count: int, sizes: list[int]):
    assert [len(chunk) for chunk in chunks(iter(range(count)), 3)] == sizes
