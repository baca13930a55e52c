"""Report of a sweep: summary in sentences, importance, and page."""

import json
import math
import random
import re
from dataclasses import replace

import pytest

from carclass.errors import UserError
from carclass.tuning import report
from carclass.tuning.results import SweepResult
from carclass.tuning.search_space import Dimension
from tests.helpers.pages import SWEEP_SECTIONS, has_linked_section, section, visible_text
from tests.helpers.sweeps import (
    BASE_VALUES,
    DROPOUT,
    FLIP,
    LR,
    edge_case_sweeps,
    make_best,
    make_epochs,
    make_result,
    make_sweep,
    with_repeats,
    with_seeds,
)

pytestmark = pytest.mark.usefixtures("few_resamples")


def summary_text(sweep: SweepResult) -> str:
    """Return the summary of a sweep as one line, with plain spaces."""
    return " ".join(report.summarise(sweep)).replace("\u00a0", " ")


# Summary


def test_first_sentence_names_the_best_trial():
    best = make_sweep().best
    first = report.summarise(make_sweep())[0]
    assert first.startswith(f"The best trial is trial {best.trial.number}, {best.trial.title}: val accuracy 8")


def test_unchanged_experiment_can_be_best():
    sweep = make_sweep(num_trials=1, repeats=False)
    assert "No trial is better than the unchanged experiment" in summary_text(sweep)


def test_best_is_compared_with_unchanged_experiment_over_seeds():
    match = re.search(
        r"it reaches 8\d\.\d ± 0\.4 %; the unchanged experiment reaches 80\.0 ± 0\.4 %, (\S+) p",
        summary_text(make_sweep()),
    )
    assert float(match[1]) > 5


def test_lead_beyond_seed_variation_is_a_gain():
    assert "This is a gain on these val photos (p below 0.001, one-sided, by Dunnett's test" in summary_text(
        make_sweep()
    )


def test_lead_within_seed_variation_may_be_chance():
    assert "This may be chance (p = 0." in summary_text(with_repeats(make_sweep(repeats=False), apart=0.08))


def test_a_trial_with_the_settings_of_another_is_no_finalist():
    sweep = make_sweep(repeats=False)
    again = make_result(20, sweep.best.epochs, values=sweep.best.trial.values)
    doubled = replace(sweep, trials=[*sweep.trials, again])
    assert [each.trial.number for each in doubled.repeated] == [each.trial.number for each in sweep.repeated]


def test_trial_0_is_repeated_although_a_later_trial_with_its_settings_was_luckier():
    twin = make_result(20, make_epochs(0.99))
    sweep = make_sweep(repeats=False)
    assert 20 not in [each.trial.number for each in replace(sweep, trials=[*sweep.trials, twin]).repeated]


def test_trials_that_equal_the_best_one_are_named():
    equal = [make_result(n, make_epochs(0.95), values={**BASE_VALUES, LR: n / 1000}) for n in (20, 21, 22)]
    sweep = make_sweep(repeats=False)
    tied = replace(sweep, trials=[*sweep.trials, *equal])
    assert "It is the first of equals, with trials 21 and 22." in summary_text(tied)
    assert "It is the first of equals, with trials 21 and 22." in summary_text(with_repeats(tied))


def test_trials_that_equal_a_finalist_but_were_not_repeated_are_named():
    equal = [make_result(n, make_epochs(0.95), values={**BASE_VALUES, LR: n / 1000}) for n in (20, 21, 22, 23)]
    sweep = make_sweep(repeats=False)
    text = summary_text(with_repeats(replace(sweep, trials=[*sweep.trials, *equal])))
    assert "Equal to trial 22 in the search, but not trained with other seeds: trial 23." in text


def test_repeats_with_more_seeds_than_those_of_the_sweep_are_not_counted():
    sweep = with_seeds(make_sweep(repeats=False), [[0.8, 0.81, 0.99, 0.99]] * 4)
    best = sweep.best.trial.number
    assert sweep.seed_repeats(best).accuracies == (0.8, 0.81, 0.99, 0.99)
    assert replace(sweep, num_seeds=3).seed_repeats(best).accuracies == (0.8, 0.81)


def test_an_unfinished_repeat_beyond_the_seeds_of_the_sweep_does_not_leave_it_unfinished():
    sweep = with_repeats(make_sweep(repeats=False))
    begun = make_result(len(sweep.trials), [], seed=126, repeats=sweep.best.trial.number, state="begun")
    text = summary_text(replace(sweep, trials=[*sweep.trials, begun]))
    assert "not finished" not in text
    assert "Nothing can be said" not in text


def test_a_trial_without_a_finite_accuracy_has_none():
    never = [{**row, "val_accuracy": math.nan} for row in make_epochs(0.8)]
    trials = [*make_sweep(repeats=False).trials, make_result(20, never, state="pruned")]
    sweep = make_sweep(trials=trials, repeats=False)
    assert report.trials_table(sweep)["accuracy"].to_pylist()[-1] is None


def test_similar_trials_are_listed():
    assert "Its lead over trials" in summary_text(with_repeats(make_sweep(repeats=False), apart=0.08))


def test_lead_over_next_best_trials():
    assert "Its lead over the next best trials is larger" in summary_text(with_repeats(make_best({}), apart=0.001))


@pytest.mark.parametrize(
    "sweep", [make_sweep(repeats=False), with_seeds(make_sweep(repeats=False), [[0.9]] * 4)], ids=["one", "two"]
)
def test_less_than_three_seeds_allow_no_conclusion(sweep):
    text = summary_text(sweep)
    assert "Nothing can be said about differences between these trials" in text
    assert "`num_seeds: 3`" in text
    assert not re.search("is a gain|larger than the variation", text)


def test_repeat_that_failed_allows_no_conclusion():
    sweep = make_sweep()
    failed = replace(sweep.trials[-1], trial=replace(sweep.trials[-1].trial, state="failed"))
    text = summary_text(replace(sweep, trials=[*sweep.trials[:-1], failed]))
    assert "chance: some repeats with other seeds failed" in text
    assert "is a gain" not in text


def lose(sweep: SweepResult, *numbers: int) -> SweepResult:
    """Return a sweep in which some trials have lost their metrics."""
    trials = [
        replace(one, trial=replace(one.trial, state="lost", reason="metrics.jsonl is missing"), epochs=[])
        if one.trial.number in numbers
        else one
        for one in sweep.trials
    ]
    return replace(sweep, trials=trials)


def test_a_repeat_that_has_lost_its_metrics_is_neither_averaged_nor_tested():
    sweep = make_sweep()
    repeats = [one.trial.number for one in sweep.trials if one.trial.repeats == 0]
    lost = lose(sweep, *repeats)
    text = summary_text(lost)
    assert "the metrics of some trials are lost" in text
    assert "is a gain" not in text
    assert not re.search(r"\b0\.0 %|± 0\.0|nan", text)
    assert lost.seed_repeats(0).accuracies == ()
    assert "2 trials have lost the metrics" in text


def test_a_complete_repeat_without_epochs_does_not_count_as_zero():
    sweep = make_sweep()
    last = sweep.trials[-1]
    emptied = replace(sweep, trials=[*sweep.trials[:-1], replace(last, epochs=[])])
    group = emptied.seed_repeats(last.trial.repeats)
    assert (len(group.accuracies), group.num_missing) == (1, 1)
    assert 0.0 not in group.accuracies


def test_a_lost_trial_is_listed_with_its_reason_and_not_ranked():
    sweep = make_sweep()
    best = sweep.best.trial.number
    lost = lose(sweep, best)
    assert lost.best.trial.number != best
    assert "19 complete" not in report.findings.state_counts(lost)
    assert "1 lost" in report.findings.state_counts(lost)
    text = visible_text(section(report.render_analysis(lost), "trials"))
    assert "metrics.jsonl is missing" in text
    assert "nan" not in report.render_analysis(lost)


def test_a_sweep_of_lost_trials_alone_is_an_error_with_the_reason():
    sweep = make_sweep(trials=[make_result(0, make_epochs(0.8))], repeats=False)
    with pytest.raises(UserError, match=r"1 of 1 have lost their metrics.*metrics\.jsonl is missing"):
        report.summarise(lose(sweep, 0))


def test_seeds_with_equal_accuracies_allow_no_conclusion():
    text = summary_text(with_repeats(make_sweep(repeats=False), apart=0.0))
    assert "every seed reaches the same accuracy" in text


def test_seed_of_the_search_is_no_evidence():
    """Let the search flatter its finalists by ten points, which further seeds don't confirm."""
    text = summary_text(with_seeds(make_best({}), [[0.803, 0.797], [0.8, 0.806], [0.797, 0.8], [0.806, 0.8]]))
    assert "is a gain" not in text
    assert "it reaches 80.3 ± 0.4 %" in text


def test_finalist_with_best_mean_over_other_seeds_is_the_best_trial():
    sweep = with_seeds(make_sweep(repeats=False), [[0.80, 0.81], [0.82, 0.83], [0.81, 0.82], [0.80, 0.80]])
    assert sweep.best is sweep.complete[1]


def test_unchanged_experiment_is_best_if_other_seeds_say_so():
    sweep = with_seeds(make_sweep(repeats=False), [[0.80, 0.81], [0.82, 0.83], [0.81, 0.82], [0.90, 0.91]])
    assert "No trial is better than the unchanged experiment over other seeds than the search's" in summary_text(sweep)


def test_selection_bias_is_mentioned():
    assert "optimistic: the best of 20 trials was selected" in summary_text(make_sweep())


def test_savings_of_pruning():
    assert re.search(
        r"Pruning ended \d of 20 trials early and saved \d+(\.\d)? GPU hours, \d+ % of", summary_text(make_sweep())
    )


def test_sweep_without_pruning():
    results = [make_result(n, make_epochs(0.8)) for n in range(3)]
    assert "no trial was pruned" in summary_text(make_sweep(trials=results, repeats=False))


def test_failed_trials_are_counted():
    assert "1 trial failed" in summary_text(make_sweep())


def test_unfinished_trials_are_counted():
    sweep = make_sweep(repeats=False)
    begun = make_result(20, [], state="begun")
    assert "1 trial has not finished" in summary_text(replace(sweep, trials=[*sweep.trials, begun]))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (LR, 9e-3, "Search lr above 0.01 too"),
        (LR, 1.2e-4, "Search lr below 1e-4 too"),
        (LR, 2e-2, "Search lr above 0.02 too"),
    ],
)
def test_best_value_at_end_of_range_recommends_wider_range(key, value, sentence):
    assert sentence in summary_text(make_best({key: value}))


def test_best_value_inside_range_recommends_nothing():
    """Use a value within a tenth of the range on a linear scale, but not on the logarithmic one."""
    assert "Search lr below" not in summary_text(make_best({LR: 3e-4}))


def test_range_up_to_schema_bound_is_not_widened():
    dropout = Dimension(key=DROPOUT, low=0.0, high=0.6)
    assert "dropout below" not in summary_text(replace(make_best({DROPOUT: 0.0}), dimensions=[dropout]))


def test_still_learning_recommends_more_epochs():
    epochs = [{**row, "val_accuracy": 0.09 * row["epoch"]} for row in make_epochs(0.9)]
    assert (
        "Give trials more than 10 epochs: the best one still gained 18.0 points in its last 2 epochs"
        in summary_text(make_best({}, epochs))
    )


def test_converged_best_trial_needs_no_more_epochs():
    assert "more than 10 epochs" not in summary_text(make_sweep())


def test_most_important_setting_is_searched_more_finely():
    assert "Search lr more finely: it is the most important setting" in summary_text(make_sweep(num_trials=40))


def test_scattered_best_values_recommend_more_trials():
    generator = random.Random(4)
    values = [{**BASE_VALUES, LR: 10 ** generator.uniform(-4, -2)} for _ in range(24)]
    results = [make_result(n, make_epochs(generator.uniform(0.7, 0.8)), values=v) for n, v in enumerate(values)]
    assert "Search lr with more trials" in summary_text(make_sweep(trials=results, repeats=False))


def test_unimportant_settings_are_to_be_fixed():
    assert re.search(
        r"Fix .*flip .* as in the best trial: .* hardly matters?\.", summary_text(make_sweep(num_trials=40))
    )


def test_default_recommendation():
    assert report.summarise(make_sweep(num_trials=1, repeats=False))[-1].startswith(
        "These results suggest neither other ranges"
    )


@pytest.mark.parametrize("function", [report.summarise, report.render_analysis])
def test_no_complete_trial_is_an_error_with_a_remedy(function):
    results = [make_result(0, [], state="begun"), make_result(1, make_epochs(0.5, 2), state="pruned")]
    with pytest.raises(UserError, match=r"no trial of sweep `lr-and-dropout` has finished.*Run the same command again"):
        function(make_sweep(trials=results, repeats=False))


@pytest.mark.parametrize("function", [report.summarise, report.render_analysis])
def test_a_sweep_whose_trials_all_failed_ends_with_the_first_reason(function):
    reasons = ("training diverged in the frozen stage", "out of memory")
    results = [make_result(number, [], state="failed", reason=reason) for number, reason in enumerate(reasons)]
    with pytest.raises(UserError, match=r"all 2 trials of sweep `lr-and-dropout` failed.* training diverged"):
        function(make_sweep(trials=results, repeats=False))


# Page


@pytest.mark.parametrize("name", SWEEP_SECTIONS)
def test_section_exists_and_is_linked(name):
    assert has_linked_section(report.render_analysis(make_sweep()), name)


def test_page_has_the_sentences():
    text = visible_text(section(report.render_analysis(make_sweep()), "summary"))
    assert "This is a gain" in text


def test_page_lists_trials_with_state():
    text = visible_text(section(report.render_analysis(make_sweep()), "trials"))
    assert len(re.findall(r"\b(?:complete|pruned|failed)\b", text)) >= len(make_sweep().trials)


def test_page_shows_reason_of_failure():
    assert "torch.OutOfMemoryError" in section(report.render_analysis(make_sweep()), "trials")


def test_page_lists_accuracies_by_seed():
    sweep = with_seeds(make_sweep(repeats=False), [[0.91, 0.93], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
    text = visible_text(section(report.render_analysis(sweep), "seeds")).replace("\u00a0", " ")
    assert f"{sweep.best.accuracy * 100:.1f} % 91.0 % 93.0 % 92.0 % 1.4 points" in text


def test_legend_draws_the_best_trial_as_the_chart_does():
    unchanged = report.render_analysis(make_sweep(num_trials=1, repeats=False))
    assert '<g class="trial complete baseline best" style="--a:1"><polyline class="crossing"' in section(
        unchanged, "parallel"
    )
    assert '<g class="trial complete best" style="--a:1">' in section(report.render_analysis(make_sweep()), "parallel")


def test_page_reports_too_few_trials_for_importance():
    assert "Too few trials" in section(report.render_analysis(make_sweep(num_trials=3)), "importance")


def test_text_from_data_is_escaped():
    evil = "<script>alert(1)</script>\"'&"
    choices = (evil, "plain")
    values = [{FLIP: evil}, *({FLIP: "plain"} for _ in range(9))]
    results = [make_result(n, make_epochs(0.5 + n / 50), values=v, reason=evil) for n, v in enumerate(values)]
    page = report.render_analysis(
        make_sweep(name=evil, facts=[(evil, evil)], trials=results, dimensions=[Dimension(key=FLIP, choices=choices)])
    )
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_page_has_no_external_links():
    page = report.render_analysis(make_sweep())
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)


def test_page_is_deterministic():
    assert report.render_analysis(make_sweep()) == report.render_analysis(make_sweep())


@pytest.mark.parametrize("name", edge_case_sweeps())
def test_edge_case_has_a_page(name):
    assert report.render_analysis(edge_case_sweeps()[name]).count("<section") == len(SWEEP_SECTIONS)


def test_table_rows_are_json_serializable():
    assert json.dumps(report.trials_table(make_sweep()).to_pylist())
