"""What is decided of all photos together: whose a label is, and which photos spoil a measurement."""

from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import label_matching
from carclass.ingestion.labels import Label

SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "image_id", "label", "split")])


class Plan(NamedTuple):
    """What comes of keys and labels."""

    photos: list[Label]
    rejected: list[dict[str, Any]]


def match(keys: list[str], labels: list[Label]) -> Plan:
    with Inventory() as inventory:
        inventory.add_inputs(keys)
        inventory.add_labels(labels)
        label_matching.match_labels(inventory)
        photos = [Label(**row) for table in inventory.pending(100) for row in table.to_pylist()]
        rejected = [dict(zip(("key", "reason", "detail"), row, strict=True)) for row in inventory.rejected_inputs()]
    return Plan(sorted(photos), rejected)


# Matching labels and photos


def test_a_label_names_a_photo_by_its_whole_key():
    plan = match(["train/x.jpg", "test/x.jpg"], [Label("test/x.jpg", "A", "test")])
    assert plan.photos == [Label("test/x.jpg", "A", "test")]


def test_a_label_names_a_photo_by_the_end_of_its_path():
    plan = match(["photos/train/x.jpg", "photos/train/y.jpg"], [Label("train/x.jpg", "A", "train")])
    assert plan.photos == [Label("photos/train/x.jpg", "A", "train")]


def test_the_end_of_a_path_begins_at_a_slash():
    keys = ["old-train/x.jpg", "max.jpg"]
    assert match(keys, [Label("train/x.jpg", "A", "train"), Label("ax.jpg", "A", "train")]).photos == []


def test_a_whole_key_wins_over_the_end_of_another_path():
    plan = match(["x.jpg", "old/x.jpg"], [Label("x.jpg", "A", "train")])
    assert [item.key for item in plan.photos] == ["x.jpg"]


def test_a_label_that_fits_two_photos_names_none_of_them():
    plan = match(["a/x.jpg", "b/x.jpg"], [Label("x.jpg", "A", "train")])
    assert plan.photos == []
    assert {row["key"]: row["reason"] for row in plan.rejected} == {
        "x.jpg": "missing_file",
        "a/x.jpg": "no_label",
        "b/x.jpg": "no_label",
    }
    assert plan.rejected[0]["detail"] == "2 photos have this name"


def test_a_label_without_a_photo_and_a_photo_without_a_label_are_kept_as_rejected():
    plan = match(["x.jpg"], [Label("y.jpg", "A", "train")])
    assert [(row["key"], row["reason"]) for row in plan.rejected] == [("y.jpg", "missing_file"), ("x.jpg", "no_label")]


def test_two_labels_that_contradict_each_other_on_one_photo_are_refused():
    with pytest.raises(UserError, match=r"x.jpg is B \(train\), but .* the photo p/a/x.jpg is A \(train\)"):
        match(["p/a/x.jpg"], [Label("a/x.jpg", "A", "train"), Label("x.jpg", "B", "train")])


def test_two_labels_that_agree_on_one_photo_are_one():
    plan = match(["p/a/x.jpg"], [Label("a/x.jpg", "A", "train"), Label("x.jpg", "A", "train")])
    assert plan.photos == [Label("p/a/x.jpg", "A", "train")]


def test_every_photo_and_every_lone_label_is_somewhere_once():
    keys = [f"{folder}/{i}.jpg" for folder in "ab" for i in range(20)]
    found = [Label(f"a/{i}.jpg", "A", "train") for i in range(10)] + [Label(f"{i}.jpg", "B", "test") for i in (12, 99)]
    plan = match(keys, found)
    everywhere = [item.key for item in plan.photos] + [row["key"] for row in plan.rejected]
    assert sorted(everywhere) == sorted([*keys, "12.jpg", "99.jpg"])


# Leakage


def found(*rows: tuple[str, str, str, str]) -> list[dict[str, Any]]:
    """Rows of quarantine. rows: key, image_id, label, split of what is written."""
    with Inventory() as inventory:
        inventory.add_part(
            "parts/a.parquet", pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
        )
        inventory.commit_parts(removed=[])
        return [row for _, row in label_matching.find_leaks(inventory)]


def leaks(*rows: tuple[str, str, str, str]) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in found(*rows)}


def test_a_train_photo_that_is_also_a_test_photo_leaks_and_the_test_photo_stays():
    assert leaks(("a", "1", "A", "train"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_a_val_photo_that_is_also_a_test_photo_leaks():
    assert leaks(("a", "1", "A", "val"), ("b", "1", "A", "test")) == {"a": "leakage"}


def test_the_same_bytes_under_two_labels_are_a_conflict_of_all_of_them():
    rows = [("a", "1", "A", "train"), ("b", "1", "B", "train"), ("c", "1", "A", "train")]
    assert leaks(*rows) == dict.fromkeys("abc", "label_conflict")


def test_copies_under_one_label_stay():
    assert leaks(("a", "1", "A", "train"), ("b", "1", "A", "train"), ("c", "2", "B", "train")) == {}


def test_test_photos_are_never_touched():
    assert leaks(("a", "1", "A", "test"), ("b", "1", "B", "test")) == {}


def test_a_leak_says_which_photo_it_repeats():
    (row,) = found(("a.jpg", "1", "A", "train"), ("b.jpg", "1", "A", "test"))
    assert row["detail"] == "same bytes as the test photo b.jpg"


def test_a_conflict_says_which_photos_it_repeats():
    row = found(("a.jpg", "1", "A", "train"), ("c.jpg", "1", "A", "train"), ("b.jpg", "1", "B", "val"))[0]
    assert (row["key"], row["detail"]) == ("a.jpg", "same bytes as b.jpg, c.jpg, other label")


def test_of_a_placeholder_used_a_thousand_times_a_conflict_names_a_few():
    row = found(*((f"{i:04}", "1", f"class {i}", "train") for i in range(1011)))[-1]
    assert row["detail"].endswith("0008, 0009 and 1,000 more, other label")


def test_a_photo_in_quarantine_spoils_nothing():
    with Inventory() as inventory:
        rows = {"key": ["a"], "image_id": ["1"], "label": ["A"], "split": ["train"]}
        inventory.add_part("parts/a.parquet", pa.table(rows))
        inventory.add_part("quarantine/a.parquet", pa.table({"key": ["b"], "image_id": ["1"], "reason": ["corrupt"]}))
        inventory.commit_parts(removed=[])
        assert list(label_matching.find_leaks(inventory)) == []
