"""Charts of a comparison: tree, learning curves, and differences in test accuracy."""

import re
from itertools import pairwise

import pytest

from carclass.experiments import charts, report
from carclass.experiments.pairs import pairs_with_best
from carclass.experiments.report import render_comparison
from carclass.experiments.results import STATES
from tests.helpers.pages import comparison_page, section, section_text
from tests.helpers.trees import (
    edge_case_comparisons,
    make_comparison,
    make_run,
    sixteen,
)


def test_tree_order_puts_children_below_parents():
    runs = report.charted_runs(sixteen())
    order = [(run.name[-3:], depth) for run, depth in charts.tree_order(runs)]
    assert order[1:7] == [("002", 0), ("003", 1), ("004", 1), ("005", 1), ("006", 2), ("008", 1)]


def test_tree_order_has_every_run():
    assert len(charts.tree_order(report.charted_runs(sixteen()))) == 16


def test_edges_are_labelled_with_the_parent_epoch():
    assert re.findall(r"@\d+", section_text(comparison_page(), "tree")) == [*["@12"] * 3, "@69", "@12", "@22", "@24"]


def test_every_edge_is_drawn():
    assert section(comparison_page(), "tree").count('class="edge"') == 7


@pytest.mark.parametrize("state", STATES)
def test_states_have_labels_and_distinct_shapes(state):
    page = render_comparison(make_comparison([make_run(), make_run("other", state=state)]))
    assert section_text(page, "tree").count(state) >= 2
    assert len({*charts.SHAPES.values()}) == len(STATES)


def test_every_run_with_epochs_has_a_labelled_curve():
    drawn = charts.all_curves(report.charted_runs(sixteen()))
    assert len(re.findall(r'<text class="label ', drawn)) == 15


def test_labels_are_in_the_order_of_the_values_that_they_name():
    curve = charts.ChartedRun("a", None, "", "", "finished", 0.9, None, [0.2, 0.9, 0.3], is_best=True)
    other = curve._replace(name="b", val_accuracies=[0.2, 0.5, 0.6], is_best=False)
    drawn = charts.all_curves([curve, other])
    labels = re.findall(r'<text class="label [a-z]*" x="[\d.]+" y="([\d.]+)">(\w) ', drawn)
    assert [name for _, name in sorted(labels, key=lambda label: float(label[0]))] == ["a", "b"]


def test_nan_splits_a_curve():
    drawn = charts.all_curves(report.charted_runs(edge_case_comparisons()["a gap"]))
    assert drawn.count("<polyline") == 2


@pytest.mark.parametrize("targets", [[], [5.0], [50.0, 51.0, 52.0], [0.0] * 6, [99.0] * 6, [0.0, 1.0, 98.0, 99.0]])
def test_labels_are_spread_within_limits(targets):
    places = charts.spread_labels(targets, 15, 0, 100)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(places))
    assert all(0 <= place <= 100 for place in places)


def test_separate_labels_stay_in_place():
    assert charts.spread_labels([10, 40, 80], 15, 0, 100) == [10, 40, 80]


def test_difference_is_drawn_within_its_interval():
    drawn = charts.differences_chart([("a over b", pairs_with_best(sixteen())[0].result)])
    low, high = map(float, re.search(r'class="interval[^"]*" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', drawn).groups())
    assert low < float(re.search(r'class="difference[^"]*" cx="([\d.]+)"', drawn)[1]) < high
