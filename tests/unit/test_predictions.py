"""The table of predictions: columns, order, CSV, and resumption."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.errors import UserError
from carclass.prediction import predictions
from tests.helpers.inventories import add_keys

CLASSES = ["a", "b", "c", "d", "e", "f", "ü"]
SETTINGS = {"photos": "s3://bucket/new", "threshold": 0.5}


def predicted(key: str, best: int = 0, **changes: Any) -> dict[str, Any]:
    probabilities = np.full((1, 7), 0.05)
    probabilities[0, best] = 0.7
    row = {
        "key": key,
        "image_id": f"{ord(key[0]):064x}",
        "outcome": "vehicle",
        "vehicle_class": "car",
        "score": 0.5,
    }
    return {
        **row,
        "box": [1.0, 2.0, 3.5, 4.0],
        **predictions.prediction_columns(probabilities, CLASSES, 0.5)[0],
        **changes,
    }


def failed(key: str, reason: str = "empty") -> dict[str, Any]:
    return {"key": key, "reason": reason, "detail": "no, bytes"}


def write(folder: Path, *parts: list[dict[str, Any]]) -> None:
    for rows in parts:
        predictions.write_batch(pa.Table.from_pylist(rows, predictions.PREDICTED), str(folder), SETTINGS)


def digest(keys: Sequence[str]) -> str:
    with Inventory() as inventory:
        add_keys(inventory, keys)
        return inventory.digest()


def is_finished(
    uri: Path | str, keys: Sequence[str], settings: dict[str, Any] = SETTINGS, threshold: float = 0.5
) -> bool:
    return predictions.is_finished(str(uri), settings, digest(keys), threshold)


def publish(uri: Path | str, keys: Sequence[str], threshold: float = 0.5) -> None:
    with Inventory() as inventory:
        add_keys(inventory, keys)
        Draft(str(uri), SETTINGS, inventory).sync()
        predictions.publish_predictions(str(uri), inventory, inventory.digest(), threshold, lambda _: "page")


def read(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / predictions.TABLE).to_pylist()


def test_the_top_five_are_sorted_and_ties_are_in_class_order():
    (row,) = predictions.prediction_columns(np.array([[0.1, 0.3, 0.1, 0.3, 0.05, 0.05, 0.1]]), CLASSES, 0.2)
    assert row["top5"] == ["b", "d", "a", "c", "ü"]
    assert row["top5_probabilities"] == pytest.approx([0.3, 0.3, 0.1, 0.1, 0.1])
    assert (row["label"], row["probability"], row["rejected"]) == ("b", 0.3, False)


@pytest.mark.parametrize(("threshold", "rejected"), [(0.0, False), (0.3, False), (0.31, True), (1.0, True)])
def test_predictions_below_the_threshold_are_rejected(threshold: float, rejected: bool):
    (row,) = predictions.prediction_columns(np.array([[0.1, 0.3, 0.1, 0.3, 0.05, 0.05, 0.1]]), CLASSES, threshold)
    assert row["rejected"] is rejected


def test_fewer_than_five_classes_are_all_listed():
    (row,) = predictions.prediction_columns(np.array([[0.4, 0.6]]), CLASSES[:2], 0)
    assert row["top5"] == ["b", "a"]


def test_rows_are_ordered_by_key_across_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predictions, "CHUNK_ROWS", 2)
    monkeypatch.setattr(predictions, "READ_PARTS", 1)
    write(tmp_path, [predicted("e"), failed("a")], [predicted("c", 2)], [predicted("b"), predicted("d")])
    publish(tmp_path, ["a", "b", "c", "d", "e"])
    rows = read(tmp_path)
    assert [row["key"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert pq.read_schema(tmp_path / predictions.TABLE).equals(predictions.PREDICTION)
    assert [row["label"] for row in rows] == [None, "a", "c", "a", "a"]


def test_a_missing_key_fails_an_assertion(tmp_path: Path):
    write(tmp_path, [predicted("a"), predicted("b")])
    with pytest.raises(AssertionError, match=r"keys are missing, such as \['c'"):
        publish(tmp_path, ["a", "b", "c"])
    assert not (tmp_path / predictions.TABLE).exists()


def test_rows_of_photos_that_are_gone_are_kept(tmp_path: Path):
    write(tmp_path, [predicted("a"), predicted("b")])
    publish(tmp_path, ["b"])
    assert [row["key"] for row in read(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("lost", [predictions.TABLE, predictions.CSV, predictions.PAGE])
def test_predictions_without_one_of_their_files_are_unfinished(tmp_path: Path, lost: str):
    write(tmp_path, [predicted("a")])
    publish(tmp_path, ["a"])
    assert is_finished(tmp_path, ["a"])
    (tmp_path / lost).unlink()
    assert not is_finished(tmp_path, ["a"])


def test_predictions_are_unfinished_when_there_are_more_photos(tmp_path: Path):
    write(tmp_path, [predicted("a")])
    publish(tmp_path, ["a"])
    assert not is_finished(tmp_path, ["a", "b"])


def test_predictions_are_unfinished_while_photos_are_unreadable(tmp_path: Path):
    write(tmp_path, [{**failed("a"), "reason": "unreadable"}])
    publish(tmp_path, ["a"])
    assert not is_finished(tmp_path, ["a"])


def test_predictions_of_the_first_format_are_finished_for_the_photos_in_their_settings(tmp_path: Path):
    write(tmp_path, [predicted("a")])
    publish(tmp_path, ["a"])
    table = pq.read_table(tmp_path / predictions.TABLE).replace_schema_metadata()
    pq.write_table(table, tmp_path / predictions.TABLE, write_page_checksum=True)
    settings = {**SETTINGS, predictions.LISTING: digest(["a"])}
    assert is_finished(tmp_path, ["a"], settings)
    assert not is_finished(tmp_path, ["a", "b"], settings)


def test_thumbnails_are_written_apart_from_the_rows(tmp_path: Path):
    write(tmp_path, [predicted("a", photo=b"1", cutout=b"2"), predicted("b")])
    (part,) = (tmp_path / "parts").iterdir()
    (pictures,) = (tmp_path / "thumbnails").iterdir()
    assert not {"photo", "cutout"} & {*pq.read_schema(part).names}
    assert pq.read_table(pictures).select(["key", "photo", "cutout"]).to_pylist() == [
        {"key": "a", "photo": b"1", "cutout": b"2"}
    ]


def test_no_file_of_thumbnails_is_written_without_any(tmp_path: Path):
    write(tmp_path, [predicted("a"), failed("b")])
    assert not (tmp_path / "thumbnails").exists()


def test_a_photo_in_two_parts_is_listed_once(tmp_path: Path):
    """Cover workers that write after their job was killed and resumed."""
    write(tmp_path, [predicted("a"), predicted("b")], [predicted("b"), predicted("c")], [predicted("b")])
    publish(tmp_path, ["a", "b", "c"])
    assert [row["key"] for row in read(tmp_path)] == ["a", "b", "c"]


def test_a_duplicate_key_within_a_part_fails_an_assertion(tmp_path: Path):
    write(tmp_path, [predicted("a"), predicted("a")])
    with pytest.raises(AssertionError, match="a part has a duplicate key"):
        publish(tmp_path, ["a"])


def test_the_csv_file_has_the_same_rows(tmp_path: Path):
    write(tmp_path, [failed("a"), predicted("b", 6), predicted("c", outcome="no_vehicle", box=None, score=None)])
    publish(tmp_path, ["a", "b", "c"])
    with (tmp_path / predictions.CSV).open(encoding="utf-8", newline="") as file:
        failed_row, classified, unmasked = csv.DictReader(file)
    assert (failed_row["reason"], failed_row["detail"], failed_row["label"], failed_row["x1"]) == (
        "empty",
        "no, bytes",
        "",
        "",
    )
    assert (classified["key"], classified["label"], classified["rejected"]) == ("b", "ü", "false")
    assert [float(classified[corner]) for corner in predictions.CORNERS] == [1, 2, 3.5, 4]
    assert json.loads(classified["top5"]) == ["ü", "a", "b", "c", "d"]
    assert json.loads(classified["top5_probabilities"]) == [0.7, 0.05, 0.05, 0.05, 0.05]
    assert (unmasked["outcome"], unmasked["x1"], unmasked["score"]) == ("no_vehicle", "", "")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_text_that_a_spreadsheet_would_evaluate_is_escaped_in_the_csv_file(tmp_path: Path, start: str):
    key = f"{start}cmd|' /C calc'!A0.jpg"
    write(tmp_path, [predicted(key, label=f"{start}1", score=-0.5)])
    publish(tmp_path, [key])
    with (tmp_path / predictions.CSV).open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["key"], row["label"], row["score"]) == (f"'{key}", f"'{start}1", "-0.5")


def test_names_with_control_characters_are_unchanged_in_the_csv_file(tmp_path: Path):
    keys = sorted(
        ["new\nline.jpg", "carriage\rreturn.jpg", 'a"quote.jpg', "a,comma.jpg", "bell\x07.jpg", "\x1b[31mred.jpg"]
    )
    write(tmp_path, [failed(key) for key in keys])
    publish(tmp_path, keys)
    with (tmp_path / predictions.CSV).open(newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == keys


def test_inputs_that_are_not_read_are_listed_with_their_reason(tmp_path: Path):
    with Inventory() as inventory:
        inventory.add_inputs([Listed("a.jpg"), Listed("\\xff.jpg", reason="bad_name", detail="not UTF-8")])
        write(tmp_path, [predicted("a.jpg")])
        predictions.write_unread(str(tmp_path), inventory, SETTINGS)
        Draft(str(tmp_path), SETTINGS, inventory).sync()
        predictions.publish_predictions(str(tmp_path), inventory, "", 0.5, lambda _: "page")
    assert [(row["key"], row["reason"]) for row in read(tmp_path)] == [("\\xff.jpg", "bad_name"), ("a.jpg", None)]


def test_photos_are_counted_by_result(tmp_path: Path):
    write(tmp_path, [failed("a"), predicted("b"), predicted("c", probability=0.4), failed("d")])
    publish(tmp_path, ["a", "b", "c", "d"])
    assert predictions.read_counts(str(tmp_path)) == (4, 2, 1, (0, []), {"empty": 2})


def test_files_that_are_no_photos_are_counted_apart_from_the_quarantine(tmp_path: Path):
    names = ["notes.txt", "a/.DS_Store", "Thumbs.db"]
    write(tmp_path, [failed("page.jpg", "not_an_image"), *(failed(name, "not_an_image") for name in names)])
    publish(tmp_path, ["page.jpg", *names])
    counts = predictions.read_counts(str(tmp_path))
    assert (counts.files, counts.reasons) == (4, {"not_an_image": 1})
    assert counts.others.text == "3 (Thumbs.db, a/.DS_Store, notes.txt)"


def test_a_photo_under_the_name_of_another_kind_of_file_is_not_left_out(tmp_path: Path):
    write(tmp_path, [failed("photo.txt", "truncated"), predicted("photo.db")])
    publish(tmp_path, ["photo.txt", "photo.db"])
    assert predictions.read_counts(str(tmp_path)) == (2, 1, 0, (0, []), {"truncated": 1})


def test_a_table_of_failed_photos_only_is_counted(tmp_path: Path):
    write(tmp_path, [failed("a")])
    publish(tmp_path, ["a"])
    assert predictions.read_counts(str(tmp_path)) == (1, 0, 0, (0, []), {"empty": 1})


def test_predictions_are_resumed_with_their_first_settings(tmp_path: Path):
    former = {**SETTINGS, predictions.LISTING: "0" * 64}
    assert predictions.begin_predictions(str(tmp_path), former) == former
    assert predictions.begin_predictions(str(tmp_path), SETTINGS) == former


def test_other_settings_under_the_same_name_are_rejected(tmp_path: Path):
    predictions.begin_predictions(str(tmp_path), SETTINGS)
    with pytest.raises(UserError, match=r"other settings \(photos\)\. Choose another name \(--name\)"):
        predictions.begin_predictions(str(tmp_path), {**SETTINGS, "photos": "other"})


def test_another_threshold_is_applied_to_the_stored_probabilities(tmp_path: Path):
    write(tmp_path, [predicted("a"), failed("b")])
    predictions.begin_predictions(str(tmp_path), SETTINGS)
    publish(tmp_path, ["a", "b"])
    assert predictions.begin_predictions(str(tmp_path), {**SETTINGS, "threshold": 0.9}) == SETTINGS
    assert not is_finished(tmp_path, ["a", "b"], threshold=0.9)
    publish(tmp_path, ["a", "b"], threshold=0.9)
    assert is_finished(tmp_path, ["a", "b"], threshold=0.9)
    assert not is_finished(tmp_path, ["a", "b"])
    assert [row["rejected"] for row in read(tmp_path)] == [True, None]
    assert next(csv.DictReader((tmp_path / predictions.CSV).open()))["rejected"] == "true"


def test_a_probability_at_the_threshold_is_accepted(tmp_path: Path):
    write(tmp_path, [predicted("a")])
    publish(tmp_path, ["a"], threshold=0.7)
    assert [row["rejected"] for row in read(tmp_path)] == [False]


def test_predictions_on_s3(bucket: str):
    uri = f"s3://{bucket}/run/predictions/monday"
    predictions.begin_predictions(uri, SETTINGS)
    for rows in ([predicted("b"), failed("c")], [predicted("a")]):
        predictions.write_batch(pa.Table.from_pylist(rows, predictions.PREDICTED), uri, SETTINGS)
    publish(uri, ["a", "b", "c"])
    assert is_finished(uri, ["a", "b", "c"])
    assert predictions.read_counts(uri) == (3, 2, 0, (0, []), {"empty": 1})
