"""The page of predictions: which photos it shows, what it counts and says."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.prediction import collect, predictions
from carclass.prediction.report import FailedPhoto, PredictionReport, render
from tests.helpers.inventories import add_keys
from tests.helpers.pages import (
    PREDICTION_SECTIONS,
    has_linked_section,
    make_photo,
    make_prediction_report,
    make_shown_photo,
    section,
    section_text,
    visible_text,
)

CLASSES = ["Ardo", "Belmar", "Corvo"]
JPEG = make_photo()


def row(key: str, probability: float = 0.8, best: int = 0, **changes: Any) -> dict[str, Any]:
    probabilities = np.full((1, 3), (1 - probability) / 2)
    probabilities[0, best] = probability
    columns = predictions.prediction_columns(probabilities, CLASSES, 0.5)[0]
    return {
        "key": key,
        "image_id": "00",
        "outcome": "vehicle",
        "vehicle_class": "car",
        "score": 0.9,
        **columns,
        **changes,
    }


def shown(key: str, probability: float = 0.8, best: int = 0, **changes: Any) -> dict[str, Any]:
    return row(key, probability, best, **{"photo": JPEG, "cutout": JPEG, **changes})


def failed(key: str) -> dict[str, Any]:
    return {"key": key, "reason": "empty", "detail": "no bytes"}


def collected(uri: Path, *parts: list[dict[str, Any]]) -> PredictionReport:
    """Publish rows and return the report that is rendered of them."""
    found: list[PredictionReport] = []

    def render_page(table: Path) -> str:
        found.append(
            collect.collect_report(str(uri), table, "title", [], threshold=0.5, is_calibrated=True, report_link=None)
        )
        return render(found[0])

    for rows in parts:
        predictions.write_batch(pa.Table.from_pylist(rows, predictions.PREDICTED), str(uri), {})
    with Inventory() as inventory:
        add_keys(inventory, {each["key"] for rows in parts for each in rows})
        Draft(str(uri), {}, inventory).sync()
        predictions.publish_predictions(str(uri), inventory, "", 0.5, render_page)
    assert (uri / predictions.PAGE).read_text(encoding="utf-8") == render(found[0])
    return found[0]


def test_the_least_certain_photos_are_first(tmp_path: Path):
    report = collected(tmp_path, [shown("a", 0.9), shown("b", 0.4)], [shown("c", 0.6)])
    assert [(photo.key, photo.rejected) for photo in report.shown] == [("b", True), ("c", False), ("a", False)]
    assert report.shown[0].top[0] == ("Ardo", pytest.approx(0.4))


def test_photos_without_thumbnails_are_counted_but_not_shown(tmp_path: Path):
    report = collected(tmp_path, [shown("a"), row("b")])
    assert [photo.key for photo in report.shown] == ["a"]
    assert report.classes[0].num_photos == 2


def test_classes_are_counted_the_most_frequent_first(tmp_path: Path):
    report = collected(tmp_path, [row("a", 0.4, 2), row("b", 0.8, 2), row("c", 0.9, 1)])
    assert [(each.name, each.num_photos, each.num_rejected) for each in report.classes] == [
        ("Corvo", 2, 1),
        ("Belmar", 1, 0),
    ]
    assert report.classes[0].mean_probability == pytest.approx(0.6)


def test_files_that_failed_are_listed_with_their_reason(tmp_path: Path):
    report = collected(tmp_path, [failed("a"), shown("b")])
    assert (report.failed, report.reasons) == ([FailedPhoto("a", "empty", "no bytes")], {"empty": 1})


def test_files_that_are_no_photos_are_named_apart_from_the_quarantine(tmp_path: Path):
    others = [{"key": name, "reason": "not_an_image", "detail": ""} for name in ("notes.txt", "Thumbs.db")]
    report = collected(tmp_path, [failed("a"), shown("b"), *others])
    assert (report.failed, report.reasons) == ([FailedPhoto("a", "empty", "no bytes")], {"empty": 1})
    text = section_text(render(report), "quarantine")
    assert (
        "Junk, which is left out (not photos, neither by their names nor by their content): 2 (Thumbs.db, notes.txt)."
        in text
    )


@pytest.mark.parametrize(("is_calibrated", "text"), [(True, "are calibrated:"), (False, "are not calibrated, as")])
def test_probabilities_are_called_calibrated_only_if_they_are(is_calibrated: bool, text: str):
    page = render(make_prediction_report(is_calibrated=is_calibrated))
    assert f"Probabilities {text}" in visible_text(section(page, "summary"))


def test_the_page_of_files_that_all_failed_has_no_photos(tmp_path: Path):
    assert "No photo was classified" in section(render(collected(tmp_path, [failed("a")])), "photos")


def test_a_photo_that_was_replaced_is_shown_as_it_is_today(tmp_path: Path):
    outdated = [shown("a", image_id="11", photo=make_photo(1))]
    predictions.write_batch(pa.Table.from_pylist(outdated, predictions.PREDICTED), str(tmp_path), {})
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    report = collected(tmp_path, [shown("a", image_id="22", photo=make_photo(2), fingerprint="2")])
    assert [photo.photo for photo in report.shown] == [make_photo(2)]


def test_of_many_photos_a_sample_is_shown_whose_number_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect, "MAX_SHOWN", 20)
    report = collected(tmp_path, [shown(f"{i}.jpg") for i in range(200)])
    assert 8 <= len(report.shown) <= 20
    assert report.classes[0].num_photos == 200


def test_the_size_of_all_thumbnails_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collect, "MAX_SHOWN_BYTES", 5 * len(JPEG))
    assert len(collected(tmp_path, [shown(f"{i}.jpg") for i in range(9)]).shown) == 2


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.25, 250), (1.0, 1000)])
def test_a_share_of_the_photos_is_chosen_by_their_names(share: float, number: int):
    chosen = [collect.is_shown(f"photos/{i:05d}.jpg", share) for i in range(1000)]
    assert sum(chosen) == pytest.approx(number, abs=50 if 0 < share < 1 else 0)


def test_photos_that_a_smaller_share_shows_are_shown_by_a_larger_one():
    keys = [f"{i}.jpg" for i in range(100)]
    assert all(collect.is_shown(key, 0.5) for key in keys if collect.is_shown(key, 0.1))


@pytest.mark.parametrize("name", PREDICTION_SECTIONS)
def test_every_section_exists_and_is_linked_at_the_top(name: str):
    assert has_linked_section(render(make_prediction_report()), name)


def test_the_page_says_what_it_leaves_out():
    report = make_prediction_report()
    report.classes[0] = report.classes[0]._replace(num_photos=9998)
    text = section_text(render(report), "photos")
    assert "6 of the 10,000 classified photos are on this page" in text
    assert "the other 9,994 are in predictions.parquet" in text


def test_a_complete_page_leaves_nothing_out():
    assert "at random" not in section(render(make_prediction_report()), "photos")


def test_a_photo_has_its_likeliest_classes_with_bars_and_its_cutout():
    html = section(render(make_prediction_report(shown=[make_shown_photo(0)])), "photos")
    assert html.count("<img ") == 2
    assert html.count('class="bar') == 5
    assert "Ardo Coupe 30.0\u00a0%" in visible_text(html)


def test_a_photo_that_is_not_masked_has_no_cutout():
    photo = make_shown_photo(cutout=None, detection=None)
    assert section(render(make_prediction_report(shown=[photo])), "photos").count("<img ") == 1


def test_predictions_without_a_threshold_say_so_and_link_the_report():
    page = section(render(make_prediction_report(threshold=0.0)), "summary")
    assert "No threshold is set, so none is rejected" in page
    assert 'href="../../report/report.html#threshold"' in page


def test_names_are_escaped():
    evil = "<script>x</script>\"'"
    photo = make_shown_photo(key=evil, top=[(evil, 0.5)], detection=evil)
    page = render(make_prediction_report(shown=[photo], failed=[FailedPhoto(evil, evil, evil)], title=evil))
    assert "<script>x" not in page


def test_a_page_of_two_thousand_photos_is_below_forty_megabytes():
    report = make_prediction_report(shown=[make_shown_photo(0)] * 2)
    overhead = len(render(report)) - len(render(make_prediction_report(shown=[make_shown_photo(0)])))
    per_photo = overhead - 4 * 2 * len(make_photo()) / 3
    assert per_photo < 2000
    assert 4 / 3 * collect.MAX_SHOWN_BYTES + collect.MAX_SHOWN * per_photo < 40e6
