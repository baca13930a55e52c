"""Matching of labels to photos."""

from typing import Any, NamedTuple

import pytest

from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion import label_matching
from carclass.ingestion.labels import Label
from tests.helpers.inventories import add_keys


class MatchResult(NamedTuple):
    """Labelled photos and rejected inputs."""

    photos: list[Label]
    rejected: list[dict[str, Any]]


def match(keys: list[str], labels: list[Label], source: str = "/data/cars") -> MatchResult:
    with Inventory() as inventory:
        add_keys(inventory, keys)
        inventory.add_labels(labels)
        label_matching.match_labels(inventory, source)
        photos = [
            Label(*(row[name] for name in Label._fields[:3]))
            for table in inventory.pending(100)
            for row in table.to_pylist()
        ]
        rejected = [dict(zip(("key", "reason", "detail"), row[:3], strict=True)) for row in inventory.rejected_inputs()]
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
    with pytest.raises(UserError, match=r"x.jpg is B, but .* the photo p/a/x.jpg is A\."):
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


# Spellings


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("x.jpg", "./x.jpg"),
        ("a/x.jpg", "a//x.jpg"),
        ("a//x.jpg", "a/x.jpg"),
        ("train/x.jpg", "train\\x.jpg"),
        ("train\\x.jpg", "train/x.jpg"),
        ("x.jpg", " x.jpg "),
        ("x.jpg", "x.jpg\t"),
        ("x.jpg", "\u200bx.j\u2060pg\ufeff"),
        ("\u200dx.jpg", "x.jpg"),
        ("Citro\u00ebn.jpg", "Citroe\u0308n.jpg"),
        ("Citroe\u0308n.jpg", "Citro\u00ebn.jpg"),
        ("x.jpg", "/data/cars/x.jpg"),
        ("a/x.jpg", "cars/a/x.jpg"),
        ("a/x.jpg", "file:///data/cars/a/x.jpg"),
        ("a/x.jpg", "/home/other/place/a/x.jpg"),
        ("a/x.jpg", "C:\\Users\\other\\a\\x.jpg"),
        ("a/x.jpg", "s3://bucket/prefix/a/x.jpg"),
        ("x.JPG", "x.jpg"),
        ("a/X.jpg", "x.jpg"),
        ("a/x.jpg", "x"),
        ("x.jpeg", "x.jpg"),
        ("v1.2.png", "v1.2"),
        ("a/00007.jpg", "7"),
        ("00012.jpg", "12.0"),
    ],
)
def test_a_spelling_of_a_key_names_the_photo(key: str, name: str):
    assert match([key, "other.jpg"], [Label(name, "A", "train")]).photos == [Label(key, "A", "train")]


def test_s3_uris_of_labels_are_relative_to_the_source():
    labels = [Label("s3://b/cars_train/1.jpg", "A", "train"), Label("s3://b/cars_test/1.jpg", "B", "test")]
    result = match(["1.jpg"], labels, "s3://b/cars_test/")
    assert result.photos == [Label("1.jpg", "B", "test")]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        pytest.param(["a/x.JPG", "b/x.JPG"], ["x.jpg"], id="case"),
        pytest.param(["x.jpg", "x.png"], ["x"], id="ending"),
        pytest.param(["007.jpg", "07.jpg"], ["7"], id="zeros"),
        pytest.param(["007.jpg", "07.jpg", "0012.jpg"], ["7", "12"], id="zeros of another label"),
        pytest.param(["007.jpg"], ["7", "car 8"], id="zeros of a name that is no number"),
        pytest.param(["1.jpg", "train/2.jpg"], ["train/1.jpg"], id="a missing photo of a folder that exists"),
    ],
)
def test_a_photo_is_never_guessed(keys: list[str], names: list[str]):
    labels = [Label(name, "A", "train") for name in [*names, "train/2.jpg"]]
    assert {photo.key for photo in match(keys, labels).photos} <= {"train/2.jpg"}


def test_two_labels_of_one_spelling_that_differ_name_no_photo():
    result = match(["x.jpg"], [Label("a/x.jpg", "A", "train"), Label("b/x.jpg", "B", "train")])
    assert result.photos == []
    assert [row["reason"] for row in result.rejected] == ["missing_file", "missing_file", "no_label"]


@pytest.mark.parametrize("name", ["000", "0", "000.JPG", "0.jpg", "A/000"])
def test_a_contradicting_label_in_another_spelling_is_refused(name: str):
    with pytest.raises(UserError, match=rf"{name} is Other, but the label a/000.jpg of the photo .* is BMW"):
        match(["a/000.jpg", "a/1.jpg"], [Label("a/000.jpg", "BMW", "train"), Label(name, "Other", "train")])


@pytest.mark.parametrize("name", ["000", "0", "000.JPG"])
def test_an_equal_label_in_another_spelling_is_merged(name: str):
    result = match(["000.jpg"], [Label("000.jpg", "BMW", "train"), Label(name, "BMW", "train")])
    assert result == ([Label("000.jpg", "BMW", "train")], [])


def test_a_missing_photo_with_another_ending_contradicts_none():
    result = match(["x.jpg"], [Label("x.jpg", "A", "train"), Label("x.png", "B", "train")])
    assert [row["detail"] for row in result.rejected] == ["labelled B, no such photo"]


def test_labels_that_differ_and_name_one_photo_by_its_stem_are_ambiguous():
    result = match(["car.jpg"], [Label("car.png", "X", "train"), Label("car.webp", "Y", "train")])
    assert [row["detail"] for row in result.rejected][:2] == [
        f"labelled {label}, ambiguous: other labels fit car.jpg as well" for label in "XY"
    ]


@pytest.mark.parametrize(("name", "key"), [("3", "003.jpg"), ("4.png", "004.jpg")])
def test_a_number_without_its_zeros_among_other_names_gets_a_hint(name: str, key: str):
    result = match([key, "x.jpg"], [Label("x.jpg", "A", "train"), Label(name, "B", "train")])
    assert result.rejected[0]["detail"] == f"labelled B, no such photo (could be {key}, then write its complete name)"


def test_an_exact_key_takes_precedence_over_other_spellings():
    keys = ["X.jpg", "x.jpg", "a//x.jpg"]
    labels = [Label(key, key, "train") for key in keys]
    assert match(keys, labels).photos == sorted(labels)


def test_only_rules_that_matched_labels_are_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        match(["a.jpg", "b.jpg", "c.jpg"], [Label(name, "A", "train") for name in ("a.jpg", "./b.jpg", "./c.jpg")])
    assert caplog.messages == [
        "ingest: 2 of 3 labels matched by the path, normalised: './b.jpg' is the photo 'b.jpg'",
    ]


def test_contradictions_are_listed_together():
    keys = [f"p/a/{i}.jpg" for i in range(7)]
    labels = [Label(f"{folder}{i}.jpg", label, "train") for i in range(7) for folder, label in (("a/", "A"), ("", "B"))]
    with pytest.raises(UserError, match=r"p/a/0.jpg.*p/a/4.jpg.*and 2 more"):
        match(keys, labels)


# Junk


@pytest.mark.parametrize(
    "key",
    ["Thumbs.db", "a/desktop.ini", ".DS_Store", "a/._x.jpg", "__MACOSX/y.jpg", "a/__pycache__/b.pyc", ".git/HEAD",
     "metadata.csv", "README.MD", "a/notes.txt", "Icon\r", "a/y.jpg~", "y.jpg.part", "y.jpg.crdownload", "y.tmp",
     "y.jpg.BAK", "a/.y.jpg.swp", "lost+found/y.jpg", "Thumbs.db/y.jpg", "a/Desktop.ini/y.jpg"],
)  # fmt: skip
def test_a_file_that_is_no_photo_by_its_name_is_junk(key: str):
    assert [row["reason"] for row in match([key, "x.jpg"], [Label("x.jpg", "A", "train")]).rejected] == ["junk"]


@pytest.mark.parametrize("key", ["photo.txt", ".hidden/x.jpg"])
def test_a_file_that_a_label_names_is_not_junk(key: str):
    assert match([key], [Label(key, "A", "train")]).photos == [Label(key, "A", "train")]


def test_junk_makes_no_label_ambiguous():
    result = match(["a/x.jpg", "__MACOSX/a/x.jpg"], [Label("x.jpg", "A", "train")])
    assert [photo.key for photo in result.photos] == ["a/x.jpg"]
