"""Labels from a tree with one folder per class."""

import pytest

from carclass.ingestion.folder_labels import parse_folders
from carclass.ingestion.labels import Label, LabelsError


def folder_labels(*keys: str) -> list[Label]:
    return [label for _, label in parse_folders(lambda: keys, source="s3://cars")]


def test_photos_in_class_folders_are_train():
    assert folder_labels("Audi/1.jpg", "BMW/1.jpg") == [
        Label("Audi/1.jpg", "Audi", "train"),
        Label("BMW/1.jpg", "BMW", "train"),
    ]


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "testing")]
)
def test_subset_folders_contain_class_folders(train: str, test: str):
    keys = f"{train}/Audi/1.jpg", f"{test}/Audi/2.jpg"
    assert folder_labels(*keys) == [Label(keys[0], "Audi", "train"), Label(keys[1], "Audi", "test")]


def test_folders_in_two_unicode_forms_are_one_class():
    assert {label.label for label in folder_labels("Citro\u00ebn/1.jpg", "Citroe\u0308n/2.jpg")} == {"Citro\u00ebn"}


@pytest.mark.parametrize(
    ("shared", "subset"), [("cars/", ""), ("a/b/", ""), ("dataset/", "train/"), ("car_data/car_data/", "train/")]
)
def test_folders_that_all_photos_share_are_no_classes(shared: str, subset: str):
    labels = folder_labels(f"{shared}{subset}Audi/1.jpg", f"{shared}{subset}BMW/2.jpg", "README.md", "logo.jpg")
    assert [label.label for label in labels] == ["Audi", "BMW"]


@pytest.mark.parametrize(
    "key",
    ["README.txt", ".DS_Store", "Audi/.DS_Store", ".cache/Audi/2.jpg", "train/Thumbs.db", "train/desktop.ini",
     "metadata.csv", "docs/metadata.csv", "a/b/c/__pycache__/x.pyc", "__MACOSX/train/Audi/._1.jpg", "x.jpg",
     "train/x.jpg", "../x.jpg"],
)  # fmt: skip
def test_other_files_get_no_label(key: str):
    assert folder_labels("train/Audi/1.jpg", key) == [Label("train/Audi/1.jpg", "Audi", "train")]


def test_double_slashes_make_no_folders():
    assert [label.label for label in folder_labels("Audi//1.jpg", "/BMW/2.jpg")] == ["Audi", "BMW"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no class folders"),
        (["1.jpg", "2.jpg"], "s3://cars: no class folders"),
        (["val/Audi/1.jpg"], "val/Audi/1.jpg: the subset is 'val'; use train"),
        (["Val/Audi/1.jpg", "train/Audi/1.jpg"], "the subset is 'Val'; use train"),
        (["cars/Audi/1.jpg", "bikes/BMW/2.jpg"], "the subset is 'cars'; expected train or test"),
        (["train/1.jpg", "Valid/2.jpg"], "train/1.jpg is outside of a class folder; expected"),
        (["Audi/1.jpg", "Ram C/V Van/2.jpg"], "found Audi/1.jpg and Ram C/V Van/2.jpg.*class name with a slash"),
        (["train/Ram C/V Van/2.jpg"], "found train/Ram C/V Van/2.jpg"),
    ],
)
def test_other_trees_are_refused_with_the_location(keys: list[str], message: str):
    with pytest.raises(LabelsError, match=message):
        folder_labels(*keys)
