"""Ingestion without a cluster: splits, rows and labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.io import savemat

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import photo, publishing
from carclass.data.inventory import Inventory
from carclass.data.quarantine import PhotoError, Reason
from carclass.errors import UserError
from carclass.ingestion import labels, listing
from carclass.ingestion.archive import LOADED
from carclass.ingestion.ingest import write_loaded
from carclass.ingestion.labels import Label
from carclass.ingestion.reading import to_row
from carclass.ingestion.split import is_held_out
from tests.helpers.inventories import add_keys


def settings(**overrides: Any) -> IngestSettings:
    return IngestSettings(photos="/photos", **overrides)


# Splitting


def ids(count: int) -> list[str]:
    return [storage.sha256(str(i).encode()) for i in range(count)]


def test_the_requested_fraction_is_held_out():
    num_held_out = sum(is_held_out(image_id, 123, 0.2) for image_id in ids(5000))
    assert num_held_out == pytest.approx(1000, abs=100)  # 3.5 standard deviations


def test_the_same_fraction_of_every_class_is_held_out():
    shares = [sum(is_held_out(i, 123, 0.2) for i in ids(10_000)[start::10]) / 1000 for start in range(10)]
    assert shares == pytest.approx([0.2] * 10, abs=0.045)


def test_holding_out_depends_on_content_and_seed_only():
    few = {image_id for image_id in ids(100) if is_held_out(image_id, 1, 0.2)}
    many = {image_id for image_id in ids(1000) if is_held_out(image_id, 1, 0.2)}
    assert few == many & set(ids(100))


def test_a_larger_fraction_holds_out_a_superset():
    smaller, larger = ({i for i in ids(500) if is_held_out(i, 1, fraction)} for fraction in (0.1, 0.3))
    assert smaller < larger


def test_another_seed_holds_out_other_photos():
    first, second = ({i for i in ids(500) if is_held_out(i, seed, 0.2)} for seed in (1, 2))
    assert len(first & second) < len(first) / 2


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (1.0, 200)])
def test_fractions_zero_and_one_hold_out_none_and_all(fraction: float, count: int):
    assert sum(is_held_out(image_id, 1, fraction) for image_id in ids(200)) == count


# Rows


def loaded(data: bytes | None, subset: str = "train") -> dict[str, Any]:
    return {"key": "x.jpg", "label": "A", "subset": subset, "data": data, "error": None if data else "timed out"}


def jpeg(height: int = 40, width: int = 60, seed: int = 0) -> bytes:
    return photo.encode(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_row_contains_the_photo_its_size_and_the_hash_of_its_source():
    data = jpeg()
    row = to_row(loaded(data), settings(val_fraction=0))
    assert row == {
        "image_id": storage.sha256(data),
        "key": "x.jpg",
        "label": "A",
        "split": "train",
        "width": 60,
        "height": 40,
        "image": data,
    }


def test_a_large_photo_is_shrunk_and_keeps_the_hash_of_its_source():
    data = jpeg()
    row = to_row(loaded(data), settings(max_side=30))
    assert (row["width"], row["height"], row["image_id"]) == (30, 20, storage.sha256(data))
    assert photo.decode(row["image"]).shape == (20, 30, 3)


@pytest.mark.parametrize(("subset", "split"), [("train", "val"), ("test", "test")])
def test_only_train_photos_are_held_out(subset: str, split: str):
    assert to_row(loaded(jpeg(), subset), settings(val_fraction=1))["split"] == split


def test_copies_are_in_the_same_split():
    rows = [to_row(loaded(jpeg(seed=seed)), settings(val_fraction=0.5)) for seed in (*range(20), *range(20))]
    assert [row["split"] for row in rows[:20]] == [row["split"] for row in rows[20:]]


def test_a_storage_error_makes_a_photo_unreadable():
    with pytest.raises(PhotoError, match="unreadable: timed out"):
        to_row(loaded(None), settings())


def test_a_batch_is_written_as_a_part_and_a_part_of_quarantine(tmp_path: Path):
    sources = [loaded(jpeg()), {**loaded(b"text"), "key": "y.jpg"}, {**loaded(None), "key": "z.jpg"}]
    batch = pa.Table.from_pylist(sources, LOADED)
    (part, rows), (quarantine, _) = write_loaded(batch, str(tmp_path), settings(val_fraction=0), {})
    rejected = publishing.read_written(str(tmp_path), "quarantine", ["key", "image_id", "reason", "attempts"]).drop(
        ["part"]
    )
    assert (part.split("/")[0], quarantine.split("/")[0]) == ("parts", "quarantine")
    assert rows.select(["key", "label", "split"]).to_pylist() == [{"key": "x.jpg", "label": "A", "split": "train"}]
    assert publishing.read_written(str(tmp_path), "parts", ["key"])["key"].to_pylist() == ["x.jpg"]
    assert rejected.to_pylist() == [
        {"key": "y.jpg", "image_id": storage.sha256(b"text"), "reason": Reason.NOT_AN_IMAGE, "attempts": 1},
        {"key": "z.jpg", "image_id": None, "reason": Reason.UNREADABLE, "attempts": 1},
    ]


# Listing photos


def listed(photos: str) -> list[str]:
    with Inventory() as inventory:
        listing.list_photos(photos, inventory)
        return list(inventory.keys())


@pytest.mark.parametrize("name", ["missing", "missing.tgz", "s.tar"])
def test_missing_photos_are_reported(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"`ingest.photos`: no (files in|archive) .*{name}"):
        listed(str(tmp_path / name))


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"`ingest.photos`: no files in"):
        listed(str(tmp_path))


# Reading labels


def labels_of(ingest_settings: IngestSettings, keys: list[str]) -> list[Label]:
    with Inventory() as inventory:
        add_keys(inventory, keys)
        return [label for _, label in labels.read_labels(ingest_settings, inventory)]


def test_a_csv_is_read(tmp_path: Path):
    (tmp_path / "labels.csv").write_text("img_name,class,subset\nx.jpg,A,train\n")
    assert labels_of(settings(labels=str(tmp_path / "labels.csv")), []) == [Label("x.jpg", "A", "train")]


def test_a_csv_without_the_columns_is_refused_with_its_columns(tmp_path: Path):
    (tmp_path / "labels.csv").write_text("file,class\nx.jpg,A\n")
    with pytest.raises(
        UserError, match=r"labels.csv: no column img_name, subset; the first line has \['file', 'class'\]"
    ):
        labels_of(settings(labels=str(tmp_path / "labels.csv")), [])


@pytest.mark.parametrize("name", ["labels.csv", "devkit"])
def test_missing_labels_are_reported_with_a_remedy(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"`ingest.labels`: .*{name}.* cannot be read .*Set it to a .csv"):
        labels_of(settings(labels=str(tmp_path / name)), [])


def test_without_labels_the_class_is_the_photos_folder():
    assert labels_of(settings(), ["train/A/x.jpg", "test/B/y.jpg"]) == [
        Label("test/B/y.jpg", "B", "test"),
        Label("train/A/x.jpg", "A", "train"),
    ]


def test_without_labels_photos_outside_class_folders_are_refused():
    with pytest.raises(UserError, match="/photos: no class folders"):
        labels_of(settings(), ["x.jpg"])


def annotations(names: list[str]) -> np.ndarray:
    fields = [("class", np.uint8), ("fname", object)]
    return np.array([(i + 1, name) for i, name in enumerate(names)], fields)


def test_keys_of_stanfords_devkit_include_the_folders_of_its_archives(tmp_path: Path):
    savemat(tmp_path / "cars_meta.mat", {"class_names": np.array(["A", "B"], object)})
    for name in ("cars_train_annos", "cars_test_annos_withlabels"):
        savemat(tmp_path / f"{name}.mat", {"annotations": annotations(["00001.jpg", "00002.jpg"])})
    assert labels_of(settings(labels=str(tmp_path)), []) == [
        Label("cars_train/00001.jpg", "A", "train"),
        Label("cars_train/00002.jpg", "B", "train"),
        Label("cars_test/00001.jpg", "A", "test"),
        Label("cars_test/00002.jpg", "B", "test"),
    ]


def test_test_labels_of_the_devkit_are_optional(tmp_path: Path):
    savemat(tmp_path / "cars_meta.mat", {"class_names": np.array(["A", "B"], object)})
    savemat(tmp_path / "cars_train_annos.mat", {"annotations": annotations(["00001.jpg", "00002.jpg"])})
    assert {item.subset for item in labels_of(settings(labels=str(tmp_path)), [])} == {"train"}
