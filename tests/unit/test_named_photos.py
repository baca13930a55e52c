"""Photos that are named one by one: which places are photos, and what is printed."""

from pathlib import Path
from typing import Any

import pytest

from carclass.errors import UserError
from carclass.prediction.named_photos import describe_rows, find_photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with files of no content."""
    for name in ("a.jpg", "b.HEIC", "list.csv", "photos.zip"):
        (tmp_path / name).touch()
    (tmp_path / "new").mkdir()
    return tmp_path


@pytest.mark.parametrize("names", [["a.jpg"], ["a.jpg", "b.HEIC"], ["list.csv"]])
def test_files_are_photos(folder: Path, names: list[str]):
    places = [str(folder / name) for name in names]
    assert find_photos(places) == places


@pytest.mark.parametrize("name", ["new", "new/", "photos.zip", "photos.zip!/cars", "lost.tgz"])
def test_a_folder_or_an_archive_is_no_photo(folder: Path, name: str):
    assert find_photos([f"{folder}/{name}"]) == []


def test_a_bucket_is_no_photo():
    assert find_photos(["s3://cars"]) == []


def test_a_path_that_is_too_long_is_refused(folder: Path):
    with pytest.raises(UserError, match="no photo, folder or archive"):
        find_photos([f"{folder}/{'x' * 300}"])


@pytest.mark.parametrize("name", ["new", "photos.zip"])
def test_photos_and_other_places_are_not_mixed(folder: Path, name: str):
    with pytest.raises(UserError, match=rf"{name} is not a photo, but a folder"):
        find_photos([f"{folder}/a.jpg", f"{folder}/{name}"])


def test_two_folders_are_refused(folder: Path):
    with pytest.raises(UserError, match="is not a photo, but a folder"):
        find_photos([f"{folder}/new", f"{folder}/new"])


@pytest.mark.parametrize("names", [["lost.jpg"], ["a.jpg", "*.png"], ["lost"]])
def test_a_place_without_anything_is_named(folder: Path, names: list[str]):
    with pytest.raises(UserError, match=rf"no photo, folder or archive {folder}/(lost|\*)"):
        find_photos([f"{folder}/{name}" for name in names])


def test_an_object_is_a_photo_and_a_prefix_is_not(bucket: str, s3: Any):
    s3.put_object(Bucket=bucket, Key="new/car.jpg", Body=b"x")
    assert find_photos([f"s3://{bucket}/new/car.jpg"]) == [f"s3://{bucket}/new/car.jpg"]
    assert find_photos([f"s3://{bucket}/new"]) == []
    assert find_photos([f"s3://{bucket}/new/"]) == []


def row(key: str = "a.jpg", **changes: Any) -> dict[str, Any]:
    top = {"label": "one", "top5": ["one", "two"], "top5_probabilities": [0.75, 0.25]}
    return {"key": key, "rejected": False, "reason": None, "detail": None, **top, **changes}


def test_of_one_photo_all_of_the_likeliest_classes_are_printed():
    assert describe_rows([row()]) == [("a.jpg", "0.750  one"), ("", "0.250  two")]


def test_of_several_photos_the_likeliest_class_is_printed():
    assert describe_rows([row(), row("b.jpg")]) == [("a.jpg", "0.750  one"), ("b.jpg", "0.750  one")]


def test_a_rejected_photo_is_marked():
    assert describe_rows([row(rejected=True)])[0] == ("a.jpg", "0.750  one  (rejected: below the threshold)")


def test_a_photo_that_failed_has_its_reason():
    failed = {"label": None, "reason": "not_an_image", "detail": "it starts with \x1b"}
    assert describe_rows([row(**failed)]) == [("a.jpg", r"not_an_image: it starts with \x1b")]
