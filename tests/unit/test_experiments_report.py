"""Report of a comparison: best run, sections of the page, changes, and edge cases."""

import math
import re

import pytest

from carclass.errors import UserError
from carclass.experiments import report
from carclass.experiments.loaded_comparison import LoadedComparison
from carclass.experiments.pairs import pairs_with_best
from carclass.experiments.report import render_comparison, summarise
from carclass.experiments.results import settings_diff
from tests.helpers.pages import (
    COMPARISON_SECTIONS,
    comparison_page,
    has_linked_section,
    row_of,
    section,
    section_text,
    visible_text,
)
from tests.helpers.trees import (
    edge_case_comparisons,
    hostile,
    make_comparison,
    make_epochs,
    make_run,
    make_settings,
    make_test_result,
    sixteen,
)


def run_named(name: str):
    return next(run for run in sixteen().runs if run.name == name)


# Best run


def test_best_run_has_the_highest_val_accuracy():
    assert sixteen().best.name == "exp_015"


def test_best_run_does_not_depend_on_test():
    runs = [make_run("low", 0.5, test=make_test_result(0.9)), make_run("high", 0.6, test=make_test_result(0.1))]
    assert make_comparison(runs).best.name == "high"


@pytest.mark.parametrize("state", ["stale", "begun", "missing", "diverged"])
def test_unfinished_run_is_never_best(state):
    runs = [make_run("low", 0.5), make_run("high", 0.6, state=state)]
    assert make_comparison(runs).best.name == "low"


def test_diverged_run_is_never_best():
    assert edge_case_comparisons()["diverged"].best.name == "exp_001"


def test_first_of_equal_runs_is_best():
    assert make_comparison([make_run("first"), make_run("second")]).best.name == "first"


def test_runs_that_equal_the_best_one_are_named():
    comparison = make_comparison([make_run("first"), make_run("low", 0.5), make_run("second"), make_run("third")])
    assert "Val does not tell it from second, third, with the same accuracy" in " ".join(summarise(comparison))
    assert "60.0 % val accuracy of first and of 2 others" in section_text(render_comparison(comparison), "summary")


def test_a_run_that_equals_the_best_one_is_not_called_second_best():
    comparison = make_comparison([make_run("first"), make_run("second")])
    assert [pair.reason for pair in pairs_with_best(comparison)] == ["equal on val"]


@pytest.mark.parametrize("runs", [[], [make_run(state="begun")], [make_run(val=math.nan)]])
def test_no_finished_run_is_an_error_with_a_remedy(runs):
    with pytest.raises(UserError, match=r"has finished.*python jobs/lineage.py run all"):
        render_comparison(make_comparison(runs))


@pytest.mark.parametrize(("frozen", "best"), [(0.5, ("unfrozen", 2)), (0.9, ("frozen", 2))])
def test_best_epoch_is_earliest_of_equals_over_the_stages(frozen: float, best: tuple[str, int]):
    unfrozen = make_epochs(0.5, 4, "unfrozen")
    for row, value in zip(unfrozen, (0.3, 0.6, 0.6, math.nan), strict=True):
        row["val_accuracy"] = value
    row = make_run(epochs=[*make_epochs(frozen, 3), *unfrozen]).best_row
    assert (row["stage"], row["epoch"]) == best


# Photos of the runs


def test_runs_on_other_val_photos_are_not_ranked_against_the_best_without_a_word():
    runs = [make_run("a", 0.6, val_photos="v1"), make_run("b", 0.7, val_photos="v2"), make_run("c", 0.5)]
    comparison = make_comparison(runs)
    assert "These runs have other val photos, so their val accuracies can't be compared with its: a." in " ".join(
        summarise(comparison)
    )
    assert "the order of val accuracies does not rank them: a." in section_text(
        render_comparison(comparison), "summary"
    )


def test_runs_on_the_same_val_photos_are_ranked_without_a_warning():
    runs = [make_run("a", 0.6, val_photos="v1"), make_run("b", 0.7, val_photos="v1")]
    assert "other val photos" not in render_comparison(make_comparison(runs))


def test_numbers_of_test_photos_are_shown_if_they_differ():
    few, many = make_test_result(0.6, num_photos=300), make_test_result(0.6)
    page = render_comparison(make_comparison([make_run("a", test=few), make_run("b", 0.5, test=many)]))
    assert [row_of(page, "runs", name)[-1].split("% ")[1] for name in "ab"] == ["300 photos", "2,000 photos"]
    alike = render_comparison(make_comparison([make_run("a", test=many), make_run("b", 0.5, test=many)]))
    assert "photos" not in row_of(alike, "runs", "a")[-1]


@pytest.mark.parametrize("num_photos", [300, 2000])
def test_loaded_summary_has_the_numbers_of_test_photos_if_they_differ(num_photos: int):
    tests = make_test_result(0.6), make_test_result(0.6, num_photos=num_photos)
    comparison = make_comparison([make_run(name, test=test) for name, test in zip("ab", tests, strict=True)])
    runs = report.comparison_table(comparison).to_pandas().set_index("name")
    assert ("test_photos" in LoadedComparison("uri", runs).summary()) == (num_photos != 2000)


def test_runs_whose_ancestors_were_trained_on_their_test_photos_are_named():
    runs = [make_run("a"), make_run("b", 0.5, seen_photos="3 of 40 are train photos of a")]
    text = section_text(render_comparison(make_comparison(runs)), "summary")
    assert "The test accuracy of b is too high: of its test photos, 3 of 40 are train photos of a." in text
    assert "accuracy of a is too high" not in text


def test_a_best_run_that_is_far_worse_on_test_is_warned_about():
    def warnings(test: float) -> list[str]:
        sentences = summarise(make_comparison([make_run("a", 0.812, test=make_test_result(test))]))
        return [sentence for sentence in sentences if sentence.startswith("Warning")]

    assert "points lower than its val accuracy: it may rely on what train and val share" in warnings(0.15)[0]
    assert warnings(0.78) == []


# Sections


@pytest.mark.parametrize("name", COMPARISON_SECTIONS)
def test_section_exists_and_is_linked(name):
    assert has_linked_section(comparison_page(), name)


def test_summary_has_test_accuracy_with_interval():
    test = sixteen().best.test
    low, high = test.interval
    assert f"{test.accuracy:.1%} {low:.1%} to {high:.1%}".replace("%", " %") in section_text(
        comparison_page(), "summary"
    )


def test_summary_has_best_of_the_baseline():
    text = section_text(comparison_page(), "summary")
    assert "71.5 % val accuracy of its exp_013; test 64.6 %" in text


def test_summary_counts_runs_by_state():
    assert "12 of 16 1 stale, 1 begun, 1 missing, 1 diverged" in section_text(comparison_page(), "summary")


def test_summary_counts_runs_above_the_baseline():
    assert any("Run by run, 7 of 9 are above it on val" in sentence for sentence in summarise(sixteen()))


@pytest.mark.parametrize(
    "sentence",
    ["The best run was selected on val", "P-values are not corrected", "Each run was trained with one seed"],
)
def test_summary_lists_limitations(sentence):
    assert sentence in section_text(comparison_page(), "summary")


def test_summary_names_seed_repeats():
    again = make_run("again", settings=make_settings(name="again", seed=124))
    assert "differ only in their seed: exp_001, again" in section_text(
        render_comparison(make_comparison([make_run(), again])), "summary"
    )


def test_page_without_baseline_does_not_mention_it():
    main = render_comparison(make_comparison([make_run()])).partition("<main>")[2]
    assert "baseline" not in visible_text(main).lower()


def test_row_has_settings_and_epochs():
    row = row_of(comparison_page(), "runs", "exp_013")
    assert row[1:8] == ["exp_012@24", "v2 crop", "adam 1e-5", "0.3", "H", "21 of 75", "20"]


def test_row_has_val_accuracy_of_run_and_baseline():
    assert row_of(comparison_page(), "runs", "exp_013")[8:10] == ["73.5 % ▲", "71.5 %"]


@pytest.mark.parametrize(("val", "sign"), [(0.6, "▲"), (0.4, "▼"), (0.5, "=")])
def test_sign_shows_the_higher_accuracy(val, sign):
    page = render_comparison(make_comparison([make_run("run", val, baseline_val=0.5)]))
    assert row_of(page, "runs", "run")[8] == f"{val:.1%} {sign}".replace("%", " %")


def test_sign_has_a_label():
    assert 'aria-label="above the baseline"' in section(comparison_page(), "runs")


def test_row_of_run_without_test():
    assert row_of(comparison_page(), "runs", "exp_007")[10] == "not evaluated"


def test_row_of_stale_run_has_state_and_reason():
    assert row_of(comparison_page(), "runs", "exp_006")[0] == "exp_006 stale exp_005 was retrained"


def test_row_has_optimizers_of_both_stages():
    settings = make_settings() | {"unfrozen.optimizer": "sgd", "unfrozen.lr": 3e-5, "unfrozen.epochs": 5}
    row = row_of(render_comparison(make_comparison([make_run("run", settings=settings)])), "runs", "run")
    assert (row[3], row[6]) == ("adam 1e-4, then sgd 3e-5", "10 of 35")


def test_diverged_run_has_no_sign():
    assert row_of(render_comparison(edge_case_comparisons()["diverged"]), "runs", "diverged")[8:10] == ["nan", "50.0 %"]


# Changes


def test_settings_diff_against_the_parent():
    assert settings_diff(run_named("exp_006"), run_named("exp_005")) == [
        ("model.dropout", "0.2", "0.3"),
        ("lr", "3e-5", "5e-5"),
    ]


def test_single_stages_are_compared_with_each_other():
    diff = settings_diff(run_named("exp_013"), run_named("exp_012"))
    assert ("stage", "frozen", "unfrozen") in diff
    assert ("lr", "1e-4", "1e-5") in diff


def test_missing_setting_is_a_dash():
    assert ("views", "2", "\u2013") in settings_diff(run_named("exp_013"), run_named("exp_012"))


def test_runs_with_two_stages_are_compared_by_key():
    parent = make_run(settings=make_settings() | {"unfrozen.lr": 1e-3})
    child = make_run(settings=make_settings() | {"unfrozen.lr": 1e-4})
    assert settings_diff(child, parent) == [("unfrozen.lr", "1e-3", "1e-4")]


def test_page_has_the_changes():
    row = row_of(comparison_page(), "changes", "exp_006")
    assert row == ["exp_006", "exp_005@69", "model.dropout 0.2 → 0.3 lr 3e-5 → 5e-5"]


def test_run_without_changes():
    runs = [make_run("a"), make_run("b", settings=make_settings(name="b"), parent="a@2", parent_name="a")]
    assert row_of(render_comparison(make_comparison(runs)), "changes", "b")[2] == "no setting differs"


def test_page_without_parents_has_no_changes():
    assert "No run starts from another" in section_text(render_comparison(make_comparison([make_run()])), "changes")


# Test of the best run


def test_page_has_test_metrics_of_the_best_run():
    metrics = sixteen().best.test.metrics
    text = section_text(comparison_page(), "test")
    assert f"{metrics['macro_average']['f1']:.3f}" in text
    assert f"{metrics['expected_calibration_error']:.1%}".replace("%", " %") in text


def test_worst_classes_are_sorted_and_have_photos():
    test = make_test_result(0.7)
    test.metrics["per_class"][3] |= {"f1": 0.0, "support": 0}
    test.metrics["per_class"][4] |= {"f1": 0.1}
    rows = report.worst_classes(make_run(test=test))
    assert rows[0]["name"] == "Maker Model 04"
    assert [row["f1"] for row in rows] == sorted(row["f1"] for row in rows)


def test_report_of_the_best_run_is_linked():
    assert 'href="exp_015/report/report.html"' in section(comparison_page(), "test")


def test_page_of_best_run_without_test():
    assert "exp_001 is not evaluated" in section_text(render_comparison(make_comparison([make_run()])), "test")


# Whole page


def test_text_from_data_is_escaped():
    page = render_comparison(hostile())
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_page_has_no_external_links():
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', comparison_page())
    assert {link for link, _ in sources if not link.startswith(("data:", "#"))} == {"exp_015/report/report.html"}


def test_page_allows_no_script():
    assert "script-src 'none'" in comparison_page()


def test_page_is_deterministic():
    assert render_comparison(sixteen()) == comparison_page()


@pytest.mark.parametrize("name", edge_case_comparisons())
def test_edge_case_has_a_page(name):
    page = render_comparison(edge_case_comparisons()[name])
    assert page.count("<section") == len(COMPARISON_SECTIONS)
    assert not re.search(r'="[^"]*\bnan\b', page)
