"""Charts of a sweep: contents, and edge cases."""

import re
import xml.etree.ElementTree as ET

import pytest

from carclass.formatting import device_time_text, value_text
from carclass.reporting.axes import fit_text
from carclass.tuning import charts, marks
from carclass.tuning.search_space import Dimension
from tests.helpers.sweeps import DIMENSIONS, FLIP, edge_case_sweeps, make_sweep

CHARTS = [
    charts.learning_curves,
    charts.accuracy_against_time,
    charts.best_so_far,
    charts.pruning,
    charts.parallel_coordinates,
]


def numbers(svg: str) -> list[float]:
    """Return all coordinates of an SVG."""
    texts = [
        element.get(name)
        for element in ET.fromstring(svg).iter()
        for name in ("x", "y", "x1", "y1", "cx", "points", "transform")
    ]
    return [float(number) for text in filter(None, texts) for number in re.findall(r"-?[\d.]+|nan|inf", text)]


@pytest.mark.parametrize("name", edge_case_sweeps())
@pytest.mark.parametrize("chart", CHARTS)
def test_chart_of_edge_case_stays_inside_its_frame(chart, name):
    svg = chart(edge_case_sweeps()[name])
    assert [number for number in numbers(svg) if not -30 <= number <= 1000] == []


@pytest.mark.parametrize("name", edge_case_sweeps())
def test_slice_plots_of_edge_case_stay_inside_their_frames(name):
    sweep = edge_case_sweeps()[name]
    coordinates = [
        number for dimension in sweep.dimensions for number in numbers(charts.slice_plot(sweep, dimension.key))
    ]
    assert [number for number in coordinates if not -30 <= number <= 340] == []


def test_curve_of_pruned_trial_ends_in_a_cross():
    sweep = make_sweep()
    num_pruned = sum(result.trial.state == "pruned" for result in sweep.trials)
    assert charts.learning_curves(sweep).count('class="cross"') == num_pruned > 2


def test_nan_leaves_a_gap_in_the_curve():
    assert charts.learning_curves(edge_case_sweeps()["a gap"]).count('class="curve"') == 2


def test_tooltip_describes_the_trial():
    sweep = make_sweep()
    titles = [element.text for element in ET.fromstring(charts.accuracy_against_time(sweep)).iter("title")]
    assert any(title.startswith("trial 0, complete: lr=6e-4") for title in titles)


def test_best_so_far_ends_with_the_best_of_the_search():
    sweep = make_sweep()
    best = sweep.complete[0]
    assert f"trial {best.trial.number}: {best.accuracy * 100:.1f}\u00a0%" in charts.best_so_far(sweep)


def test_decades_of_logarithmic_axis_are_equally_long():
    axis = marks.setting_axis(DIMENSIONS[0], [])
    assert [round(axis.place(value), 6) for value in (1e-4, 1e-3, 1e-2)] == [0, 0.5, 1]


def test_value_beyond_the_range_extends_the_axis():
    axis = marks.setting_axis(DIMENSIONS[1], [128])
    assert axis.place(64) < axis.place(128) == 1


def test_non_numeric_value_has_its_own_place():
    axis = marks.setting_axis(DIMENSIONS[3], [None])
    assert (axis.place(None), axis.ticks[0].text) == (0, "null")
    assert axis.place(0.0) > 0.1


def test_long_choices_are_labelled_by_their_differences():
    choices = tuple(f"s3://bucket/runs/{name}/model.safetensors" for name in ("a-1", "b-22"))
    ticks = marks.setting_axis(Dimension(key="train.parent", choices=choices), []).ticks
    assert [tick.text for tick in ticks] == ["…a-1", "…b-22"]


def test_long_choices_have_full_names_as_tooltips():
    sweep = edge_case_sweeps()["long names"]
    titles = [element.text for element in ET.fromstring(charts.slice_plot(sweep, FLIP)).iter("title")]
    assert set(sweep.dimensions[0].choices) <= set(titles)


def test_ticks_of_integers_are_integers():
    axis = marks.setting_axis(Dimension(key="train.x.y", low=1, high=3), [])
    assert [tick.text for tick in axis.ticks] == [
        "1",
        "2",
        "3",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(64, "64"), (0.05, "0.05"), (3e-4, "3e-4"), (1.25e-5, "1.25e-5"), (2.0, "2"), (True, "true"), (None, "null")],
)
def test_value_text(value, text):
    assert value_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8.0 GPU seconds"), (738, "12.3 GPU minutes"), (3600 * 340, "340 GPU hours")]
)
def test_device_time_text(seconds, text):
    assert device_time_text(seconds, "GPU") == text


def test_fit_text_keeps_start_and_end():
    assert fit_text("resnet50-imagenet-v2", 11) == "resne…et-v2"
