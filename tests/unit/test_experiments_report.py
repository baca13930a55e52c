"""The page that compares a tree of experiments: its figures, its charts, and trees that are odd."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from carclass.errors import UserError
from carclass.experiments import report
from carclass.experiments.report import changes, groups, render_comparison, rivals, summarise
from tests.helpers.pages import COMPARISON_SECTIONS, comparison_page, section, section_text, visible_text
from tests.helpers.trees import (
    hostile,
    make_comparison,
    make_entry,
    make_epochs,
    make_settings,
    make_test,
    odd_comparisons,
    sixteen,
)


def row_of(page: str, section_name: str, run: str) -> list[str]:
    """The cells of a run's row in a section's first table."""
    rows = re.findall(r"<tr.*?</tr>", section(page, section_name), re.S)
    row = next(row for row in rows if re.search(rf">{run}<", row))
    cells = re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
    return [visible_text(cell).replace("\u00a0", " ").strip() for cell in cells]


def entry(name: str):
    return next(one for one in sixteen().entries if one.name == name)


def alike(treatment: str, name: str, **changed):
    """An experiment of one recipe on photos treated so."""
    settings = make_settings(name=name, dataset=treatment)
    values = {"dataset": treatment, "treatment": treatment, "settings": settings, "test": make_test(0.6)}
    return make_entry(name, **(values | changed))


# The best run


def test_the_best_run_has_the_highest_val_accuracy():
    assert sixteen().best.name == "exp_015"


def test_the_test_has_no_say_in_which_run_is_best():
    entries = [make_entry("low", 0.5, test=make_test(0.9)), make_entry("high", 0.6, test=make_test(0.1))]
    assert make_comparison(entries).best.name == "high"


@pytest.mark.parametrize("state", ["stale", "begun", "missing", "failed"])
def test_a_run_that_has_not_finished_is_never_the_best(state):
    entries = [make_entry("low", 0.5), make_entry("high", 0.6, state=state)]
    assert make_comparison(entries).best.name == "low"


def test_a_run_that_diverged_is_never_the_best():
    assert odd_comparisons()["diverged"].best.name == "exp_001"


def test_the_earlier_of_two_runs_of_one_val_accuracy_is_the_best():
    assert make_comparison([make_entry("first"), make_entry("second")]).best.name == "first"


@pytest.mark.parametrize("entries", [[], [make_entry(state="begun")], [make_entry(val=math.nan)]])
def test_without_a_finished_run_the_user_is_told_what_to_run(entries):
    with pytest.raises(UserError, match=r"has finished.*python jobs/lineage.py run all"):
        render_comparison(make_comparison(entries))


def test_the_best_epoch_is_the_last_stage_s_and_the_earlier_of_equals():
    frozen, unfrozen = make_epochs(0.9, 3), make_epochs(0.5, 4, "unfrozen")
    for row, value in zip(unfrozen, (0.3, 0.6, 0.6, math.nan), strict=True):
        row["val_accuracy"] = value
    assert make_entry(epochs=[*frozen, *unfrozen]).best_epoch == 2


# The sections


@pytest.mark.parametrize("name", COMPARISON_SECTIONS)
def test_every_section_is_there_and_linked_from_the_top(name):
    page = comparison_page()
    assert f'<section id="{name}"' in page
    assert f'href="#{name}"' in page


def test_the_summary_has_the_best_run_s_test_with_its_interval():
    test = sixteen().best.test
    low, high = test.interval
    assert f"{test.accuracy:.1%} {low:.1%} to {high:.1%}".replace("%", " %") in section_text(
        comparison_page(), "summary"
    )


def test_the_summary_has_the_baseline_s_best():
    text = section_text(comparison_page(), "summary")
    assert "71.5 % val accuracy of its exp_013; test 64.6 %" in text


def test_the_summary_counts_runs_by_state():
    assert "12 of 16 1 stale, 1 begun, 1 missing, 1 failed" in section_text(comparison_page(), "summary")


def test_runs_above_the_baseline_are_counted():
    assert any("Run by run, 7 of 9 are above it on val" in one for one in summarise(sixteen()))


@pytest.mark.parametrize(
    "sentence",
    ["The best run was chosen on val", "their p-values are not corrected", "Each run was trained with one seed"],
)
def test_the_summary_says_how_far_to_trust_it(sentence):
    assert sentence in section_text(comparison_page(), "summary")


def test_runs_that_differ_in_their_seed_alone_are_named():
    again = make_entry("again", settings=make_settings(name="again", seed=124))
    assert "differ in their seed alone: exp_001, again" in section_text(
        render_comparison(make_comparison([make_entry(), again])), "summary"
    )


def test_a_comparison_without_a_baseline_speaks_of_none():
    main = render_comparison(make_comparison([make_entry()])).partition("<main>")[2]
    assert "baseline" not in visible_text(main).lower()


def test_a_run_s_row_has_its_settings_and_figures():
    row = row_of(comparison_page(), "runs", "exp_013")
    assert row[1:8] == ["exp_012@24", "v2 crop", "adam 1e-5", "0.3", "H", "21 of 75", "20"]


def test_a_run_s_val_accuracy_stands_beside_the_baseline_s():
    assert row_of(comparison_page(), "runs", "exp_013")[8:10] == ["73.5 % ▲", "71.5 %"]


@pytest.mark.parametrize(("val", "sign"), [(0.6, "▲"), (0.4, "▼"), (0.5, "=")])
def test_a_sign_tells_which_is_higher(val, sign):
    page = render_comparison(make_comparison([make_entry("run", val, baseline_val=0.5)]))
    assert row_of(page, "runs", "run")[8] == f"{val:.1%} {sign}".replace("%", " %")


def test_the_sign_is_told_in_words_too():
    assert 'aria-label="above the baseline"' in section(comparison_page(), "runs")


def test_a_run_without_test_is_not_evaluated():
    assert row_of(comparison_page(), "runs", "exp_007")[10] == "not evaluated"


def test_a_stale_run_has_its_state_and_reason():
    assert row_of(comparison_page(), "runs", "exp_006")[0] == "exp_006 stale exp_005 was trained anew since"


def test_both_stages_have_their_optimizers():
    settings = make_settings() | {"unfrozen.optimizer": "sgd", "unfrozen.lr": 3e-5, "unfrozen.epochs": 5}
    row = row_of(render_comparison(make_comparison([make_entry("run", settings=settings)])), "runs", "run")
    assert (row[3], row[6]) == ("adam 1e-4, then sgd 3e-5", "10 of 35")


def test_a_run_that_diverged_has_no_sign():
    assert row_of(render_comparison(odd_comparisons()["diverged"]), "runs", "diverged")[8:10] == ["nan", "50.0 %"]


# Changes


def test_changes_are_those_against_the_parent():
    assert changes(entry("exp_006"), entry("exp_005")) == [("model.dropout", "0.2", "0.3"), ("lr", "3e-5", "5e-5")]


def test_the_stages_of_two_runs_are_compared_with_each_other():
    found = changes(entry("exp_013"), entry("exp_012"))
    assert ("stage", "frozen", "unfrozen") in found
    assert ("lr", "1e-4", "1e-5") in found


def test_a_setting_that_only_one_run_has_gets_a_dash():
    assert ("views", "2", "\u2013") in changes(entry("exp_013"), entry("exp_012"))


def test_runs_with_more_stages_are_compared_key_by_key():
    parent = make_entry(settings=make_settings() | {"unfrozen.lr": 1e-3})
    child = make_entry(settings=make_settings() | {"unfrozen.lr": 1e-4})
    assert changes(child, parent) == [("unfrozen.lr", "1e-3", "1e-4")]


def test_changes_are_on_the_page():
    row = row_of(comparison_page(), "changes", "exp_006")
    assert row == ["exp_006", "exp_005@69", "model.dropout 0.2 → 0.3 lr 3e-5 → 5e-5"]


def test_a_run_that_changes_nothing_says_so():
    entries = [make_entry("a"), make_entry("b", settings=make_settings(name="b"), parent="a@2", parent_name="a")]
    assert row_of(render_comparison(make_comparison(entries)), "changes", "b")[2] == "no setting differs"


def test_runs_that_all_start_from_elsewhere_change_nothing():
    assert "No run starts from another" in section_text(render_comparison(make_comparison([make_entry()])), "changes")


# Better than


def test_the_best_is_compared_with_the_second_and_with_other_treatments():
    found = {pair.theirs.name: pair.reason for pair in rivals(sixteen())}
    assert found == {"exp_016": "second on val, best of crop and mask", "exp_014": "best of whole photo"}


def test_the_best_is_compared_with_its_parent():
    entries = [make_entry("a", 0.5), make_entry("b", 0.6), make_entry("c", 0.7, parent="a@2", parent_name="a")]
    assert {pair.theirs.name: pair.reason for pair in rivals(make_comparison(entries))} == {
        "a": "its parent",
        "b": "second on val",
    }


def test_a_parent_that_is_second_is_compared_once():
    entries = [make_entry("a", 0.5), make_entry("b", 0.6, parent="a@2", parent_name="a")]
    assert [pair.reason for pair in rivals(make_comparison(entries))] == ["its parent, second on val"]


def test_the_difference_is_on_the_page_with_its_interval():
    verdict = rivals(sixteen())[1].verdict
    row = row_of(comparison_page(), "better", "exp_014")
    interval = f"+{verdict.low * 100:.1f} to +{verdict.high * 100:.1f}"
    assert row[2:] == ["+3.6", interval, "below 0.001", "161", "89", "2,000", "better"]


def test_photos_are_compared_by_their_keys():
    ours, theirs = make_test(0.7), make_test(0.7)
    kept = np.arange(500, 2000)
    theirs = replace(theirs, keys=theirs.keys[500:], correct=theirs.correct[kept])
    pair = report.pair(make_entry(test=ours), make_entry(test=theirs), "", 1)
    assert (pair.verdict.num_photos, pair.verdict.only_ours, pair.verdict.only_theirs) == (1500, 0, 0)


def test_runs_without_a_photo_in_common_are_not_compared():
    assert "no test photos in common" in section_text(render_comparison(odd_comparisons()["other photos"]), "better")


def test_a_rival_that_was_not_evaluated_is_named():
    entries = [make_entry("a", 0.7, test=make_test(0.7)), make_entry("b", 0.6)]
    assert row_of(render_comparison(make_comparison(entries)), "better", "a")[2] == "b not evaluated"


def test_a_single_run_is_compared_with_none():
    assert "No other run has finished" in section_text(render_comparison(make_comparison([make_entry()])), "better")


# Cropping and masking


def test_runs_with_equal_settings_on_other_photos_are_grouped():
    found = [[one.name for one in group.entries] for group in groups(sixteen())]
    assert found == [["exp_002", "exp_012"], ["exp_014", "exp_015", "exp_016"]]


def test_every_treatment_is_compared_with_every_other():
    names = [(pair.ours.name, pair.theirs.name) for pair in groups(sixteen())[1].pairs]
    assert names == [("exp_015", "exp_014"), ("exp_016", "exp_014"), ("exp_016", "exp_015")]


@pytest.mark.parametrize("changed", [{"seed": 9}, {"parent": "s3://x"}, {"keep_checkpoints": 5}, {"num_workers": 2}])
def test_settings_that_are_not_of_the_recipe_leave_a_group_together(changed):
    other = alike("crop", "b", settings=make_settings(name="b", dataset="crop", **changed))
    assert len(groups(make_comparison([alike("none", "a"), other]))) == 1


@pytest.mark.parametrize("changed", [{"stage.lr": 1.0}, {"model.dropout": 0.9}, {"stage.epochs": 3}])
def test_other_settings_part_a_group(changed):
    other = alike("crop", "b", settings=make_settings(name="b", dataset="crop", **changed))
    assert groups(make_comparison([alike("none", "a"), other])) == []


def test_of_several_runs_of_a_treatment_the_best_on_val_is_compared():
    entries = [alike("none", "a"), alike("crop", "b", val_accuracy=0.7), alike("crop", "c", val_accuracy=0.8)]
    [group] = groups(make_comparison(entries))
    assert [(pair.ours.name, pair.theirs.name) for pair in group.pairs] == [("c", "a")]


def test_an_unfinished_run_of_a_treatment_gives_way_to_a_finished_one():
    entries = [alike("none", "a"), alike("crop", "b", state="stale", val_accuracy=0.9), alike("crop", "c")]
    [group] = groups(make_comparison(entries))
    assert group.pairs[0].ours.name == "c"


def test_without_a_group_the_page_says_that_nothing_can_be_told():
    text = section_text(render_comparison(make_comparison([make_entry()])), "treatments")
    assert "No two runs have the same settings on photos that were treated in different ways" in text


# Test of the best run


def test_the_test_has_the_best_run_s_figures():
    metrics = sixteen().best.test.metrics
    text = section_text(comparison_page(), "test")
    assert f"{metrics['macro_average']['f1']:.3f}" in text
    assert f"{metrics['expected_calibration_error']:.1%}".replace("%", " %") in text


def test_the_weakest_classes_come_first_and_have_photos():
    test = make_test(0.7)
    test.metrics["per_class"][3] |= {"f1": 0.0, "support": 0}
    test.metrics["per_class"][4] |= {"f1": 0.1}
    found = report.weakest_classes(make_entry(test=test))
    assert found[0]["name"] == "Maker Model 04"
    assert [row["f1"] for row in found] == sorted(row["f1"] for row in found)


def test_the_report_of_the_best_run_is_linked():
    assert 'href="exp_015/report/report.html"' in section(comparison_page(), "test")


def test_a_best_run_without_test_says_so():
    assert "exp_001 is not evaluated" in section_text(render_comparison(make_comparison([make_entry()])), "test")


# The page as a whole


def test_text_from_data_is_escaped_wherever_it_appears():
    page = render_comparison(hostile())
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_nothing_is_fetched_from_outside():
    page = comparison_page()
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert {link for link, _ in sources if not link.startswith(("data:", "#"))} == {"exp_015/report/report.html"}


def test_no_script_may_run():
    assert "script-src 'none'" in comparison_page()


def test_the_same_comparison_renders_to_the_same_bytes():
    assert render_comparison(sixteen()) == comparison_page()


@pytest.mark.parametrize("name", odd_comparisons())
def test_an_odd_tree_has_a_page(name):
    page = render_comparison(odd_comparisons()[name])
    assert page.count("<section") == len(COMPARISON_SECTIONS)
    assert not re.search(r'="[^"]*\bnan\b', page)
