"""The masking page: what it says, which photos it puts first, and that it stands alone."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from carclass.data.photo import resize
from carclass.masking.report import NUM_BINS, doubt_score, histogram, histogram_chart, render
from tests.helpers.pages import MASKING_SECTIONS, make_masked_photo, make_masking_report, section, visible_text

SURE = {
    "outcome": "vehicle",
    "score": 0.99,
    "stability": 0.97,
    "several_vehicles": False,
    "touches_border": False,
    "area_fraction": 0.4,
}


@pytest.mark.parametrize("name", MASKING_SECTIONS)
def test_every_section_is_there_and_linked_from_the_top(name):
    page = render(make_masking_report())
    assert f'<section id="{name}"' in page
    assert f'href="#{name}"' in page


@pytest.mark.parametrize("words", ["90.0\u00a0%", "180 of 200 photos", "0.914", "No vehicle 20", "Set aside 7"])
def test_headline_counts_the_photos(words):
    assert words in visible_text(section(render(make_masking_report()), "summary"))


def test_mean_iou_is_not_mentioned_when_no_truth_is_known():
    page = render(make_masking_report(mean_iou=None, ious=[0] * NUM_BINS))
    assert "IoU" not in section(page, "summary") + section(page, "measures")


@pytest.mark.parametrize(("mean_iou", "sentence"), [(None, "Signs of doubt"), (0.9, "agrees least with it")])
def test_the_page_says_what_makes_a_photo_doubtful(mean_iou, sentence):
    assert sentence in section(render(make_masking_report(mean_iou=mean_iou)), "doubtful")


def test_classes_are_listed_most_frequent_first_and_what_was_not_found_last():
    found = section(render(make_masking_report(classes={"bus": 2, "car": 150, "truck": 30})), "found")
    assert re.findall(r'<th scope="row">(\w[\w ]*)</th>', found)[:4] == ["car", "truck", "bus", "no vehicle"]


def test_a_flag_names_the_setting_that_leaves_its_photos_out():
    assert "mask.exclude.several_vehicles" in section(render(make_masking_report()), "found")


def test_an_unknown_flag_is_shown_by_its_name():
    assert "very blurred" in section(render(make_masking_report(flags={"very_blurred": 3})), "found")


def test_a_table_says_how_many_photos_each_limit_would_leave_out():
    stabilities = [0] * NUM_BINS
    stabilities[9], stabilities[12], stabilities[19] = 2, 3, 175
    text = visible_text(section(render(make_masking_report(stabilities=stabilities)), "measures"))
    rows = {row[0]: int(row[2]) for row in re.findall(r"(0\.\d5|0\.\d0) (\d+) (\d+) (\d+)(?= )", text)}
    assert (rows["0.45"], rows["0.50"], rows["0.65"], rows["0.95"]) == (0, 2, 5, 5)


def test_a_detector_without_masks_has_no_stability_chart():
    page = section(render(make_masking_report(stabilities=[0] * NUM_BINS)), "measures")
    assert "finds boxes and no masks" in page
    assert page.count("<svg") == 3


def test_a_dataset_without_any_vehicle_says_what_to_check():
    empty = [0] * NUM_BINS
    report = make_masking_report(
        outcomes={"no_vehicle": 4}, classes={}, flags={}, scores=empty, areas=empty, stabilities=empty, ious=empty
    )
    page = section(render(report), "measures")
    assert "mask.detector.classes" in page
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("name", "field", "empty", "sentence"),
    [
        ("doubtful", "doubtful", [], "no doubtful photos"),
        ("sample", "sheet", [], "no sample"),
        ("data", "quarantined", {}, "No photo of the dataset was quarantined"),
        ("found", "flags", {}, "No flag was set"),
    ],
)
def test_an_empty_section_says_so(name, field, empty, sentence):
    assert sentence in section(render(make_masking_report(**{field: empty})), name)


def test_a_caption_gives_class_score_notes_and_key():
    look = make_masked_photo(notes=["several vehicles", "IoU 0.41"])
    text = visible_text(section(render(make_masking_report(doubtful=[look])), "doubtful"))
    assert "car 0.98 several vehicles · IoU 0.41 photos/0.jpg" in text


def test_text_from_data_is_escaped_wherever_it_appears():
    evil = "<img src=x onerror=alert(1)>\"/'&"
    look = make_masked_photo(key=evil, vehicle_class=evil, notes=[evil])
    report = make_masking_report(
        title=evil,
        facts=[(evil, evil)],
        classes={evil: 3},
        flags={evil: 1},
        quarantined={evil: 1},
        doubtful=[look],
        sheet=[look],
    )
    page = render(report)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 15


def test_nothing_is_fetched_from_outside_and_no_script_may_run():
    page = render(make_masking_report())
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'none'" in page


def test_ninety_detailed_photos_stay_below_five_megabytes():
    """Detail of four pixels and grain on top: half as many bytes again as photos of cars take."""
    generator = np.random.default_rng(0)
    detail = resize(generator.integers(0, 256, (45, 60, 3), dtype=np.uint8), 180, 240)
    photo = (detail + generator.normal(0, 4, detail.shape)).clip(0, 255).astype(np.uint8)
    looks = [make_masked_photo(photo=photo, result=photo)] * 45
    assert len(render(make_masking_report(doubtful=looks, sheet=looks)).encode()) < 5_000_000


def test_the_same_report_renders_to_the_same_bytes():
    assert render(make_masking_report()) == render(make_masking_report())


def test_a_histogram_counts_the_ends_and_leaves_out_what_is_unknown():
    counts = histogram(np.array([0, 0.04, 0.05, 1, 1.0000001, np.nan], np.float32))
    assert counts == [2, 1, *[0] * 17, 2]


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    values = np.random.default_rng(0).random(100)
    parts = zip(histogram(values[:30]), histogram(values[30:]), strict=True)
    assert [a + b for a, b in parts] == histogram(values)


def test_a_histogram_with_other_bins_is_our_mistake():
    with pytest.raises(AssertionError):
        make_masking_report(scores=[1, 2, 3])


def test_a_single_photo_of_a_million_is_still_a_visible_column():
    svg = ET.fromstring(histogram_chart([1, *[0] * 18, 1_000_000], "score"))
    assert [float(column.get("height")) >= 2 for column in svg.findall("rect")] == [True, True]


def test_no_vehicle_is_the_most_doubtful():
    bad = {"score": 0.5, "stability": 0.3, "several_vehicles": True, "touches_border": True, "area_fraction": 0.01}
    assert doubt_score("no_vehicle", None, None, None, None, None) > doubt_score("vehicle", **bad)


@pytest.mark.parametrize(
    "sign",
    [
        {"score": 0.6},
        {"stability": 0.6},
        {"several_vehicles": True},
        {"touches_border": True},
        {"area_fraction": 0.02},
    ],
)
def test_each_bad_sign_makes_a_photo_more_doubtful(sign):
    assert doubt_score(**{**SURE, **sign}) > doubt_score(**SURE) + 0.05


def test_a_sure_mask_leaves_little_doubt():
    assert doubt_score(**SURE) < 0.05


def test_a_border_alone_is_less_doubtful_than_a_second_vehicle():
    assert doubt_score(**{**SURE, "touches_border": True}) < doubt_score(**{**SURE, "several_vehicles": True})


def test_what_a_detector_does_not_tell_changes_nothing():
    assert doubt_score(**{**SURE, "stability": None}) == doubt_score(**{**SURE, "stability": 1.0})
