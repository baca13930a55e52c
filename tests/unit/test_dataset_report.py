"""The page of a dataset: what it counts, which photos and quarantined files it shows."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from carclass.config.schema import IngestSettings
from carclass.data import dataset, photo, publishing
from carclass.data.quarantine import Reason
from carclass.ingestion import collect
from carclass.ingestion.report import DatasetReport, Rejected, render
from tests.helpers.pages import DATASET_SECTIONS, has_linked_section, make_dataset_report, section, section_text
from tests.helpers.parts import SETTINGS, publish, quarantined, row


def jpeg(height: int = 90, width: int = 120) -> bytes:
    return photo.encode(np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8))


def write(uri: str, folder: str, rows: list[dict[str, Any]]) -> None:
    schema = dataset.ROW if folder == "parts" else dataset.QUARANTINE
    publishing.write_part(uri, folder, pa.Table.from_pylist(rows, schema), SETTINGS)


@pytest.fixture
def report(tmp_path: Path) -> DatasetReport:
    """The report of a dataset in two parts, with photos of two classes, and of two files in quarantine."""
    uri = dataset.dataset_uri(str(tmp_path), "v1")
    sizes = {"width": 300, "height": 200}
    splits = ["train", "train", "train", "val", "test"]
    write(uri, "parts", [row(f"a{i}", image=jpeg(), label="a", split=split) for i, split in enumerate(splits)])
    write(uri, "parts", [row(f"b{i}", image=jpeg(600 + i, 800), label="b", **sizes) for i in range(9)])
    write(uri, "quarantine", [quarantined("q1", "truncated"), quarantined("q2", "empty")])
    keys = [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(9)), "q1", "q2"]
    return collect.collect_report(publish(uri, keys), IngestSettings(photos=str(tmp_path / "photos")), "table.csv")


def test_photos_are_counted_by_class_and_split(report: DatasetReport):
    assert report.classes == {"a": {"train": 3, "val": 1, "test": 1}, "b": {"train": 9}}


def test_the_origin_of_the_labels_is_told(report: DatasetReport):
    assert ("Labels", "table.csv") in report.facts


def test_photos_are_counted_by_their_longer_side(report: DatasetReport):
    assert report.sides == {"up to 128 px": 5, "257 to 512 px": 9}


def test_each_class_has_a_few_photos_of_its_own(report: DatasetReport):
    keys = {name: [sample.key for sample in samples] for name, samples in report.samples.items()}
    assert keys["a"] == ["a0", "a1", "a2", "a3", "a4"]
    assert len(keys["b"]) == collect.SAMPLES_PER_CLASS
    assert all(key.startswith("b") for key in keys["b"])


def test_sample_photos_are_small(report: DatasetReport):
    assert photo.decode(report.samples["b"][0].jpeg).shape[1] == collect.THUMBNAIL_SIDE


def test_with_many_classes_the_first_ones_have_one_photo_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect, "NUM_SAMPLES", 3)
    uri = dataset.dataset_uri(str(tmp_path), "v1")
    write(uri, "parts", [row(f"{i}", image=jpeg(), label="abcd"[i % 4]) for i in range(8)])
    published = publish(uri, [str(i) for i in range(8)], classes=list("abcd"))
    report = collect.collect_report(published, IngestSettings(photos=str(tmp_path)), "table.csv")
    assert {name: len(samples) for name, samples in report.samples.items()} == {"a": 1, "b": 1, "c": 1}


def test_quarantined_files_are_listed_by_name_and_reason(report: DatasetReport):
    assert [(each.key, each.reason) for each in report.rejected] == [("q2", "empty"), ("q1", "truncated")]


def test_every_reason_has_files_on_the_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect, "REJECTED_PER_REASON", 2)
    rows = [quarantined(f"{i}", "truncated") for i in range(9)] + [quarantined("z", "empty")]
    listed = collect._first_of_each_reason(pa.Table.from_pylist(rows))
    assert [each["key"] for each in listed] == ["z", "0", "1"]


def test_thumbnails_are_made_of_files_that_can_be_decoded(tmp_path: Path):
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:300])
    thumbnails = collect.read_thumbnails(str(tmp_path), ["good.jpg", "cut.jpg", "missing.jpg"])
    assert list(thumbnails) == ["good.jpg"]


@pytest.mark.parametrize("name", DATASET_SECTIONS)
def test_every_section_exists_and_is_linked_from_the_top(name: str):
    assert has_linked_section(render(make_dataset_report()), name)


def test_classes_with_few_val_photos_are_counted_with_the_consequence():
    text = section_text(render(make_dataset_report()), "summary")
    assert "1 class has fewer than 10 val photos: one photo then moves the val accuracy of the class by more" in text


def test_the_smallest_class_is_first():
    html = section(render(make_dataset_report()), "classes")
    assert html.index("Ardo Coupe") < html.index("Belmar Wagon")


def test_every_reason_is_named_in_words_too():
    for reason in Reason:
        page = render(make_dataset_report(reasons={reason: 1}, rejected=[Rejected("x", reason, "", None)]))
        named = re.findall(rf'<t[hd][^>]*>{reason} <span class="note">\(', section(page, "quarantine"))
        assert len(named) == 2  # in the counts and in the list of files


def test_names_are_escaped():
    rejected = [Rejected("<script>x</script>.jpg", "corrupt", "<b>", None)]
    assert "<script>x" not in render(make_dataset_report(rejected=rejected))
