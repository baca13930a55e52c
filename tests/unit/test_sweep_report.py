"""The analysis of a sweep: its words, its table and the page that holds them."""

import json
import math
import random
import re
from dataclasses import replace

import pytest

from carclass.errors import UserError
from carclass.tuning import importance, report
from carclass.tuning.importance import MIN_TRIALS, importances
from carclass.tuning.results import SweepResult
from carclass.tuning.search_space import Dimension
from tests.helpers.pages import SWEEP_SECTIONS, section, visible_text
from tests.helpers.sweeps import (
    DIMENSIONS,
    DROPOUT,
    FLIP,
    LR,
    STANDS,
    make_best,
    make_epochs,
    make_outcome,
    make_sweep,
    odd_sweeps,
    with_repeats,
)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Importance from fewer resamples, which takes less time."""
    monkeypatch.setattr(importance, "NUM_RESAMPLES", 5)


def words(sweep: SweepResult) -> str:
    return " ".join(report.summarise(sweep)).replace("\u00a0", " ")


# Words


def test_the_best_setting_comes_first_with_its_accuracy():
    best = make_sweep().best
    first = report.summarise(make_sweep())[0]
    assert first.startswith(f"The best setting is trial {best.trial.number}, {best.trial.title}: val accuracy 8")


def test_the_experiment_itself_may_be_the_best():
    sweep = make_sweep(num_trials=1, repeats=False)
    assert "No setting tried is better than the experiment as it stands" in words(sweep)


def test_the_best_is_compared_with_the_experiment_over_seeds():
    found = re.search(
        r"it reaches 8\d\.\d ± 0\.3 %; the experiment as it stands reaches 80\.0 ± 0\.3 %, (\S+) p", words(make_sweep())
    )
    assert float(found[1]) > 5


def test_a_lead_beyond_what_seeds_explain_is_a_gain():
    assert "That is a gain" in words(make_sweep())


def test_a_lead_within_what_seeds_explain_may_be_chance():
    assert "That may be chance" in words(with_repeats(make_sweep(repeats=False), apart=0.08))


def test_settings_within_what_seeds_explain_can_t_be_told_apart():
    assert "can't be told apart from trials" in words(with_repeats(make_sweep(repeats=False), apart=0.08))


def test_settings_further_apart_than_seeds_explain_are_told_apart():
    assert "ahead of the next best" in words(with_repeats(make_best({}), apart=0.001))


def test_with_one_seed_nothing_is_said_of_gains():
    assert "how much of it is chance isn't known" in words(make_sweep(repeats=False))


def test_the_words_say_that_the_search_flatters():
    assert "flattered: the best of 20 was picked" in words(make_sweep())


def test_the_words_say_what_pruning_saved():
    assert re.search(
        r"Pruning ended \d of 20 trials early, which saved \d+(\.\d)? GPU hours, \d+ % of", words(make_sweep())
    )


def test_a_sweep_without_pruning_says_so():
    outcomes = [make_outcome(n, make_epochs(0.8)) for n in range(3)]
    assert "no trial was pruned" in words(make_sweep(outcomes=outcomes, repeats=False))


def test_failed_trials_are_counted():
    assert "1 trial failed" in words(make_sweep())


def test_trials_under_way_are_counted():
    sweep = make_sweep(repeats=False)
    begun = make_outcome(20, [], state="begun")
    assert "1 trial has not finished" in words(replace(sweep, outcomes=[*sweep.outcomes, begun]))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (LR, 9e-3, "Search lr above 0.01 too"),
        (LR, 1.2e-4, "Search lr below 1e-4 too"),
        (LR, 2e-2, "Search lr above 0.02 too"),
    ],
)
def test_a_best_value_at_an_end_of_its_range_asks_for_a_wider_one(key, value, sentence):
    assert sentence in words(make_best({key: value}))


def test_a_range_is_not_widened_for_a_value_inside():
    """Nearer to the end than a tenth of the range as it is, but not of its logarithm."""
    assert "Search lr below" not in words(make_best({LR: 3e-4}))


def test_a_range_that_ends_where_the_setting_ends_is_not_widened():
    one = Dimension(key=DROPOUT, low=0.0, high=0.6)
    assert "dropout below" not in words(replace(make_best({DROPOUT: 0.0}), dimensions=[one]))


def test_a_best_trial_that_was_still_learning_asks_for_more_epochs():
    epochs = [{**row, "val_accuracy": 0.09 * row["epoch"]} for row in make_epochs(0.9)]
    assert "Give trials more than 10 epochs: the best still gained 18.0 points in its last 2 epochs" in words(
        make_best({}, epochs)
    )


def test_a_best_trial_that_has_settled_needs_no_more_epochs():
    assert "more than 10 epochs" not in words(make_sweep())


def test_the_setting_that_decides_most_is_to_be_searched_more_finely():
    assert "Search lr more finely: it decides most" in words(make_sweep(num_trials=40))


def test_a_setting_whose_best_values_are_all_over_is_to_have_more_trials():
    generator = random.Random(4)
    values = [{**STANDS, LR: 10 ** generator.uniform(-4, -2)} for _ in range(24)]
    outcomes = [make_outcome(n, make_epochs(generator.uniform(0.7, 0.8)), values=v) for n, v in enumerate(values)]
    assert "Search lr with more trials" in words(make_sweep(outcomes=outcomes, repeats=False))


def test_settings_that_hardly_matter_are_to_be_fixed():
    assert re.search(r"Fix .*flip .* hardly matters? here", words(make_sweep(num_trials=40)))


def test_without_any_sign_other_seeds_come_next():
    assert report.summarise(make_sweep(num_trials=1, repeats=False))[-1].startswith("Nothing in these trials asks for")


@pytest.mark.parametrize("function", [report.summarise, report.render_analysis])
def test_without_a_complete_trial_the_user_is_told_how_to_go_on(function):
    outcomes = [make_outcome(0, [], state="begun"), make_outcome(1, make_epochs(0.5, 2), state="pruned")]
    with pytest.raises(UserError, match=r"no trial of sweep `lr-and-dropout` has finished.*The same command goes on"):
        function(make_sweep(outcomes=outcomes, repeats=False))


# Importance


def test_importance_finds_the_setting_that_matters():
    first = importances(make_sweep(num_trials=40))[0]
    assert (first.key, first.mean > 0.6) == (LR, True)


def test_importance_sees_that_a_setting_does_not_matter():
    found = {one.key: one.mean for one in importances(make_sweep(num_trials=40))}
    assert found[FLIP] < 0.1


def test_importance_adds_up_to_one():
    assert sum(one.mean for one in importances(make_sweep())) == pytest.approx(1)


def test_importance_is_the_same_each_time():
    assert importances(make_sweep()) == importances(make_sweep())


def test_a_range_by_its_logarithm_counts_alike_over_its_decades():
    """All that happens does so in the lowest of three decades, a hundredth of the range as it is."""
    one = Dimension(key=LR, low=1e-5, high=1e-2, log=True)
    other = Dimension(key=DROPOUT, low=0.0, high=0.6)
    generator, outcomes = random.Random(1), []
    for number in range(40):
        values = {LR: 10 ** generator.uniform(-5, -2), DROPOUT: generator.uniform(0, 0.6)}
        accuracy = 0.5 + 0.3 * (values[LR] > 1e-4) + 0.2 * values[DROPOUT]
        outcomes.append(make_outcome(number, make_epochs(accuracy), values=values))
    assert importances(make_sweep(dimensions=[one, other], outcomes=outcomes, repeats=False))[0].key == LR


def test_resamples_in_which_no_setting_differs_say_nothing():
    values = [{FLIP: n == 0} for n in range(9)]
    outcomes = [make_outcome(n, make_epochs(0.5 + n / 50), values=v) for n, v in enumerate(values)]
    one = Dimension(key=FLIP, choices=(True, False))
    assert [found.mean for found in importances(make_sweep(dimensions=[one], outcomes=outcomes, repeats=False))] == [1]


def test_few_trials_say_nothing_of_importance():
    assert importances(make_sweep(num_trials=MIN_TRIALS - 1)) == []


def test_equal_trials_say_nothing_of_importance():
    outcomes = [make_outcome(n, make_epochs(0.8)) for n in range(20)]
    assert importances(make_sweep(outcomes=outcomes, repeats=False)) == []


def test_an_experiment_outside_of_the_space_is_left_out_of_importance():
    sweep = make_sweep(repeats=False)
    outside = make_outcome(0, make_epochs(0.1), values={**STANDS, LR: 1.0})
    same = importances(replace(sweep, outcomes=sweep.outcomes[1:]))
    assert importances(replace(sweep, outcomes=[outside, *sweep.outcomes[1:]])) == same


# Table


def test_the_table_has_a_row_for_every_trial_and_repetition():
    table = report.trials_table(make_sweep())
    assert table["repeats"].to_pylist()[18:22] == [None, None, *[make_sweep().complete[0].trial.number] * 2]


def test_the_table_has_the_settings_in_their_own_types():
    table = report.trials_table(make_sweep())
    types = [str(table.schema.field(one.key).type) for one in DIMENSIONS]
    assert types == ["double", "int64", "bool", "double"]


def test_a_setting_of_mixed_types_is_text():
    outcomes = [make_outcome(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((True, 0.5, None, "x"))]
    sweep = make_sweep(outcomes=outcomes, dimensions=[Dimension(key=LR, choices=(True, 0.5, None, "x"))], repeats=False)
    assert report.trials_table(sweep)[LR].to_pylist() == ["true", "0.5", None, "x"]


def test_whole_and_real_numbers_together_are_real_ones():
    outcomes = [make_outcome(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((1, 0.5))]
    sweep = make_sweep(outcomes=outcomes, dimensions=[Dimension(key=LR, low=0.0, high=1.0)], repeats=False)
    assert report.trials_table(sweep)[LR].to_pylist() == [1.0, 0.5]


def test_the_table_holds_every_epoch():
    curves = report.trials_table(make_sweep())["val_accuracies"].to_pylist()
    assert curves == [[row["val_accuracy"] for row in one.epochs] for one in make_sweep().outcomes]


def test_a_trial_without_epochs_has_no_accuracy():
    row = report.trials_table(make_sweep()).to_pylist()[7]
    assert (row["state"], row["accuracy"], row["best_epoch"], row["finished"]) == ("failed", None, None, None)


def test_the_best_epoch_is_the_earlier_of_equals_and_never_nan():
    epochs = make_epochs(0.8, 4)
    for row, accuracy in zip(epochs, (0.3, 0.6, 0.6, math.nan), strict=True):
        row["val_accuracy"] = accuracy
    sweep = make_sweep(outcomes=[make_outcome(0, epochs)], repeats=False)
    assert report.trials_table(sweep)["best_epoch"].to_pylist() == [2]


# Page


@pytest.mark.parametrize("name", SWEEP_SECTIONS)
def test_every_section_is_there_and_linked_from_the_top(name):
    page = report.render_analysis(make_sweep())
    assert f'<section id="{name}"' in page
    assert f'href="#{name}"' in page


def test_the_words_are_on_the_page():
    text = visible_text(section(report.render_analysis(make_sweep()), "summary"))
    assert "That is a gain" in text


def test_the_trials_are_listed_with_their_state_in_words():
    text = visible_text(section(report.render_analysis(make_sweep()), "trials"))
    assert len(re.findall(r"\b(?:complete|pruned|failed)\b", text)) >= len(make_sweep().outcomes)


def test_a_failed_trial_has_its_reason_in_the_table():
    assert "torch.OutOfMemoryError" in section(report.render_analysis(make_sweep()), "trials")


def test_the_seeds_of_the_best_settings_are_side_by_side():
    sweep = make_sweep()
    text = visible_text(section(report.render_analysis(sweep), "seeds"))
    seeds = sweep.seeds(0).accuracies
    figures = " ".join(f"{value * 100:.1f}\u00a0%" for value in seeds)
    assert figures in text


def test_too_few_trials_for_importance_are_said_to_be():
    assert "Too few trials" in section(report.render_analysis(make_sweep(num_trials=3)), "importance")


def test_text_from_data_is_escaped_wherever_it_appears():
    evil = "<script>alert(1)</script>\"'&"
    choices = (evil, "plain")
    values = [{FLIP: evil}, *({FLIP: "plain"} for _ in range(9))]
    outcomes = [make_outcome(n, make_epochs(0.5 + n / 50), values=v, reason=evil) for n, v in enumerate(values)]
    page = report.render_analysis(
        make_sweep(
            name=evil, facts=[(evil, evil)], outcomes=outcomes, dimensions=[Dimension(key=FLIP, choices=choices)]
        )
    )
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_nothing_is_fetched_from_outside():
    page = report.render_analysis(make_sweep())
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)


def test_the_same_sweep_renders_to_the_same_bytes():
    assert report.render_analysis(make_sweep()) == report.render_analysis(make_sweep())


@pytest.mark.parametrize("name", odd_sweeps())
def test_an_odd_sweep_has_a_page_and_words(name):
    assert report.render_analysis(odd_sweeps()[name]).count("<section") == len(SWEEP_SECTIONS)


def test_the_table_s_rows_are_plain_values():
    """So that a reader without Arrow gets them as JSON."""
    assert json.dumps(report.trials_table(make_sweep()).to_pylist())
