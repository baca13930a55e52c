"""Evaluation report: contents, escaping and self-containment."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest

from carclass.evaluation.charts import calibration_chart, coverage_chart, curve_chart, find_epoch, heat_map
from carclass.evaluation.metrics import wilson_interval
from carclass.evaluation.report import Mistake, Report, render
from carclass.reporting.svg import BOTTOM, nice_ticks
from tests.helpers.pages import (
    EVALUATION_SECTIONS,
    has_linked_section,
    make_epoch,
    make_photo,
    make_report,
    section,
    section_text,
    visible_text,
)


@pytest.mark.parametrize("name", EVALUATION_SECTIONS)
def test_every_section_exists_and_is_linked_at_the_top(name):
    assert has_linked_section(render(make_report()), name)


def test_headline_shows_accuracy_with_its_interval():
    report = make_report(num_classes=6)
    low, high = report.metrics["accuracy_interval"]
    text = visible_text(section(render(report), "summary"))
    for value in (report.metrics["accuracy"], low, high, report.metrics["top5_accuracy"]):
        assert f"{value * 100:.1f}\u00a0%" in text


@pytest.mark.parametrize(
    ("counts", "text"), [((3, 2), "The most frequent mistake: a"), ((3, 3), "One of the most frequent mistakes: a")]
)
def test_a_mistake_that_is_as_frequent_as_another_is_one_of_them(counts: tuple[int, int], text: str):
    report = make_report()
    report.metrics["most_confused_pairs"] = [
        {"label": "a", "predicted": "b", "count": count, "share": 0.5} for count in counts
    ]
    assert text in section_text(render(report), "summary")


@pytest.mark.parametrize(("num_classes", "is_shown"), [(4, False), (5, False), (6, True)])
def test_top_5_accuracy_is_shown_of_more_than_five_classes(num_classes: int, is_shown: bool):
    text = section_text(render(make_report(num_classes=num_classes)), "summary")
    assert ("Top-" in text) == is_shown


def test_a_class_without_photos_has_no_rates():
    report = make_report(num_classes=196, num_photos=120)
    empty = next(row["name"] for row in report.metrics["per_class"] if not row["support"])
    row = re.search(rf'<th scope="row">{empty}</th>(.*?)</tr>', section(render(report), "classes"), re.S)
    assert row is not None
    assert visible_text(row[1]).split() == [*["\u2013"] * 3, "0"]


def test_facts_are_shown_in_their_order():
    assert re.search(r"Run exp_001 Seed 17", visible_text(render(make_report())))


def test_nothing_is_loaded_from_outside():
    page = render(make_report(num_classes=30))
    page = re.sub(r'<a href="\.\./\.\./\.\./datasets/', "", page)  # followed by a reader's click only
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)


def test_text_from_data_is_escaped_everywhere():
    evil = "<img src=x onerror=alert(1)>\"/'&"
    report = make_report(num_classes=30)
    report.title = evil
    report.facts = [(evil, evil)]
    report.class_names[0] = evil
    report.metrics["per_class"][0]["name"] = evil
    report.metrics["most_confused_pairs"][0] |= {"label": evil, "predicted": evil}
    report.history = {evil: [make_epoch(1, 0.5)]}
    report.masking[0].caption = evil
    report.mistakes[0] = Mistake(photo=make_photo(), key=evil, label=evil, predicted=evil, confidence=0.5)
    report.quarantined = {evil: {evil: 1}}
    report.missing_source = evil
    page = render(report)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 12


def test_content_policy_allows_the_page_script_only():
    page = render(make_report())
    assert re.search(r"default-src 'none'; img-src data:;.* script-src 'sha256-[A-Za-z0-9+/]{43}='", page)


@pytest.mark.parametrize(
    ("name", "field", "empty", "sentence"),
    [
        ("curves", "history", {}, "No training history"),
        ("curves", "history", {"frozen": []}, "No training history"),
        ("masking", "masking", [], "no masking samples"),
        ("mistakes", "mistakes", [], "No mistakes to show"),
        ("data", "quarantined", {"v1 (ingest)": {}}, "No photo of v1 (ingest) was quarantined"),
        ("data", "missing_source", "v1", "are not listed: dataset v1 is gone"),
    ],
)
def test_an_empty_section_has_a_note(name, field, empty, sentence):
    report = make_report()
    setattr(report, field, empty)
    assert sentence in section(render(report), name)


def test_confusion_of_few_classes_is_a_table_of_counts():
    report = make_report(num_classes=4)
    cells = re.findall(r'<td class="(?:right|wrong)[^>]*>(\d+)</td>', section(render(report), "confusion"))
    assert [int(cell) for cell in cells] == [count for count in report.confusion.flatten() if count]


def test_confusion_of_many_classes_is_an_image():
    page = section(render(make_report(num_classes=25)), "confusion")
    assert "data:image/png;base64," in page
    assert "<td" not in page


def test_classes_are_sorted_by_f1_and_those_without_photos_come_last():
    report = make_report(num_classes=196, num_photos=120)
    names = re.findall(r'<th scope="row">(Maker [^<]*)</th>', section(render(report), "classes"))
    by_name = {row["name"]: row for row in report.metrics["per_class"]}
    listed = [by_name[name] for name in names]
    with_photos = [row["f1"] for row in listed if row["support"]]
    assert len(names) == 196
    assert with_photos == sorted(with_photos)
    assert all(row["support"] == 0 for row in listed[len(with_photos) :])


def test_a_full_report_of_196_classes_is_below_three_megabytes():
    page = render(make_report(num_classes=196, num_photos=1059, num_mistakes=24, num_masked=12))
    photo_bytes = 48 * len(make_photo())
    assert photo_bytes > 48 * 15_000
    assert len(page.encode()) < 3_000_000


def test_the_same_report_renders_to_the_same_bytes():
    assert render(make_report()) == render(make_report())


def test_the_ringed_epoch_is_that_of_the_evaluated_model():
    report = make_report()
    report.model = ("frozen", 2)
    text = section_text(render(report), "curves")
    assert "The evaluated model is epoch 2 of stage frozen, with a validation accuracy of 40.0 %" in text
    assert "Epoch 1 of stage unfrozen reached 70.0 %" in text
    assert find_epoch(report.history, "frozen", 2) == (1, make_epoch(2, 0.4))


def test_the_best_epoch_is_not_contradicted():
    assert "No epoch is better on validation." in section_text(render(make_report()), "curves")


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_accuracy_has_the_name_of_its_split(split: str):
    report = make_report()
    report.split = split
    assert f"{split.capitalize()} accuracy" in section_text(render(report), "summary")


def test_the_calibration_of_the_probabilities_is_named():
    assert "Probabilities are calibrated: temperature 1.2." in section_text(render(make_report()), "calibration")


def test_thresholds_are_listed_with_figures_of_val_and_of_the_evaluated_split():
    report = make_report()
    report.val_coverage = [{**row, "count": 1234} for row in report.metrics["coverage"]]
    text = section_text(render(report), "threshold")
    assert "Val accepted Val photos Val accuracy Test accepted Test photos Test accuracy 0.00" in text
    assert text.count(" 1,234 ") == len(report.val_coverage)


def test_a_threshold_is_named_for_each_wanted_accuracy():
    report = make_report()
    rows = [dict(row) for row in report.metrics["coverage"]]
    for row, accuracy in zip(rows, [0.8] * 4 + [0.92] * 4 + [0.97] * 20, strict=False):
        row |= {"count": 9, "coverage": 0.5, "accuracy": accuracy}
    report.val_coverage = rows
    text = section_text(render(report), "threshold")
    assert "--threshold 0.2 : at least 90 % accuracy on val" in text
    assert "--threshold 0.4 : at least 95 % accuracy on val, where 50.0 % of the photos" in text
    assert "No threshold gives 99 % accuracy on val." in text
    low = wilson_interval(round(0.97 * 9), 9)[0]
    assert f"(9) are accepted and 97.0 % of these are correct: of more such photos at least {100 * low:.1f} %" in text


@pytest.mark.parametrize(
    ("accuracy", "named"), [(1.0, "at least 99 % accuracy on val"), (0.5, "No threshold gives 90 % accuracy on val.")]
)
def test_one_threshold_for_all_wanted_accuracies_is_named_once(accuracy: float, named: str):
    report = make_report()
    report.val_coverage = [dict(row) | {"count": 9, "accuracy": accuracy} for row in report.metrics["coverage"]]
    text = section_text(render(report), "threshold")
    assert named in text
    assert text.count(" accuracy on val") == 1


def test_without_figures_of_val_the_report_says_how_to_get_them():
    report = make_report()
    report.val_coverage = []
    text = section_text(render(report), "threshold")
    assert "delete calibration.json in the stage's folder and evaluate again" in text
    assert "accuracy on test" in text


def test_the_coverage_chart_has_a_line_per_split_and_a_named_dot_per_threshold_with_photos():
    rows = make_report().metrics["coverage"]
    svg = ET.fromstring(coverage_chart({"val": rows, "test": rows}))
    assert len(svg.findall("polyline")) == 2
    assert len(svg.findall("circle/title")) == 2 * sum(row["count"] > 0 for row in rows)


def test_quarantined_photos_are_listed_by_the_job_that_found_them():
    report = make_report()
    report.quarantined = {"v1 (ingest)": {"truncated": 3}, "v2 (masking)": {"doubtful_mask": 2}}
    text = section_text(render(report), "data")
    assert "3 photos of v1 (ingest) were quarantined" in text
    assert "2 photos of v2 (masking) were quarantined" in text


def test_a_diverged_run_is_drawn_with_gaps_and_reported():
    report = make_report()
    report.history = {"frozen": [make_epoch(1, float("nan"), loss=float("nan"))]}
    page = section(render(report), "curves")
    assert "training diverged" in page
    assert 'points="nan' not in page
    assert '="nan' not in page


def test_a_gap_splits_a_curve_in_two():
    history = {"frozen": [make_epoch(i, value) for i, value in enumerate([0.1, 0.2, np.inf, 0.3, 0.4])]}
    svg = ET.fromstring(curve_chart(history, "accuracy", None, percent=True))
    assert len(svg.findall("polyline[@class='curve val']")) == 2


def test_a_chart_shows_the_boundary_and_the_names_of_stages():
    svg = ET.fromstring(curve_chart(make_report().history, "loss", None, percent=False))
    assert len(svg.findall("line[@class='boundary']")) == 1
    assert [text.text for text in svg.findall("text[@class='stage middle']")] == ["frozen", "unfrozen"]


@pytest.mark.parametrize("num_epochs", range(70, 90))
def test_the_numbers_of_epochs_do_not_touch_where_stages_meet(num_epochs: int):
    history = {
        "frozen": [make_epoch(i + 1, 0.4) for i in range(num_epochs)],
        "unfrozen": [make_epoch(i + 1, 0.5) for i in range(30)],
    }
    drawn = str(curve_chart(history, "accuracy", None, percent=True))
    places = [float(x) for x in re.findall(rf'<text class="tick middle" x="([\d.]+)" y="{BOTTOM + 17:.1f}"', drawn)]
    assert len(places) > 8
    assert min(right - left for left, right in pairwise(places)) > 20


def test_a_single_epoch_is_drawn_as_dots():
    history = {"frozen": [make_epoch(1, 0.5)]}
    svg = ET.fromstring(curve_chart(history, "accuracy", find_epoch(history, "frozen", 1), percent=True))
    assert len(svg.findall("circle")) == 3  # training, validation, ring


@pytest.mark.parametrize(("accuracy", "lowest"), [(1.0, "95\xa0%"), (0.5, "44\xa0%"), (0.0, "0\xa0%")])
def test_a_coverage_chart_of_equal_accuracies_does_not_magnify_their_axis(accuracy: float, lowest: str):
    rows = [{"threshold": i / 2, "coverage": 1 - i / 2, "count": 2 - i, "accuracy": accuracy} for i in range(2)]
    texts = [text.text for text in ET.fromstring(coverage_chart({"val": rows})).iter("text")]
    assert texts[0] == lowest


def test_the_last_number_of_an_axis_ends_with_the_chart():
    rows = [{"threshold": 0.0, "coverage": 1.0, "count": 2, "accuracy": 0.5}]
    chart = ET.fromstring(coverage_chart({"val": rows}))
    last = [text for text in chart.iter("text") if text.text == "100\xa0%"][-1]
    assert (last.get("class"), float(last.get("x"))) == ("tick end", float(chart.get("viewBox").split()[2]))


def test_one_photo_is_not_called_photos():
    bins = [{"lower": 0.2, "upper": 0.3, "count": 1, "accuracy": 1.0}]
    assert "20\xa0% to 30\xa0%: 1 photo, 100.0\xa0% correct" in calibration_chart(bins)


def test_heat_map_with_a_class_without_photos():
    confusion = np.zeros((30, 30), np.int64)
    confusion[0, 0] = 4
    assert ET.fromstring(heat_map(confusion, [str(i) for i in range(30)])).find("image") is not None


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.93, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (5.3, [0, 2, 4, 6]),
        (0.011, [0, 0.0025, 0.005, 0.0075, 0.01, 0.0125]),
        (0, [0, 1]),
    ],
)
def test_axis_ticks_are_round_and_include_the_highest_value(highest, ticks):
    assert nice_ticks(highest) == pytest.approx(ticks)


def test_a_photo_that_is_not_a_jpeg_fails_an_assertion():
    report = make_report()
    report.mistakes[0].photo = b"\x89PNG\r\n"
    with pytest.raises(AssertionError, match="not a JPEG"):
        render(report)


def test_class_names_that_do_not_match_the_confusion_matrix_fail_an_assertion():
    report = make_report()
    with pytest.raises(AssertionError):
        Report(**{name: getattr(report, name) for name in Report.__slots__} | {"class_names": ["one"]})
