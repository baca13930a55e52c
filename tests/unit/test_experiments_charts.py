"""The pictures of a comparison: the tree, the curves, and the differences from the best run."""

import re
from itertools import pairwise

import pytest

from carclass.experiments import charts, report
from carclass.experiments.report import render_comparison, rivals
from tests.helpers.pages import comparison_page, section, section_text
from tests.helpers.trees import (
    make_comparison,
    make_entry,
    odd_comparisons,
    sixteen,
)


def test_the_tree_puts_children_below_their_parents():
    runs = report._runs(sixteen())
    order = [(run.name[-3:], depth) for run, depth in charts.tree_order(runs)]
    assert order[1:7] == [("002", 0), ("003", 1), ("004", 1), ("005", 1), ("006", 2), ("008", 1)]


def test_every_run_is_in_the_tree():
    assert len(charts.tree_order(report._runs(sixteen()))) == 16


def test_an_edge_of_the_tree_names_the_epoch_it_starts_from():
    assert re.findall(r"@\d+", section_text(comparison_page(), "tree")) == [*["@12"] * 3, "@69", "@12", "@22", "@24"]


def test_every_edge_of_the_tree_is_drawn():
    assert section(comparison_page(), "tree").count('class="edge"') == 7


@pytest.mark.parametrize("state", report.STATES)
def test_a_state_is_told_in_the_tree_by_word_and_by_shape(state):
    page = render_comparison(make_comparison([make_entry(), make_entry("other", state=state)]))
    assert section_text(page, "tree").count(state) >= 2
    assert len({*charts.SHAPES.values()}) == len(report.STATES)


def test_every_run_with_epochs_has_a_curve_with_its_name():
    drawn = charts.overlaid(report._runs(sixteen()))
    assert len(re.findall(r'<text class="label ', drawn)) == 15


def test_a_gap_in_a_curve_parts_it():
    drawn = charts.overlaid(report._runs(odd_comparisons()["a gap"]))
    assert drawn.count("<polyline") == 2


@pytest.mark.parametrize("wanted", [[], [5.0], [50.0, 51.0, 52.0], [0.0] * 6, [99.0] * 6, [0.0, 1.0, 98.0, 99.0]])
def test_labels_are_spread_within_their_room(wanted):
    found = charts.spread(wanted, 15, 0, 100)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(found))
    assert all(0 <= place <= 100 for place in found)


def test_labels_with_room_stay_where_they_are():
    assert charts.spread([10, 40, 80], 15, 0, 100) == [10, 40, 80]


def test_a_difference_is_drawn_at_its_place_between_its_ends():
    drawn = charts.differences([("a over b", rivals(sixteen())[0].verdict)])
    low, high = map(float, re.search(r'class="interval[^"]*" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', drawn).groups())
    assert low < float(re.search(r'class="difference[^"]*" cx="([\d.]+)"', drawn)[1]) < high
