"""Ingestion without a cluster: rows and labels."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.io import savemat

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import photo, publishing
from carclass.data.inventory import INPUT, Inventory
from carclass.data.quarantine import PhotoError, Reason
from carclass.errors import UserError
from carclass.ingestion import labelling, listing, reading
from carclass.ingestion.archive import LOADED
from carclass.ingestion.ingest import write_photos
from carclass.ingestion.labels import Label
from carclass.ingestion.reading import to_row
from tests.helpers.inventories import add_keys, run_all


def settings(**overrides: Any) -> IngestSettings:
    return IngestSettings(photos="/photos", **overrides)


# Rows


def loaded(data: bytes | None, subset: str = "train") -> dict[str, Any]:
    error = None if data else "timed out"
    return {"key": "x.jpg", "label": "A", "subset": subset, "fingerprint": "f", "data": data, "error": error}


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
        "fingerprint": "f",
    }


def test_a_large_photo_is_shrunk_and_keeps_the_hash_of_its_source():
    data = jpeg()
    row = to_row(loaded(data), settings(max_side=30))
    assert (row["width"], row["height"], row["image_id"]) == (30, 20, storage.sha256(data))
    assert photo.decode(row["image"]).shape == (20, 30, 3)


@pytest.mark.parametrize("subset", ["train", "val", "test"])
def test_a_row_is_read_into_the_split_of_its_subset(subset: str):
    assert to_row(loaded(jpeg(), subset), settings())["split"] == subset


def test_image_ids_are_those_of_rows(tmp_path: Path):
    data = jpeg()
    Path(tmp_path, "a.jpg").write_bytes(data)
    inputs = [{"key": key, "size": 1, "fingerprint": "f"} for key in ("a.jpg", "gone.jpg")]
    sources = pa.Table.from_pylist(inputs, INPUT)
    row = to_row(loaded(data), settings())
    assert reading.read_image_ids(sources, str(tmp_path)) == [("a.jpg", row["image_id"]), ("gone.jpg", None)]


def test_a_storage_error_makes_a_photo_unreadable():
    with pytest.raises(PhotoError, match="unreadable: timed out"):
        to_row(loaded(None), settings())


def test_a_batch_is_written_as_a_part_and_a_part_of_quarantine(tmp_path: Path):
    sources = [loaded(jpeg()), {**loaded(b"text"), "key": "y.jpg"}, {**loaded(None), "key": "z.jpg"}]
    batch = pa.Table.from_pylist(sources, LOADED)
    part, quarantine = write_photos(batch, str(tmp_path), settings(val_fraction=0), {}, run_all)
    rejected = publishing.read_written(str(tmp_path), "quarantine", ["key", "image_id", "reason", "attempts"]).drop(
        ["part"]
    )
    assert (part.path.split("/")[0], quarantine.path.split("/")[0]) == ("parts", "quarantine")
    assert part.rows.select(["key", "label", "split"]).to_pylist() == [{"key": "x.jpg", "label": "A", "split": "train"}]
    assert publishing.read_written(str(tmp_path), "parts", ["key"])["key"].to_pylist() == ["x.jpg"]
    assert rejected.to_pylist() == [
        {"key": "y.jpg", "image_id": storage.sha256(b"text"), "reason": Reason.NOT_AN_IMAGE, "attempts": 1},
        {"key": "z.jpg", "image_id": None, "reason": Reason.UNREADABLE, "attempts": 1},
    ]


def test_large_photos_are_written_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(publishing, "PART_BYTES", 2 * len(jpeg()))
    batch = pa.Table.from_pylist([{**loaded(jpeg(seed=i)), "key": f"{i}.jpg"} for i in range(5)], LOADED)
    written = write_photos(batch, str(tmp_path), settings(), {}, run_all)
    assert [len(part.rows) for part in written] == [2, 2, 1]


def test_photos_are_read_while_earlier_ones_are_converted(tmp_path: Path):
    for i in range(100):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed=i))
    rows = [
        {"key": f"{i}.jpg", "label": "A", "subset": "test", "size": storage.PREFETCH_BYTES // 4} for i in range(100)
    ]
    photos = reading.load_photos(pa.Table.from_pylist(rows, INPUT), str(tmp_path), range(100))
    assert next(photos)["data"] == jpeg(seed=0)
    (tmp_path / "50.jpg").unlink()  # not read yet
    assert [row["key"] for row in photos if row["data"] is None] == ["50.jpg"]


# Listing photos


def listed(photos: str) -> list[str]:
    with Inventory() as inventory:
        listing.list_photos(photos, inventory)
        return list(inventory.keys())


@pytest.mark.parametrize("name", ["missing", "missing.tgz", "s.tar"])
def test_missing_photos_are_reported(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"`ingest.photos`: no (folder|archive) .*{name}"):
        listed(str(tmp_path / name))


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"`ingest.photos`: no files in"):
        listed(str(tmp_path))


# Reading labels


def labels_of(ingest_settings: IngestSettings, keys: list[str]) -> list[Label]:
    """Return the labels of these photos; without any, those read before the listing."""
    with Inventory() as inventory:
        labelling.read_labels(ingest_settings, inventory)
        if not keys:
            return [Label(*row) for row in inventory.query("SELECT name, label, subset FROM labels ORDER BY id")]
        add_keys(inventory, keys)
        labelling.label_photos(ingest_settings, inventory)
        rows = inventory.query("SELECT key, label, subset FROM input WHERE label NOT NULL ORDER BY key")
        return [Label(*row) for row in rows]


def test_a_csv_is_read(tmp_path: Path):
    (tmp_path / "labels.csv").write_text("img_name,class,subset\nx.jpg,A,train\ny.jpg,B,test\n")
    assert labels_of(settings(labels=str(tmp_path / "labels.csv")), []) == [
        Label("x.jpg", "A", "train"),
        Label("y.jpg", "B", "test"),
    ]


def test_the_ending_of_a_csv_may_be_in_upper_case(tmp_path: Path):
    (tmp_path / "LABELS.CSV").write_text("img_name,class,subset\nx.jpg,A,train\ny.jpg,B,test\n")
    assert [item.key for item in labels_of(settings(labels=str(tmp_path / "LABELS.CSV")), [])] == ["x.jpg", "y.jpg"]


def test_a_csv_without_the_columns_is_refused_with_its_columns(tmp_path: Path):
    (tmp_path / "labels.csv").write_text("file,class\nx.jpg,A\n")
    with pytest.raises(UserError, match=r"labels.csv: no column img_name; the first line has \['file', 'class'\]"):
        labels_of(settings(labels=str(tmp_path / "labels.csv")), [])


@pytest.mark.parametrize("name", ["labels.csv", "devkit"])
def test_missing_labels_are_reported_with_a_remedy(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"`ingest.labels`: .*{name}.* cannot be read .*Set it to a .csv"):
        labels_of(settings(labels=str(tmp_path / name)), [])


@pytest.mark.parametrize("name", ["l.txt", "labels.csv.gz", "labels.xlsx"])
def test_labels_in_another_kind_of_file_are_refused_as_such(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"`ingest.labels`: .*{name} is a file, but not a \.csv, \.tsv, \.jsonl"):
        labels_of(settings(labels=str(tmp_path / name)), [])


def test_without_labels_the_class_is_the_photos_folder():
    assert labels_of(settings(), ["train/A/x.jpg", "test/B/y.jpg"]) == [
        Label("test/B/y.jpg", "B", "test"),
        Label("train/A/x.jpg", "A", "train"),
    ]


def test_without_labels_photos_outside_class_folders_are_refused():
    with pytest.raises(UserError, match="/photos: no class folders"):
        labels_of(settings(), ["x.jpg"])


def write_labels(folder: Path, *rows: str) -> str:
    (folder / "labels.csv").write_text("\n".join(["img_name,class,subset", *rows]))
    return str(folder / "labels.csv")


def test_contradictions_are_reported_together_before_the_listing(tmp_path: Path):
    rows = [f"{i}.jpg,{label},train" for i in range(7) for label in "AB"]
    with pytest.raises(UserError, match=r"line 3: 0.jpg is B, .*line 11: 4.jpg is B, .*; and 2 more"):
        labels_of(settings(labels=write_labels(tmp_path, *rows)), [])


def test_too_few_classes_are_reported_before_the_listing(tmp_path: Path):
    with pytest.raises(UserError, match=r"labels.csv has 1 class, but training needs at least 2"):
        labels_of(settings(labels=write_labels(tmp_path, "x.jpg,A,train")), [])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("new/x.jpg", r"'old/x.jpg' and the file 'new/x.jpg' are in different folders \(old, new\)"),
        ("old/z.jpg", "'old/x.jpg' and the file 'old/z.jpg' have different names"),
        ("Thumbs.db", "all files are junk"),
    ],
)
def test_labels_that_name_no_photo_are_reported_with_an_example(tmp_path: Path, key: str, message: str):
    labels = write_labels(tmp_path, "old/x.jpg,A,train", "old/y.jpg,B,train")
    with pytest.raises(UserError, match=message):
        labels_of(settings(labels=labels), [key, *(f"other/{i}.jpg" for i in range(9) if key != "Thumbs.db")])


def test_labels_without_a_photo_and_photos_without_a_label_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    labels = write_labels(tmp_path, "x.jpg,A,train", "y.jpg,B,train", "z.jpg,B,train")
    labels_of(settings(labels=labels), ["x.jpg", "other.jpg"])
    assert caplog.messages == [
        "ingest: labels of no photo, or of several: 2, such as 'y.jpg' (labelled B, no such photo); quarantined",
        "ingest: files without a label: 1, such as 'other.jpg' (no label names this photo); quarantined",
    ]


def test_classes_that_differ_only_in_spelling_are_named(caplog: pytest.LogCaptureFixture):
    labels_of(settings(), ["Audi A4/1.jpg", "audi_a4/2.jpg", "BMW/3.jpg", "Audi  A-4/4.jpg", "BMW X5/5.jpg"])
    assert caplog.messages == [
        "ingest: classes that differ only in case, blanks, underscores or hyphens, which may be one: 'Audi  A-4', "
        "'Audi A4', 'audi_a4'"
    ]


def test_classes_without_train_photos_are_named(caplog: pytest.LogCaptureFixture):
    keys = ["train/x/1.jpg", "train/y/1.jpg", "test/x/2.jpg", "test/images/1.jpg", "test/images/2.jpg"]
    labels_of(settings(), keys)
    assert caplog.messages == [
        "ingest: classes without train photos, which no model learns: 1, such as 'images' (2 photos); move some of "
        "them to train"
    ]


def test_misplaced_photos_are_counted_with_an_example_of_each_kind(caplog: pytest.LogCaptureFixture):
    keys = [f"{name}/{i}.jpg" for name in "ab" for i in range(20)]
    assert len(labels_of(settings(), [*keys, "a/b/x.jpg", "a/b/y.jpg", "z.jpg"])) == len(keys)
    assert caplog.messages == [
        "ingest: files without a label: 3, such as 'a/b/x.jpg' (deeper than the folders of classes), 'z.jpg' (no label "
        "names this photo); quarantined"
    ]


def test_a_class_folder_with_a_line_break_is_quarantined_and_named(caplog: pytest.LogCaptureFixture):
    labels = labels_of(settings(), ["a/1.jpg", "b/2.jpg", "x\ny/3.jpg"])
    assert [label.label for label in labels] == ["a", "b"]
    assert "names that cannot be used: 1" in caplog.messages[0]
    assert caplog.messages[1].endswith("1 folder(s) whose names must be corrected: 'x\\ny'")


def test_a_class_folder_that_is_not_utf8_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for folder in (b"a", b"b", b"caf\xe9"):
        path = bytes(tmp_path) + b"/" + folder
        os.mkdir(path)
        Path(os.fsdecode(path), "1.jpg").touch()
    with Inventory() as inventory:
        listing.list_photos(str(tmp_path), inventory)
        labelling.label_photos(settings(), inventory)
    assert caplog.messages[-1].endswith("1 folder(s) whose names must be corrected: 'caf\\\\xe9'")


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
