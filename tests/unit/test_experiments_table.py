"""Table of a comparison: a row per run, with nulls for unknown values."""

import json

import pytest

from carclass.experiments.report import comparison_table
from tests.helpers.trees import (
    HOSTILE,
    edge_case_comparisons,
    make_comparison,
    make_run,
    sixteen,
)

SECTIONS = ["summary", "tree", "curves", "runs", "changes", "better", "treatments", "test"]


def test_table_has_a_row_per_run_in_order_of_the_tree():
    assert comparison_table(sixteen())["name"].to_pylist() == [run.name for run in sixteen().runs]


def test_table_has_accuracies_of_run_and_baseline():
    row = comparison_table(sixteen()).to_pylist()[12]
    figures = [row[key] for key in ("val_accuracy", "baseline_val", "baseline_test", "epochs", "best_epoch")]
    assert figures == [pytest.approx(0.735), 0.715, 0.6458, 21, 20]


def test_table_has_test_accuracy_with_interval():
    row, test = comparison_table(sixteen()).to_pylist()[12], sixteen().runs[12].test
    assert (row["test_accuracy"], row["test_low"], row["test_high"]) == (test.accuracy, *test.interval)


def test_unknown_values_are_null():
    row = comparison_table(sixteen()).to_pylist()[10]
    keys = ("val_accuracy", "best_epoch", "test_accuracy", "test_photos", "baseline_test")
    assert [row[key] for key in keys] == [None] * 5


def test_test_accuracy_of_zero_is_not_null():
    assert comparison_table(edge_case_comparisons()["all zero"])["test_accuracy"].to_pylist() == [0.0]


@pytest.mark.parametrize("name", edge_case_comparisons())
def test_edge_case_has_a_table(name):
    assert comparison_table(edge_case_comparisons()[name]).num_rows == len(edge_case_comparisons()[name].runs)


def test_rows_are_json_serializable():
    assert json.dumps(comparison_table(sixteen()).to_pylist())


def test_table_without_finished_run():
    assert comparison_table(make_comparison([make_run(state="begun"), make_run(HOSTILE)])).num_rows == 2
