"""A comparison as a table: a row for each experiment, with empty places for what is not known."""

import json

import pytest

from carclass.experiments.report import comparison_table
from tests.helpers.trees import (
    HOSTILE,
    make_comparison,
    make_entry,
    odd_comparisons,
    sixteen,
)

SECTIONS = ["summary", "tree", "curves", "runs", "changes", "better", "treatments", "test"]


def test_the_table_has_a_row_for_each_experiment_in_the_tree_s_order():
    assert comparison_table(sixteen())["name"].to_pylist() == [one.name for one in sixteen().entries]


def test_the_table_has_our_figures_and_the_baseline_s():
    row = comparison_table(sixteen()).to_pylist()[12]
    figures = [row[key] for key in ("val_accuracy", "baseline_val", "baseline_test", "epochs", "best_epoch")]
    assert figures == [pytest.approx(0.735), 0.715, 0.6458, 21, 20]


def test_the_table_has_the_test_with_its_interval():
    row, test = comparison_table(sixteen()).to_pylist()[12], sixteen().entries[12].test
    assert (row["test_accuracy"], row["test_low"], row["test_high"]) == (test.accuracy, *test.interval)


def test_the_table_leaves_empty_what_is_not_known():
    row = comparison_table(sixteen()).to_pylist()[10]
    keys = ("val_accuracy", "best_epoch", "test_accuracy", "test_photos", "baseline_test")
    assert [row[key] for key in keys] == [None] * 5


def test_a_test_without_a_right_photo_has_accuracy_0_in_the_table():
    assert comparison_table(odd_comparisons()["all zero"])["test_accuracy"].to_pylist() == [0.0]


@pytest.mark.parametrize("name", odd_comparisons())
def test_an_odd_tree_has_a_table(name):
    assert comparison_table(odd_comparisons()[name]).num_rows == len(odd_comparisons()[name].entries)


def test_the_table_s_rows_are_plain_values():
    assert json.dumps(comparison_table(sixteen()).to_pylist())


def test_a_table_needs_no_finished_run():
    assert comparison_table(make_comparison([make_entry(state="begun"), make_entry(HOSTILE)])).num_rows == 2
