"""Leakage and label conflicts of photos with the same bytes."""

from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.data.inventory import Inventory
from carclass.ingestion import leakage

SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "image_id", "label", "split")])


ID = storage.sha256(b"1")


def written(*rows: tuple[str, str, str, str]) -> pa.Table:
    """Return written rows of (key, content, label, split)."""
    columns = [(key, storage.sha256(content.encode()), label, split) for key, content, label, split in rows]
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in columns], SCHEMA)


def leak_rows(*rows: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    """Return the quarantine rows of leaks. rows: see `written`."""
    with Inventory() as inventory:
        inventory.add_numbered_inputs((i, key, "", label, subset) for i, (key, _, label, subset) in enumerate(rows))
        inventory.add_part("parts/a.parquet", written(*rows), "")
        inventory.commit_parts(removed=[])
        return [row for _, row in leakage.find_leaks(inventory)]


def leak_reasons(*rows: tuple[str, str, str, str]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in leak_rows(*rows)}


def test_a_train_photo_with_the_bytes_of_a_test_photo_leaks_and_the_test_photo_stays():
    assert leak_reasons(("a", "1", "A", "train"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_a_val_photo_with_the_bytes_of_a_test_photo_leaks():
    assert leak_reasons(("a", "1", "A", "val"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_a_train_photo_with_the_bytes_of_a_val_photo_of_the_source_leaks_and_the_val_photo_stays():
    (row,) = leak_rows(("a", "1", "A", "train"), ("b", "1", "A", "val"))
    assert (row["key"], row["reason"], row["detail"]) == ("a", "leakage", "same bytes as the val photo b")


def test_copies_within_a_val_split_of_the_source_stay():
    assert leak_reasons(("a", "1", "A", "val"), ("b", "1", "A", "val")) == {}


def test_all_copies_of_a_photo_with_two_labels_are_in_conflict():
    rows = [("a", "1", "A", "train"), ("b", "1", "B", "train"), ("c", "1", "A", "train")]
    assert leak_reasons(*rows) == dict.fromkeys("abc", "label_conflict")


def test_copies_with_one_label_stay():
    assert leak_reasons(("a", "1", "A", "train"), ("b", "1", "A", "train"), ("c", "2", "B", "train")) == {}


def test_test_photos_are_never_quarantined():
    assert leak_reasons(("a", "1", "A", "test"), ("b", "1", "B", "test")) == {}


def test_a_leak_records_the_hash_of_its_content():
    (row,) = leak_rows(("a.jpg", "1", "A", "train"), ("b.jpg", "1", "A", "test"))
    assert row["image_id"] == ID


def test_the_detail_of_a_leak_names_the_test_photo():
    (row,) = leak_rows(("a.jpg", "1", "A", "train"), ("b.jpg", "1", "A", "test"))
    assert row["detail"] == "same bytes as the test photo b.jpg"


def test_the_detail_of_a_conflict_names_the_copies():
    row = leak_rows(("a.jpg", "1", "A", "train"), ("c.jpg", "1", "A", "train"), ("b.jpg", "1", "B", "val"))[0]
    assert (row["key"], row["detail"]) == ("a.jpg", "same bytes as b.jpg, c.jpg, other label")


def test_the_detail_of_a_conflict_names_a_few_of_many_copies():
    row = leak_rows(*((f"{i:04}", "1", f"class {i}", "train") for i in range(1011)))[-1]
    assert row["detail"].endswith("0008, 0009 and 1,000 more, other label")


def test_quarantined_photos_cause_no_leaks():
    with Inventory() as inventory:
        inventory.add_numbered_inputs([(1, "a", "", "A", "train"), (2, "b", "", "A", "train")])
        rows = {"key": ["a"], "image_id": [ID], "label": ["A"], "split": ["train"]}
        inventory.add_part("parts/a.parquet", pa.table(rows), "")
        inventory.add_part(
            "quarantine/a.parquet", pa.table({"key": ["b"], "image_id": [ID], "reason": ["corrupt"]}), ""
        )
        inventory.commit_parts(removed=[])
        assert list(leakage.find_leaks(inventory)) == []


def test_test_photos_under_two_labels_are_found():
    rows = [("a", "1", "A", "test"), ("b", "1", "B", "test"), ("c", "2", "A", "test"), ("d", "2", "A", "test")]
    with Inventory() as inventory:
        inventory.add_part("parts/a", written(*rows), "")
        inventory.commit_parts(removed=[])
        assert list(leakage.find_test_conflicts(inventory)) == [("a", "b")]
