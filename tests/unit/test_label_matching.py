"""Matching of labels to photos, label conflicts and leakage."""

from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import label_matching
from carclass.ingestion.labels import Label
from tests.helpers.inventories import add_keys

SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "image_id", "label", "split")])


class MatchResult(NamedTuple):
    """Labelled photos and rejected inputs."""

    photos: list[Label]
    rejected: list[dict[str, Any]]


def match(keys: list[str], labels: list[Label]) -> MatchResult:
    with Inventory() as inventory:
        add_keys(inventory, keys)
        inventory.add_labels(labels)
        label_matching.match_labels(inventory)
        photos = [
            Label(*(row[name] for name in Label._fields))
            for table in inventory.pending(100)
            for row in table.to_pylist()
        ]
        rejected = [dict(zip(("key", "reason", "detail"), row, strict=True)) for row in inventory.rejected_inputs()]
    return MatchResult(sorted(photos), rejected)


# Matching labels and photos


def test_a_label_matches_a_photo_by_its_complete_key():
    result = match(["train/x.jpg", "test/x.jpg"], [Label("test/x.jpg", "A", "test")])
    assert result.photos == [Label("test/x.jpg", "A", "test")]


def test_a_label_matches_a_photo_by_the_end_of_its_path():
    result = match(["photos/train/x.jpg", "photos/train/y.jpg"], [Label("train/x.jpg", "A", "train")])
    assert result.photos == [Label("photos/train/x.jpg", "A", "train")]


def test_the_end_of_a_path_starts_after_a_slash():
    keys = ["old-train/x.jpg", "max.jpg"]
    assert match(keys, [Label("train/x.jpg", "A", "train"), Label("ax.jpg", "A", "train")]).photos == []


def test_a_complete_key_takes_precedence_over_the_end_of_another_path():
    result = match(["x.jpg", "old/x.jpg"], [Label("x.jpg", "A", "train")])
    assert [item.key for item in result.photos] == ["x.jpg"]


def test_a_label_that_matches_two_photos_is_assigned_to_neither():
    result = match(["a/x.jpg", "b/x.jpg"], [Label("x.jpg", "A", "train")])
    assert result.photos == []
    assert {row["key"]: row["reason"] for row in result.rejected} == {
        "x.jpg": "missing_file",
        "a/x.jpg": "no_label",
        "b/x.jpg": "no_label",
    }
    assert result.rejected[0]["detail"] == "2 photos have this name"


def test_labels_without_a_photo_and_photos_without_a_label_are_rejected():
    result = match(["x.jpg"], [Label("y.jpg", "A", "train")])
    assert [(row["key"], row["reason"]) for row in result.rejected] == [
        ("y.jpg", "missing_file"),
        ("x.jpg", "no_label"),
    ]


def test_contradicting_labels_of_a_photo_are_refused():
    with pytest.raises(UserError, match=r"x.jpg is B \(train\), but .* the photo p/a/x.jpg is A \(train\)"):
        match(["p/a/x.jpg"], [Label("a/x.jpg", "A", "train"), Label("x.jpg", "B", "train")])


def test_equal_labels_of_a_photo_are_merged():
    result = match(["p/a/x.jpg"], [Label("a/x.jpg", "A", "train"), Label("x.jpg", "A", "train")])
    assert result.photos == [Label("p/a/x.jpg", "A", "train")]


def test_every_photo_and_every_unmatched_label_appears_once():
    keys = [f"{folder}/{i}.jpg" for folder in "ab" for i in range(20)]
    labels = [Label(f"a/{i}.jpg", "A", "train") for i in range(10)] + [Label(f"{i}.jpg", "B", "test") for i in (12, 99)]
    result = match(keys, labels)
    everywhere = [item.key for item in result.photos] + [row["key"] for row in result.rejected]
    assert sorted(everywhere) == sorted([*keys, "12.jpg", "99.jpg"])


# Leakage


def leak_rows(*rows: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    """Return the quarantine rows of leaks. rows: (key, image_id, label, split) of written rows."""
    with Inventory() as inventory:
        inventory.add_part(
            "parts/a.parquet", pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
        )
        inventory.commit_parts(removed=[])
        return [row for _, row in label_matching.find_leaks(inventory)]


def leak_reasons(*rows: tuple[str, str, str, str]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in leak_rows(*rows)}


def test_a_train_photo_with_the_bytes_of_a_test_photo_leaks_and_the_test_photo_stays():
    assert leak_reasons(("a", "1", "A", "train"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_a_val_photo_with_the_bytes_of_a_test_photo_leaks():
    assert leak_reasons(("a", "1", "A", "val"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_all_copies_of_a_photo_with_two_labels_are_in_conflict():
    rows = [("a", "1", "A", "train"), ("b", "1", "B", "train"), ("c", "1", "A", "train")]
    assert leak_reasons(*rows) == dict.fromkeys("abc", "label_conflict")


def test_copies_with_one_label_stay():
    assert leak_reasons(("a", "1", "A", "train"), ("b", "1", "A", "train"), ("c", "2", "B", "train")) == {}


def test_test_photos_are_never_quarantined():
    assert leak_reasons(("a", "1", "A", "test"), ("b", "1", "B", "test")) == {}


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
        rows = {"key": ["a"], "image_id": ["1"], "label": ["A"], "split": ["train"]}
        inventory.add_part("parts/a.parquet", pa.table(rows))
        inventory.add_part("quarantine/a.parquet", pa.table({"key": ["b"], "image_id": ["1"], "reason": ["corrupt"]}))
        inventory.commit_parts(removed=[])
        assert list(label_matching.find_leaks(inventory)) == []
