"""The masking report: its contents, the ranking of doubtful photos, and its independence of other files."""

import re
import tracemalloc
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from carclass.data import dataset
from carclass.data.photo import resize
from carclass.masking.overview import (
    DOUBT_COLUMNS,
    NUM_DOUBTFUL,
    NUM_EMPTY,
    Overview,
    doubt_scores,
    warn_of_small_vehicles,
)
from carclass.masking.report import NUM_BINS, histogram, histogram_chart, render
from tests.helpers.pages import (
    MASKING_SECTIONS,
    has_linked_section,
    make_masked_photo,
    make_masking_report,
    section,
    visible_text,
)

DOUBTS = pa.schema([dataset.DETECTION.field(name) for name in DOUBT_COLUMNS])
CONFIDENT = {
    "outcome": "vehicle",
    "score": 0.99,
    "stability": 0.97,
    "several_vehicles": False,
    "touches_border": False,
    "area_fraction": 0.4,
}


@pytest.mark.parametrize("name", MASKING_SECTIONS)
def test_every_section_exists_and_is_linked_from_the_top(name):
    assert has_linked_section(render(make_masking_report()), name)


@pytest.mark.parametrize("words", ["90.0\u00a0%", "180 of 200 photos", "0.914", "No vehicle 20", "Quarantined 7"])
def test_the_summary_counts_photos(words):
    assert words in visible_text(section(render(make_masking_report()), "summary"))


def test_iou_is_not_mentioned_without_true_masks():
    page = render(make_masking_report(mean_iou=None, ious=[0] * NUM_BINS))
    assert "IoU" not in section(page, "summary") + section(page, "measures")


@pytest.mark.parametrize(("mean_iou", "sentence"), [(None, "Reasons for doubt"), (0.9, "Ranked by IoU")])
def test_the_ranking_of_doubtful_photos_is_explained(mean_iou, sentence):
    assert sentence in section(render(make_masking_report(mean_iou=mean_iou)), "doubtful")


def test_classes_are_listed_most_frequent_first_and_no_vehicle_last():
    html = section(render(make_masking_report(classes={"bus": 2, "car": 150, "truck": 30})), "detections")
    assert re.findall(r'<th scope="row">(\w[\w ]*)</th>', html)[:4] == ["car", "truck", "bus", "no vehicle"]


def test_a_flag_names_the_setting_that_excludes_its_photos():
    html = section(render(make_masking_report()), "detections").replace("<wbr>", "")  # where a line may break
    assert "mask.exclude.several_vehicles" in html


def test_shares_of_classes_and_flags_are_of_all_photos():
    counts = {
        "classes": {"car": 150},
        "flags": {"several_vehicles": 12},
        "outcomes": {"vehicle": 150, "no_vehicle": 50},
    }
    text = visible_text(section(render(make_masking_report(**counts)), "detections"))
    assert "car 150 75.0" in text
    assert "vehicles 12 6.0" in text


def test_an_unknown_flag_is_shown_by_its_name():
    assert "very blurred" in section(render(make_masking_report(flags={"very_blurred": 3})), "detections")


def test_a_table_counts_the_photos_that_each_limit_excludes():
    stabilities = [0] * NUM_BINS
    stabilities[9], stabilities[12], stabilities[19] = 2, 3, 175
    text = visible_text(section(render(make_masking_report(stabilities=stabilities)), "measures"))
    rows = {row[0]: int(row[2]) for row in re.findall(r"(0\.\d5|0\.\d0) (\d+) (\d+) (\d+)(?= )", text)}
    assert (rows["0.45"], rows["0.50"], rows["0.65"], rows["0.95"]) == (0, 2, 5, 5)


def test_a_detector_without_masks_has_no_stability_chart():
    page = section(render(make_masking_report(stabilities=[0] * NUM_BINS)), "measures")
    assert "finds boxes but no masks" in page
    assert page.count("<svg") == 3


def test_a_dataset_without_vehicles_names_settings_to_check():
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
        ("detections", "flags", {}, "No flag was set"),
    ],
)
def test_an_empty_section_has_a_note(name, field, empty, sentence):
    assert sentence in section(render(make_masking_report(**{field: empty})), name)


def test_a_caption_gives_class_score_notes_and_key():
    masked = make_masked_photo(notes=["several vehicles", "IoU 0.41"])
    text = visible_text(section(render(make_masking_report(doubtful=[masked])), "doubtful"))
    assert "car 0.98 several vehicles · IoU 0.41 photos/0.jpg" in text


def test_text_from_data_is_escaped_everywhere():
    markup = "<img src=x onerror=alert(1)>\"/'&"
    masked = make_masked_photo(key=markup, vehicle_class=markup, notes=[markup])
    report = make_masking_report(
        title=markup,
        facts=[(markup, markup)],
        classes={markup: 3},
        flags={markup: 1},
        quarantined={markup: 1},
        doubtful=[masked],
        sheet=[masked],
    )
    page = render(report)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 15


def test_nothing_is_fetched_and_scripts_are_forbidden():
    page = render(make_masking_report())
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'none'" in page


def test_ninety_detailed_photos_stay_below_five_megabytes():
    """Use photos with noise at two scales, 1.5 times the file size of car photos."""
    generator = np.random.default_rng(0)
    detail = resize(generator.integers(0, 256, (45, 60, 3), dtype=np.uint8), 180, 240)
    photo = (detail + generator.normal(0, 4, detail.shape)).clip(0, 255).astype(np.uint8)
    photos = [make_masked_photo(photo=photo, result=photo)] * 45
    assert len(render(make_masking_report(doubtful=photos, sheet=photos)).encode()) < 5_000_000


def test_the_same_report_renders_to_the_same_bytes():
    assert render(make_masking_report()) == render(make_masking_report())


def test_a_histogram_counts_both_ends_and_ignores_nan():
    counts = histogram(np.array([0, 0.04, 0.05, 1, 1.0000001, np.nan], np.float32))
    assert counts == [2, 1, *[0] * 17, 2]


def test_histograms_of_parts_sum_to_that_of_the_whole():
    values = np.random.default_rng(0).random(100)
    parts = zip(histogram(values[:30]), histogram(values[30:]), strict=True)
    assert [a + b for a, b in parts] == histogram(values)


def test_a_histogram_with_another_number_of_bins_fails_an_assertion():
    with pytest.raises(AssertionError):
        make_masking_report(scores=[1, 2, 3])


def test_a_single_photo_of_a_million_is_visible():
    svg = ET.fromstring(histogram_chart([1, *[0] * 18, 1_000_000], "score"))
    assert [float(column.get("height")) >= 2 for column in svg.findall("rect")] == [True, True]


def doubt_score(**row: Any) -> float:
    return float(doubt_scores(pa.Table.from_pylist([row], DOUBTS))[0])


def test_no_vehicle_is_the_most_doubtful():
    bad = {"score": 0.5, "stability": 0.3, "several_vehicles": True, "touches_border": True, "area_fraction": 0.01}
    assert doubt_score(outcome="no_vehicle") > doubt_score(outcome="vehicle", **bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": 0.6},
        {"stability": 0.6},
        {"several_vehicles": True},
        {"touches_border": True},
        {"area_fraction": 0.02},
    ],
)
def test_each_weak_value_raises_the_doubt_score(changes):
    assert doubt_score(**{**CONFIDENT, **changes}) > doubt_score(**CONFIDENT) + 0.05


def test_a_confident_mask_has_a_low_doubt_score():
    assert doubt_score(**CONFIDENT) < 0.05


def test_touching_the_border_is_less_doubtful_than_several_vehicles():
    assert doubt_score(**{**CONFIDENT, "touches_border": True}) < doubt_score(**{**CONFIDENT, "several_vehicles": True})


def test_missing_values_do_not_change_the_doubt_score():
    assert doubt_score(**{**CONFIDENT, "stability": None}) == doubt_score(**{**CONFIDENT, "stability": 1.0})


def index_of(num_rows: int) -> pa.Table:
    """Return rows of overview.COLUMNS; a tenth have no vehicle, and of the others a third have a truck."""
    scores = np.random.default_rng(0).random((num_rows, 3)).astype(np.float32)
    measured = ("score", "stability", "area_fraction")
    is_empty = np.arange(num_rows) % 10 == 0
    return pa.table({
        "key": [f"{i:06d}.jpg" for i in range(num_rows)],
        "image_id": [f"{num_rows - i:06d}" for i in range(num_rows)],
        "vehicle_class": pa.array(np.where(np.arange(num_rows) % 3 == 1, "truck", "car"), mask=is_empty),
        "outcome": np.where(is_empty, "no_vehicle", "vehicle"),
        **{name: pa.array(scores[:, i], mask=is_empty) for i, name in enumerate(measured)},
        **{name: pa.array(scores[:, 0] > 0.5, mask=is_empty) for name in ("several_vehicles", "touches_border")},
    })  # fmt: skip


def overview_of(index: pa.Table, ious: dict[str, float], num_parts: int) -> Overview:
    """Return the overview of rows in several parts, each other one added by another process."""
    overview, size = Overview(7, ious), -(-len(index) // num_parts)
    for start in range(0, len(index), 2 * size):
        other = Overview(7, ious)
        overview.add(index.slice(start, size))
        other.add(index.slice(start + size, size))
        overview.merge(other)
    return overview


@pytest.mark.parametrize("num_parts", [1, 7])
def test_the_most_doubtful_photos_come_first_with_few_of_those_without_a_vehicle(num_parts):
    index, ious = index_of(1000), {"000003.jpg": 0.0, "000004.jpg": 1.0}
    rows = {row.pop("key"): row for row in index.to_pylist()}
    doubts = dict(zip(rows, doubt_scores(index).tolist(), strict=True)) | {key: 1 - iou for key, iou in ious.items()}
    ranked = sorted(rows, key=lambda key: (-doubts[key], key))
    empty = [key for key in ranked if rows[key]["outcome"] == "no_vehicle"]
    expected = [key for key in ranked if key not in empty[NUM_EMPTY:]][:NUM_DOUBTFUL]
    assert overview_of(index, ious, num_parts).doubtful == expected


def test_the_counts_of_parts_are_those_of_all_rows():
    index = index_of(1000)
    whole, parts = overview_of(index, {}, 1), overview_of(index, {}, 9)
    assert whole.sampled == parts.sampled == sorted(index["key"].to_pylist(), reverse=True)[:7]
    assert whole.num_rows == parts.num_rows == 1000
    assert whole.outcomes == parts.outcomes == {"vehicle": 900, "no_vehicle": 100}
    assert whole.flags == parts.flags
    assert whole.classes == parts.classes == {"car": 600, "truck": 300}
    for name, counts in whole.histograms.items():
        assert counts.tolist() == parts.histograms[name].tolist() == histogram(index[name].drop_null().to_numpy())


def test_chosen_photos_have_their_places():
    index, overview = index_of(1000), Overview(7, {})
    for part in range(4):
        overview.add(index.slice(250 * part, 250), f"part {part}")
    assert overview.places.keys() == {*overview.sampled, *overview.vehicles["key"].to_pylist()} | {
        *overview.empty["key"].to_pylist()
    }
    keys = index["key"].to_pylist()
    for key, (part, position) in overview.places.items():
        assert keys[250 * int(part[-1]) + position] == key


def test_choosing_doubtful_photos_takes_no_memory_per_photo():
    index = index_of(50_000)
    tracemalloc.start()
    before, overview = pa.total_allocated_bytes(), overview_of(index, {}, 50)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    assert pa.total_allocated_bytes() - before < 100_000
    assert len(overview.doubtful) == NUM_DOUBTFUL
    tracemalloc.stop()


@pytest.mark.parametrize(("area", "warnings"), [(0.05, 1), (0.3, 0)])
def test_photos_that_are_mostly_without_a_large_vehicle_are_warned_of(
    area: float, warnings: int, caplog: pytest.LogCaptureFixture
):
    index = index_of(1000)
    place = index.column_names.index("area_fraction")
    is_empty = pc.equal(index["outcome"], "no_vehicle")
    areas = pc.if_else(is_empty, pa.scalar(None, pa.float32()), pa.scalar(area, pa.float32()))
    warn_of_small_vehicles(overview_of(index.set_column(place, "area_fraction", areas), {}, 3), "sheet.jpg")
    assert len(caplog.messages) == warnings
    assert all("of 1,000 photos, 100 have no vehicle and 900 one that covers less" in text for text in caplog.messages)


def test_half_of_the_photos_in_the_first_bin_have_less_than_its_width():
    counts = [150] + [3] * 10 + [0] * 9
    page = visible_text(section(render(make_masking_report(areas=counts)), "measures"))
    assert "Half of the photos have less than 0.05." in page
