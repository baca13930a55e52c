"""Writing, publishing and reading of datasets: complete, without duplicates, idempotent."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carclass import storage
from carclass.data import dataset, draft, publishing
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from tests.helpers.inventories import add_keys
from tests.helpers.parts import SETTINGS, finished_keys, publish, row, write_quarantine, write_rows


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return dataset.dataset_uri(str(tmp_path), "v1")


def keys_in(uri: str, folder: str) -> list[str]:
    return sorted(publishing.read_written(uri, folder, ["key"])["key"].to_pylist())


def withdraw(uri: str, keys: Sequence[str]) -> None:
    """Move rows to quarantine, or finish interrupted withdrawals."""
    if keys:
        write_quarantine(uri, keys)
    with Inventory() as inventory:
        writing = Draft(uri, SETTINGS, inventory)
        writing.sync()
        writing.finish_withdrawals()


def drop_duplicates(uri: str) -> None:
    with Inventory() as inventory:
        writing = Draft(uri, SETTINGS, inventory)
        writing.sync()
        writing.drop_duplicates()


def manifest_path(uri: str) -> Path:
    return Path(uri) / "manifest.json"


# Publishing


def test_a_manifest_counts_inputs_rows_splits_and_reasons(uri: str):
    write_rows(uri, "ab")
    write_rows(uri, "c", split="val")
    write_rows(uri, "d", split="test")
    write_quarantine(uri, "ef")
    manifest = publish(uri, "abcdef").manifest
    assert (manifest["inputs"], manifest["rows"], manifest["quarantined"]) == (6, 4, 2)
    assert manifest["splits"] == {"train": 2, "val": 1, "test": 1}
    assert manifest["reasons"] == {"leakage": 2}


def test_a_published_dataset_is_loaded(tmp_path: Path, uri: str):
    write_rows(uri, "ab")
    assert publish(uri, "ab") == dataset.load_dataset(str(tmp_path), "v1")


@pytest.mark.parametrize(
    ("rows", "quarantine", "inputs", "message"),
    [
        ("ab", "", "abc", r"missing \['c'\]"),
        ("abc", "", "ab", r"unexpected \['c'\]"),
        ("ab", "b", "ab", r"unexpected \['b'\]"),
        ("abb", "", "ab", r"unexpected \['b'\]"),
        ("ab", "", "abb", "duplicate input b"),
        ("abb", "", "abb", "duplicate input b"),
    ],
)
def test_missing_or_duplicate_keys_fail_an_assertion_and_nothing_is_published(
    uri: str, rows: str, quarantine: str, inputs: str, message: str
):
    write_rows(uri, rows)
    if quarantine:
        write_quarantine(uri, quarantine)
    with pytest.raises(AssertionError, match=message):
        publish(uri, inputs)
    assert not manifest_path(uri).exists()


def test_a_dataset_without_a_manifest_is_not_published(tmp_path: Path, uri: str):
    write_rows(uri, "ab")
    assert dataset.find_dataset(str(tmp_path), "v1") is None


def test_the_manifest_is_written_last(uri: str, monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []

    def spy(write: Callable[[str, bytes], Any]) -> Callable[[str, bytes], Any]:
        def wrapped(uri: str, data: bytes) -> Any:
            written.append(uri)
            return write(uri, data)

        return wrapped

    for name in ("write_bytes", "create"):
        monkeypatch.setattr(storage, name, spy(getattr(storage, name)))
    write_rows(uri, "ab")
    withdraw(uri, "b")
    publish(uri, "ab")
    assert [uri.endswith("manifest.json") for uri in written] == [False] * (len(written) - 1) + [True]


def test_a_dataset_without_rows_can_be_published_and_read(uri: str):
    write_quarantine(uri, "ab")
    published = publish(uri, "ab")
    assert published.manifest["rows"] == 0
    assert published.read(["key", "label"]).to_pylist() == []


def test_the_digest_depends_on_the_content(uri: str):
    write_rows(uri, "ab")
    write_rows(f"{uri}b", "abc")
    assert publish(uri, "ab").digest != publish(f"{uri}b", "abc").digest


# Reading


def test_rows_are_read_as_written(uri: str):
    write_rows(uri, "a", label="Å, „b“", image=b"\0\xff")
    assert publish(uri, "a").read(dataset.ROW.names).to_pylist() == [row("a", label="Å, „b“", image=b"\0\xff")]


def test_rows_are_read_by_key_in_the_requested_order(uri: str):
    write_rows(uri, "ab", label="one")
    write_rows(uri, "cd", label="two")
    rows = publish(uri, "abcd").rows(["d", "a"], ["label"])
    assert rows == [{"key": "d", "label": "two"}, {"key": "a", "label": "one"}]


def test_rows_are_read_by_position_across_row_groups(uri: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(publishing, "ROW_GROUP_BYTES", 1)
    keys = [f"{i:03d}" for i in range(50)]
    publishing.write_part(uri, "parts", pa.Table.from_pylist([row(key) for key in keys], dataset.ROW), SETTINGS)
    (part,) = publish(uri, keys).part_uris
    assert pq.ParquetFile(part).num_row_groups > 1
    rows = dataset.take_rows(part, [49, 0, 17, 16, 15], ["label", "key"])
    assert rows["key"].to_pylist() == ["049", "000", "017", "016", "015"]
    assert rows.column_names == ["label", "key"]


@pytest.mark.parametrize(("image_bytes", "num_groups"), [(1_000, 1), (200_000, 3), (2_000_000, 6)])
def test_row_groups_have_megabytes_of_photos(uri: str, image_bytes: int, num_groups: int):
    rows = [row(f"{i:03d}", image=bytes(image_bytes)) for i in range(96)]
    written = publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), SETTINGS)
    assert pq.ParquetFile(f"{uri}/{written.path}").num_row_groups == num_groups


def test_the_rows_of_a_part_are_read_into_one_piece_of_memory(uri: str):
    for first in (0, 100):
        write_rows(uri, [f"{i:03d}" for i in range(first, first + 50)])
    rows = publish(uri, [f"{i:03d}" for first in (0, 100) for i in range(first, first + 50)]).read(["key", "label"])
    assert (len(rows), rows["key"].num_chunks, rows["label"].num_chunks) == (100, 2, 2)


def test_only_files_with_duplicate_keys_are_deleted(uri: str):
    for keys in ("abc", "cd", "ef"):
        write_rows(uri, keys)
    drop_duplicates(uri)
    remaining = keys_in(uri, "parts")
    assert remaining in (["a", "b", "c", "e", "f"], ["c", "d", "e", "f"])
    drop_duplicates(uri)
    assert keys_in(uri, "parts") == remaining


def test_the_error_for_a_missing_dataset_lists_the_published_ones(tmp_path: Path, uri: str):
    write_rows(uri, "a")
    publish(uri, "a")
    with pytest.raises(UserError, match=r"no dataset `v2` in .*\. .*Available: v1\."):
        dataset.load_dataset(str(tmp_path), "v2")


def test_a_root_that_does_not_exist_is_named(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"There is no folder .*/nowhere: correct `root`, or run `python jobs/ingest\.py --config FILE`"
    ):
        dataset.load_dataset(str(tmp_path / "nowhere"), "v1")


def test_the_error_without_any_dataset_names_the_job_that_makes_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"Available: none\. Run `python jobs/ingest\.py --config FILE` first"):
        dataset.load_dataset(str(tmp_path), "v1")


def test_an_unreadable_root_is_reported(tmp_path: Path, uri: str):
    manifest_path(uri).mkdir(parents=True)
    with pytest.raises(UserError, match=r"datasets/v1/manifest\.json cannot be read"):
        dataset.find_dataset(str(tmp_path), "v1")


# Idempotence


def test_a_dataset_made_with_the_same_settings_is_found(tmp_path: Path, uri: str):
    write_rows(uri, "a")
    published = publish(uri, "a")
    assert dataset.find_same_dataset(str(tmp_path), "v1", dict(reversed(SETTINGS.items()))) == published


def test_settings_are_compared_as_json(tmp_path: Path, uri: str):
    settings = {"classes": {2: "car"}, "fill": (1, 2, 3)}
    write_rows(uri, "a", settings)
    publish(uri, "a", settings=settings)
    assert dataset.find_same_dataset(str(tmp_path), "v1", settings) is not None


def test_a_dataset_made_with_other_settings_is_refused_with_their_names(tmp_path: Path, uri: str):
    write_rows(uri, "a")
    publish(uri, "a")
    with pytest.raises(UserError, match=r"made with other settings \(seed, size\)\. A dataset never changes"):
        dataset.find_same_dataset(str(tmp_path), "v1", {"photos": SETTINGS["photos"], "seed": 2, "size": 1})


def test_an_unpublished_dataset_is_not_found(tmp_path: Path):
    assert dataset.find_same_dataset(str(tmp_path), "v1", SETTINGS) is None


def test_the_inventory_records_rows_and_quarantine(uri: str):
    write_rows(uri, "ab")
    write_quarantine(uri, "c")
    assert finished_keys(uri) == {"a", "b", "c"}


def test_a_dataset_of_moved_photos_advises_a_link_at_their_old_place(tmp_path: Path, uri: str):
    settings = {**SETTINGS, "photos": "/old/photos"}
    write_rows(uri, "a", settings)
    publish(uri, "a", settings=settings)
    with pytest.raises(UserError, match=r"other settings \(photos\).*by a symbolic link at /old/photos\."):
        dataset.find_same_dataset(str(tmp_path), "v1", {**settings, "photos": "/new/photos"})


def test_parts_made_with_other_settings_are_deleted(uri: str):
    write_rows(uri, "ab", {**SETTINGS, "seed": 2})
    write_quarantine(uri, "c", {**SETTINGS, "seed": 2})
    write_rows(uri, "d")
    assert finished_keys(uri) == {"d"}
    assert (keys_in(uri, "parts"), keys_in(uri, "quarantine")) == (["d"], [])


def test_the_inventory_of_an_empty_dataset_is_empty(uri: str):
    assert finished_keys(uri) == set()


def test_the_same_rows_make_the_same_file(uri: str):
    write_rows(uri, "ab")
    (part,) = (Path(uri) / "parts").iterdir()
    before = part.read_bytes()
    part.unlink()
    write_rows(uri, "ab")
    assert [path.read_bytes() for path in (Path(uri) / "parts").iterdir()] == [before]


def test_an_existing_part_is_not_written_again(uri: str, files_below: Callable[[str], dict]):
    write_rows(uri, "ab")
    before = files_below(uri)
    write_rows(uri, "ab")
    assert files_below(uri) == before


# Writing missing inputs


def write_missing(uri: str, inputs: str, *passes: str) -> int:
    """Write the keys of each pass until no input is missing, and return the number of passes."""
    pending = iter(passes)
    with Inventory() as inventory:
        add_keys(inventory, inputs)
        Draft(uri, SETTINGS, inventory).write_missing(lambda: write_rows(uri, next(pending)))
    return len(passes) - len(list(pending))


@pytest.mark.parametrize(
    ("passes", "num_passes"),
    [(["ab"], 1), (["ab", "c"], 1), (["a", "b"], 2), (["a", "a", "a", "b"], draft.MAX_PASSES)],
)
def test_inputs_are_written_in_as_many_passes_as_needed_up_to_a_limit(uri: str, passes: list[str], num_passes: int):
    assert write_missing(uri, "ab", *passes) == num_passes


def test_complete_inputs_are_not_written_again(uri: str):
    write_rows(uri, "ab")
    assert write_missing(uri, "ab", "ab") == 0


def test_files_with_duplicate_keys_are_deleted_and_their_other_keys_written_again(uri: str):
    for keys in ("ab", "bc"):
        write_rows(uri, keys)
    with Inventory() as inventory:
        add_keys(inventory, "abc")

        def write_pending() -> None:
            write_rows(uri, [key for table in inventory.pending(10) for key in table["key"].to_pylist()])

        Draft(uri, SETTINGS, inventory).write_missing(write_pending)
    assert publish(uri, "abc").manifest["rows"] == 3


# Withdrawing rows


def test_withdrawn_rows_are_in_quarantine_only(uri: str):
    write_rows(uri, "abc")
    write_rows(uri, "de")
    withdraw(uri, "bde")
    assert (keys_in(uri, "parts"), keys_in(uri, "quarantine")) == (["a", "c"], ["b", "d", "e"])


def test_remaining_rows_are_unchanged(uri: str):
    write_rows(uri, "ab", label="x", image=b"pixels")
    withdraw(uri, "b")
    assert publish(uri, "ab").read(dataset.ROW.names).to_pylist() == [row("a", label="x", image=b"pixels")]


def test_parts_without_withdrawn_rows_are_not_written_again(uri: str):
    write_rows(uri, "ab")
    (part,) = (Path(uri) / "parts").iterdir()
    before = part.stat().st_mtime_ns
    write_rows(uri, "cd")
    withdraw(uri, "c")
    assert part.stat().st_mtime_ns == before


class KilledError(Exception):
    """Simulated SIGKILL."""


@pytest.mark.parametrize("step", range(6))
def test_a_withdrawal_killed_after_any_step_is_finished_when_resumed(
    uri: str, monkeypatch: pytest.MonkeyPatch, step: int
):
    write_rows(uri, "abc")
    write_rows(uri, "de")
    write_rows(uri, "f")
    with monkeypatch.context() as patched:
        kill_after(step, patched)
        with pytest.raises(KilledError):
            withdraw(uri, "bdf")
    # A resumed job syncs its inventory, finishes withdrawals, and searches for leaks again.
    assert finished_keys(uri) == set("abcdef")
    withdraw(uri, [])
    withdraw(uri, [key for key in "bdf" if key in keys_in(uri, "parts")])
    assert (keys_in(uri, "parts"), keys_in(uri, "quarantine")) == (["a", "c", "e"], ["b", "d", "f"])
    assert publish(uri, "abcdef").manifest["rows"] == 3


def kill_after(step: int, patched: pytest.MonkeyPatch) -> None:
    """Raise KilledError at the first write or deletion after `step` of them."""
    calls: list[str] = []
    for name in ("write_bytes", "delete"):
        original = getattr(storage, name)

        def call_or_kill(*args: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            if len(calls) > step:
                raise KilledError
            original(*args)

        patched.setattr(storage, name, call_or_kill)


def test_the_manifest_is_json_with_unescaped_characters(uri: str):
    write_rows(uri, "a", label="Škoda")
    publish(uri, "a", classes=["Škoda"])
    assert json.loads(manifest_path(uri).read_text(encoding="utf-8"))["classes"] == ["Škoda"]
    assert "Škoda" in manifest_path(uri).read_text(encoding="utf-8")
