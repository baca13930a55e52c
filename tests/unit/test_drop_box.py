"""Predictions of a folder that changes: which photos are predicted again, and which rows stay."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from carclass import storage
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.ingestion.folder_listing import file_version
from carclass.ingestion.listing import list_photos
from carclass.prediction import predictions
from carclass.prediction.predict import _remove_outdated

SETTINGS = {"threshold": 0.5}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """Return a folder of three photos, whose rows are written to the folder `out` beside it."""
    folder = tmp_path / "box"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode())
    write(folder)
    return folder


def write(box: Path, settings: dict[str, object] = SETTINGS, *, fingerprints: bool = True) -> None:
    """Write a part with the rows of all photos of a folder."""
    rows = []
    for path in sorted(box.iterdir()):
        status = path.stat()
        fingerprint = Listed(path.name, status.st_size, file_version(status)).fingerprint
        row = {"key": path.name, "image_id": storage.sha256(path.read_bytes()), "label": "one", "rejected": False}
        rows.append({**row, "fingerprint": fingerprint if fingerprints else None})
    predictions.write_batch(pa.Table.from_pylist(rows, predictions.PREDICTED), str(box.parent / "out"), settings)


def pending(box: Path, settings: dict[str, object] = SETTINGS) -> list[str]:
    """Return the photos that the next job predicts."""
    with Inventory() as inventory:
        list_photos(str(box), inventory, "predict.photos")
        draft = Draft(str(box.parent / "out"), settings, inventory)
        _remove_outdated(draft, str(box), inventory.digest())
        return sorted(key for batch in inventory.pending(10) for key in batch["key"].to_pylist())


def written(box: Path) -> list[str]:
    with Inventory() as inventory:
        Draft(str(box.parent / "out"), SETTINGS, inventory).sync()
        return [key for key, _ in inventory.files_by_key()]


def test_without_changes_nothing_is_predicted(box: Path):
    assert pending(box) == []


def test_new_photos_are_predicted_alone(box: Path):
    (box / "d").write_bytes(b"d")
    assert pending(box) == ["d"]
    assert written(box) == ["a", "b", "c"]


def test_a_photo_with_other_content_is_predicted_again(box: Path):
    (box / "b").write_bytes(b"another photo")
    assert pending(box) == ["b"]
    assert written(box) == ["a", "c"]


def test_a_photo_with_other_content_of_the_same_size_and_time_of_modification_is_predicted_again(box: Path):
    status = (box / "b").stat()
    (box / "b").write_bytes(b"B")
    os.utime(box / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pending(box) == ["b"]


def test_photos_that_exchange_their_names_are_predicted_again(tmp_path: Path):
    box = tmp_path / "box"
    box.mkdir()
    for name in "bc":
        (box / name).write_bytes(name.encode())
        os.utime(box / name, ns=(1, 1))
    write(box)
    for old, new in ("bx", "cb", "xc"):
        (box / old).rename(box / new)
    assert pending(box) == ["b", "c"]


def test_a_photo_of_the_same_content_is_not_predicted_again(box: Path):
    os.utime(box / "b", ns=(1, 1))
    assert pending(box) == []


def test_the_row_of_a_photo_that_is_gone_stays(box: Path):
    (box / "b").unlink()
    assert pending(box) == []
    assert written(box) == ["a", "b", "c"]


def test_a_renamed_photo_has_a_row_of_its_own(box: Path):
    (box / "b").rename(box / "z")
    assert pending(box) == ["z"]
    assert written(box) == ["a", "b", "c"]


def test_rows_of_the_first_format_stay_where_the_content_is_the_same(tmp_path: Path):
    box = tmp_path / "box"
    box.mkdir()
    for name in "ab":
        (box / name).write_bytes(name.encode())
    write(box, fingerprints=False)
    (box / "b").write_bytes(b"another photo")
    assert pending(box) == ["b"]


def test_rows_of_the_first_format_stay_if_the_list_is_the_same(tmp_path: Path):
    box = tmp_path / "box"
    box.mkdir()
    (box / "a").write_bytes(b"a")
    with Inventory() as inventory:
        list_photos(str(box), inventory, "predict.photos")
        settings = {**SETTINGS, predictions.LISTING: inventory.digest()}
    write(box, settings, fingerprints=False)
    assert pending(box, settings) == []
