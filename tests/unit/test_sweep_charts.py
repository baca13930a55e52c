"""The charts of a sweep: what they show, and that they hold whatever a sweep is like."""

import re
import xml.etree.ElementTree as ET

import pytest

from carclass.formatting import device_time_text, value_text
from carclass.reporting.axes import fit_text
from carclass.tuning import charts, marks
from carclass.tuning.search_space import Dimension
from tests.helpers.sweeps import DIMENSIONS, FLIP, make_sweep, odd_sweeps

CHARTS = [charts.learning_curves, charts.accuracy_against_time, charts.best_so_far, charts.pruning, charts.parallel]


def numbers(svg: str) -> list[float]:
    """Every coordinate of a picture."""
    found = [
        element.get(name)
        for element in ET.fromstring(svg).iter()
        for name in ("x", "y", "x1", "y1", "cx", "points", "transform")
    ]
    return [float(number) for text in filter(None, found) for number in re.findall(r"-?[\d.]+|nan|inf", text)]


@pytest.mark.parametrize("name", odd_sweeps())
@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_of_an_odd_sweep_stays_inside_its_picture(chart, name):
    svg = chart(odd_sweeps()[name])
    assert [number for number in numbers(svg) if not -30 <= number <= 1000] == []


@pytest.mark.parametrize("name", odd_sweeps())
def test_slices_of_an_odd_sweep_stay_inside_their_pictures(name):
    sweep = odd_sweeps()[name]
    found = [number for one in sweep.dimensions for number in numbers(charts.slices(sweep, one.key))]
    assert [number for number in found if not -30 <= number <= 340] == []


def test_a_pruned_trial_s_curve_ends_in_a_cross():
    sweep = make_sweep()
    num_pruned = sum(one.trial.state == "pruned" for one in sweep.outcomes)
    assert charts.learning_curves(sweep).count('class="cross"') == num_pruned > 2


def test_a_missing_accuracy_leaves_a_gap_in_its_curve():
    assert charts.learning_curves(odd_sweeps()["a gap"]).count('class="curve"') == 2


def test_a_tooltip_says_what_a_trial_was():
    sweep = make_sweep()
    titles = [element.text for element in ET.fromstring(charts.accuracy_against_time(sweep)).iter("title")]
    assert any(title.startswith("trial 0, complete: lr=6e-4") for title in titles)


def test_the_last_label_of_the_best_so_far_is_the_best_of_the_search():
    sweep = make_sweep()
    best = sweep.complete[0]
    assert f"trial {best.trial.number}: {best.accuracy * 100:.1f}\u00a0%" in charts.best_so_far(sweep)


def test_a_logarithmic_axis_has_its_decades_alike():
    axis = marks.axis_of(DIMENSIONS[0], [])
    assert [round(axis.place(value), 6) for value in (1e-4, 1e-3, 1e-2)] == [0, 0.5, 1]


def test_an_experiment_s_value_beyond_the_range_widens_the_axis():
    axis = marks.axis_of(DIMENSIONS[1], [128])
    assert axis.place(64) < axis.place(128) == 1


def test_an_experiment_s_value_that_is_no_number_has_a_place_of_its_own():
    axis = marks.axis_of(DIMENSIONS[3], [None])
    assert (axis.place(None), axis.ticks[0].text) == (0, "null")
    assert axis.place(0.0) > 0.1


def test_long_choices_are_told_by_what_differs():
    choices = tuple(f"s3://bucket/runs/{name}/model.safetensors" for name in ("a-1", "b-22"))
    ticks = marks.axis_of(Dimension(key="train.parent", choices=choices), []).ticks
    assert [tick.text for tick in ticks] == ["…a-1", "…b-22"]


def test_long_choices_have_all_of_their_names_as_tooltips():
    sweep = odd_sweeps()["long names"]
    titles = [element.text for element in ET.fromstring(charts.slices(sweep, FLIP)).iter("title")]
    assert set(sweep.dimensions[0].choices) <= set(titles)


def test_ticks_of_whole_numbers_are_whole():
    assert [tick.text for tick in marks.axis_of(Dimension(key="train.x.y", low=1, high=3), []).ticks] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(64, "64"), (0.05, "0.05"), (3e-4, "3e-4"), (1.25e-5, "1.25e-5"), (2.0, "2"), (True, "true"), (None, "null")],
)
def test_values_are_written_short(value, text):
    assert value_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8.0 GPU seconds"), (738, "12.3 GPU minutes"), (3600 * 340, "340 GPU hours")]
)
def test_times_are_told_in_a_unit_that_suits_them(seconds, text):
    assert device_time_text(seconds, "GPU") == text


def test_a_long_name_keeps_its_start_and_its_end():
    assert fit_text("resnet50-imagenet-v2", 11) == "resne…et-v2"
