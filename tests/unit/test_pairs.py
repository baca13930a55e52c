"""Comparison of the best run with others, and of runs of one recipe on differently treated photos."""

from dataclasses import replace

import numpy as np
import pytest

from carclass.experiments.pairs import compare_pair, pairs_with_best, recipe_groups
from carclass.experiments.report import render_comparison
from tests.helpers.pages import (
    comparison_page,
    row_of,
    section_text,
)
from tests.helpers.trees import (
    edge_case_comparisons,
    make_comparison,
    make_run,
    make_settings,
    make_test_result,
    sixteen,
)


def make_recipe_run(treatment: str, name: str, **changed):
    """Return a run of a common recipe on photos with this treatment."""
    settings = make_settings(name=name, dataset=treatment)
    values = {"dataset": treatment, "treatment": treatment, "settings": settings, "test": make_test_result(0.6)}
    return make_run(name, **(values | changed))


# Pairs with the best run


def test_best_is_compared_with_second_and_other_treatments():
    reasons = {pair.second.name: pair.reason for pair in pairs_with_best(sixteen())}
    assert reasons == {"exp_016": "second best on val, best with crop and mask", "exp_014": "best with whole photo"}


def test_best_is_compared_with_its_parent():
    runs = [make_run("a", 0.5), make_run("b", 0.6), make_run("c", 0.7, parent="a@2", parent_name="a")]
    assert {pair.second.name: pair.reason for pair in pairs_with_best(make_comparison(runs))} == {
        "a": "its parent",
        "b": "second best on val",
    }


def test_parent_that_is_second_is_compared_once():
    runs = [make_run("a", 0.5), make_run("b", 0.6, parent="a@2", parent_name="a")]
    assert [pair.reason for pair in pairs_with_best(make_comparison(runs))] == ["its parent, second best on val"]


def test_page_has_difference_with_interval():
    result = pairs_with_best(sixteen())[1].result
    row = row_of(comparison_page(), "better", "exp_014")
    interval = f"+{result.low * 100:.1f} to +{result.high * 100:.1f}"
    assert row[2:] == ["+3.6", interval, "below 0.001", "161", "89", "2,000", "better"]


def test_photos_are_matched_by_key():
    first, second = make_test_result(0.7), make_test_result(0.7)
    kept = np.arange(500, 2000)
    second = replace(second, keys=second.keys[500:], image_ids=second.image_ids[500:], correct=second.correct[kept])
    pair = compare_pair(make_run(test=first), make_run(test=second), "", 1)
    assert (pair.result.num_photos, pair.result.only_first, pair.result.only_second) == (1500, 0, 0)


def test_other_photos_of_the_same_names_are_not_compared():
    first, other = make_test_result(0.7), make_test_result(0.7)
    other = replace(other, image_ids=[f"{i + 1500:064x}" for i in range(2000)])
    assert compare_pair(make_run(test=first), make_run(test=other), "", 1).result is None


@pytest.mark.parametrize("changed", ["first", "second"])
def test_evaluations_of_former_versions_are_matched_by_key_alone(changed: str):
    tests = {"first": make_test_result(0.7), "second": make_test_result(0.7)}
    tests[changed] = replace(tests[changed], image_ids=None)
    pair = compare_pair(make_run(test=tests["first"]), make_run(test=tests["second"]), "", 1)
    assert pair.result.num_photos == 2000


def test_runs_without_common_photos_are_not_compared():
    assert "no test photos in common" in section_text(
        render_comparison(edge_case_comparisons()["other photos"]), "better"
    )


def test_unevaluated_run_is_named():
    runs = [make_run("a", 0.7, test=make_test_result(0.7)), make_run("b", 0.6)]
    assert row_of(render_comparison(make_comparison(runs)), "better", "a")[2] == "b not evaluated"


def test_single_run_is_compared_with_none():
    assert "No other run has finished" in section_text(render_comparison(make_comparison([make_run()])), "better")


# Recipe groups


def test_runs_of_one_recipe_are_grouped():
    names = [[run.name for run in group.runs] for group in recipe_groups(sixteen())]
    assert names == [["exp_002", "exp_012"], ["exp_014", "exp_015", "exp_016"]]


def test_every_treatment_is_compared_with_every_other():
    names = [(pair.first.name, pair.second.name) for pair in recipe_groups(sixteen())[1].pairs]
    assert names == [("exp_015", "exp_014"), ("exp_016", "exp_014"), ("exp_016", "exp_015")]


@pytest.mark.parametrize("changed", [{"seed": 9}, {"parent": "s3://x"}, {"keep_checkpoints": 5}, {"num_workers": 2}])
def test_settings_outside_of_the_recipe_keep_a_group(changed):
    other = make_recipe_run("crop", "b", settings=make_settings(name="b", dataset="crop", **changed))
    assert len(recipe_groups(make_comparison([make_recipe_run("none", "a"), other]))) == 1


@pytest.mark.parametrize("changed", [{"stage.lr": 1.0}, {"model.dropout": 0.9}, {"stage.epochs": 3}])
def test_other_settings_split_a_group(changed):
    other = make_recipe_run("crop", "b", settings=make_settings(name="b", dataset="crop", **changed))
    assert recipe_groups(make_comparison([make_recipe_run("none", "a"), other])) == []


def test_best_run_of_a_treatment_is_compared():
    runs = [
        make_recipe_run("none", "a"),
        make_recipe_run("crop", "b", val_accuracy=0.7),
        make_recipe_run("crop", "c", val_accuracy=0.8),
    ]
    [group] = recipe_groups(make_comparison(runs))
    assert [(pair.first.name, pair.second.name) for pair in group.pairs] == [("c", "a")]


def test_finished_run_of_a_treatment_is_preferred():
    runs = [
        make_recipe_run("none", "a"),
        make_recipe_run("crop", "b", state="stale", val_accuracy=0.9),
        make_recipe_run("crop", "c"),
    ]
    [group] = recipe_groups(make_comparison(runs))
    assert group.pairs[0].first.name == "c"


def test_page_without_groups():
    text = section_text(render_comparison(make_comparison([make_run()])), "treatments")
    assert "No two runs have the same settings on differently treated photos" in text
