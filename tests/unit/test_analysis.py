"""The analysis of a sweep: its words, its table, its charts and the page that holds them."""

import json
import math
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest

from carclass.errors import UserError
from carclass.tuning import analysis, axes, importance, plots, setting_plots
from carclass.tuning.importance import MIN_TRIALS, importances
from carclass.tuning.outcome import Outcome, Sweep
from carclass.tuning.space import Dimension, text_of
from carclass.tuning.trials import Trial
from tests.unit.test_report import section, visible_text

SECTIONS = ["summary", "seeds", "trials", "curves", "parallel", "importance", "slices", "cost"]
LR, BATCH, FLIP, DROPOUT = (
    "train.unfrozen.lr",
    "train.unfrozen.batch_size",
    "train.augmentation.flip",
    "train.model.dropout",
)
DIMENSIONS = (
    Dimension(key=LR, low=1e-4, high=1e-2, log=True),
    Dimension(key=BATCH, low=8, high=64),
    Dimension(key=FLIP, choices=(True, False, None)),
    Dimension(key=DROPOUT, low=0.0, high=0.6),
)
STANDS = {LR: 6e-4, BATCH: 32, FLIP: True, DROPOUT: 0.0}
MAX_EPOCHS = 10
CHARTS = [plots.learning_curves, plots.cost, plots.best_so_far, plots.pruning, setting_plots.parallel]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Importance from fewer resamples, which takes less time."""
    monkeypatch.setattr(importance, "NUM_RESAMPLES", 5)


def make_epochs(accuracy: float, number: int = MAX_EPOCHS, seconds: float = 40.0) -> list[dict[str, Any]]:
    """A curve that comes near to an accuracy, the more so the longer it is."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 0.9,
            "val_loss": 2.5 / epoch,
            "val_accuracy": accuracy * (1 - 0.7 * math.exp(-epoch / 1.4)),
            "lr": 1e-3,
            "seconds": seconds,
        }
        for epoch in range(1, number + 1)
    ]


def make_outcome(number: int, epochs: list[dict[str, Any]], **changes: Any) -> Outcome:
    trial = {"number": number, "values": STANDS, "seed": 123, "state": "complete"} | changes
    return Outcome(
        trial=Trial(**trial),
        epochs=epochs,
        max_epochs=MAX_EPOCHS,
        devices=2.0,
        finished=1_700_000_000.0 + 60 * number if epochs else None,
    )


def make_sweep(num_trials: int = 20, repeats: bool = True, **changes: Any) -> Sweep:
    """Trials whose accuracy hangs on the learning rate above all, best at 2e-3, and a little on dropout and chance."""
    generator = random.Random(5)
    outcomes = [make_outcome(0, make_epochs(0.8))]
    for number in range(1, num_trials):
        values = {
            LR: 10 ** generator.uniform(-4, -2),
            BATCH: generator.randint(8, 64),
            FLIP: generator.choice((True, False, None)),
            DROPOUT: generator.uniform(0, 0.6),
        }
        accuracy = 0.88 - 0.14 * math.log10(values[LR] / 2e-3) ** 2 - 0.08 * abs(values[DROPOUT] - 0.2)
        accuracy += generator.gauss(0, 0.004)
        if number == 7:
            state, epochs, reason = "failed", [], "torch.OutOfMemoryError: CUDA out of memory <script>alert(1)</script>"
        elif accuracy < 0.82 and number > 3:
            state, epochs, reason = "pruned", make_epochs(accuracy, generator.choice((1, 3))), None
        else:
            state, epochs, reason = "complete", make_epochs(accuracy), None
        outcomes.append(make_outcome(number, epochs, values=values, state=state, reason=reason))
    values = {
        "name": "lr-and-dropout",
        "facts": [("experiment", "full"), ("dataset", "v1-masked"), ("scheduler", "ASHA")],
        "stage": "unfrozen",
        "device": "GPU",
        "dimensions": DIMENSIONS,
        "seed": 123,
        "outcomes": outcomes,
    }
    sweep = Sweep(**{**values, **changes})
    return with_repeats(sweep) if repeats else sweep


def with_repeats(sweep: Sweep, apart: float = 0.003) -> Sweep:
    """The sweep with two more seeds of the best three settings and of trial 0, a little better and a little worse."""
    outcomes = list(sweep.outcomes)
    for one in [*sweep.complete[:3], sweep.outcomes[0]]:
        for seed, change in ((124, apart), (125, -apart)):
            epochs = [{**row, "val_accuracy": row["val_accuracy"] + change} for row in one.epochs]
            repeats = {"values": one.trial.values, "seed": seed, "repeats": one.trial.number}
            outcomes.append(make_outcome(len(outcomes), epochs, **repeats))
    return replace(sweep, outcomes=outcomes)


def make_best(values: dict[str, Any], epochs: list[dict[str, Any]] | None = None) -> Sweep:
    """A sweep whose best trial, by far, has these values or epochs."""
    sweep = make_sweep(repeats=False)
    best = make_outcome(20, epochs or make_epochs(0.97), values={**STANDS, **values})
    return replace(sweep, outcomes=[*sweep.outcomes, best])


def words(sweep: Sweep) -> str:
    return " ".join(analysis.summary(sweep)).replace("\u00a0", " ")


# Words


def test_the_best_setting_comes_first_with_its_accuracy():
    best = make_sweep().best
    first = analysis.summary(make_sweep())[0]
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
    assert analysis.summary(make_sweep(num_trials=1, repeats=False))[-1].startswith("Nothing in these trials asks for")


@pytest.mark.parametrize("function", [analysis.summary, analysis.render])
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
    table = analysis.table(make_sweep())
    assert table["repeats"].to_pylist()[18:22] == [None, None, *[make_sweep().complete[0].trial.number] * 2]


def test_the_table_has_the_settings_in_their_own_types():
    table = analysis.table(make_sweep())
    types = [str(table.schema.field(one.key).type) for one in DIMENSIONS]
    assert types == ["double", "int64", "bool", "double"]


def test_a_setting_of_mixed_types_is_text():
    outcomes = [make_outcome(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((True, 0.5, None, "x"))]
    sweep = make_sweep(outcomes=outcomes, dimensions=[Dimension(key=LR, choices=(True, 0.5, None, "x"))], repeats=False)
    assert analysis.table(sweep)[LR].to_pylist() == ["true", "0.5", None, "x"]


def test_whole_and_real_numbers_together_are_real_ones():
    outcomes = [make_outcome(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((1, 0.5))]
    sweep = make_sweep(outcomes=outcomes, dimensions=[Dimension(key=LR, low=0.0, high=1.0)], repeats=False)
    assert analysis.table(sweep)[LR].to_pylist() == [1.0, 0.5]


def test_the_table_holds_every_epoch():
    curves = analysis.table(make_sweep())["val_accuracies"].to_pylist()
    assert curves == [[row["val_accuracy"] for row in one.epochs] for one in make_sweep().outcomes]


def test_a_trial_without_epochs_has_no_accuracy():
    row = analysis.table(make_sweep()).to_pylist()[7]
    assert (row["state"], row["accuracy"], row["best_epoch"], row["finished"]) == ("failed", None, None, None)


def test_the_best_epoch_is_the_earlier_of_equals_and_never_nan():
    epochs = make_epochs(0.8, 4)
    for row, accuracy in zip(epochs, (0.3, 0.6, 0.6, math.nan), strict=True):
        row["val_accuracy"] = accuracy
    sweep = make_sweep(outcomes=[make_outcome(0, epochs)], repeats=False)
    assert analysis.table(sweep)["best_epoch"].to_pylist() == [2]


# Page


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_there_and_linked_from_the_top(name):
    page = analysis.render(make_sweep())
    assert f'<section id="{name}"' in page
    assert f'href="#{name}"' in page


def test_the_words_are_on_the_page():
    text = visible_text(section(analysis.render(make_sweep()), "summary"))
    assert "That is a gain" in text


def test_the_trials_are_listed_with_their_state_in_words():
    text = visible_text(section(analysis.render(make_sweep()), "trials"))
    assert len(re.findall(r"\b(?:complete|pruned|failed)\b", text)) >= len(make_sweep().outcomes)


def test_a_failed_trial_has_its_reason_in_the_table():
    assert "torch.OutOfMemoryError" in section(analysis.render(make_sweep()), "trials")


def test_the_seeds_of_the_best_settings_are_side_by_side():
    sweep = make_sweep()
    text = visible_text(section(analysis.render(sweep), "seeds"))
    seeds = sweep.seeds(0).accuracies
    figures = " ".join(f"{value * 100:.1f}\u00a0%" for value in seeds)
    assert figures in text


def test_too_few_trials_for_importance_are_said_to_be():
    assert "Too few trials" in section(analysis.render(make_sweep(num_trials=3)), "importance")


def test_text_from_data_is_escaped_wherever_it_appears():
    evil = "<script>alert(1)</script>\"'&"
    choices = (evil, "plain")
    values = [{FLIP: evil}, *({FLIP: "plain"} for _ in range(9))]
    outcomes = [make_outcome(n, make_epochs(0.5 + n / 50), values=v, reason=evil) for n, v in enumerate(values)]
    page = analysis.render(
        make_sweep(
            name=evil, facts=[(evil, evil)], outcomes=outcomes, dimensions=[Dimension(key=FLIP, choices=choices)]
        )
    )
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") > 20


def test_nothing_is_fetched_from_outside():
    page = analysis.render(make_sweep())
    sources = re.findall(r'(?:src|href|action|srcset|poster)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert sources
    assert all(link.startswith(("data:", "#")) for link, _ in sources)


def test_the_same_sweep_renders_to_the_same_bytes():
    assert analysis.render(make_sweep()) == analysis.render(make_sweep())


# Charts


def odd_sweeps() -> dict[str, Sweep]:
    long = [f"s3://bucket/with/a/very/long/name/of/a/parent/run-{i}/model.safetensors" for i in range(9)]
    named = [make_outcome(n, make_epochs(0.5 + n / 50), values={FLIP: name}) for n, name in enumerate(long)]
    gap = make_epochs(0.8)
    gap[4]["val_accuracy"] = math.nan
    many = [Dimension(key=f"train.part_{i}.setting", low=0.0, high=1.0) for i in range(8)]
    generator = random.Random(2)
    hundred = [
        make_outcome(n, make_epochs(generator.random()), values={one.key: generator.random() for one in many})
        for n in range(100)
    ]
    never = [{**row, "val_accuracy": math.nan} for row in make_epochs(0.8)]
    outside = make_outcome(0, make_epochs(0.7), values={LR: 0.0, BATCH: 128, FLIP: "other", DROPOUT: None})
    return {
        "one trial": make_sweep(num_trials=1, repeats=False),
        "all alike": make_sweep(outcomes=[make_outcome(n, make_epochs(0.8)) for n in range(9)], repeats=False),
        "one epoch": make_sweep(outcomes=[make_outcome(n, make_epochs(0.8, 1)) for n in range(3)], repeats=False),
        "a gap": make_sweep(outcomes=[make_outcome(0, gap)], repeats=False),
        "never a number": make_sweep(outcomes=[make_outcome(0, never), *make_sweep().outcomes[1:]], repeats=False),
        "long names": make_sweep(outcomes=named, dimensions=[Dimension(key=FLIP, choices=tuple(long))], repeats=False),
        "a hundred": make_sweep(outcomes=hundred, dimensions=many, repeats=False),
        "an experiment elsewhere": make_sweep(outcomes=[outside, *make_sweep().outcomes[1:]], repeats=False),
    }


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
    found = [number for one in sweep.dimensions for number in numbers(setting_plots.slices(sweep, one.key))]
    assert [number for number in found if not -30 <= number <= 340] == []


@pytest.mark.parametrize("name", odd_sweeps())
def test_an_odd_sweep_has_a_page_and_words(name):
    assert analysis.render(odd_sweeps()[name]).count("<section") == len(SECTIONS)


def test_a_pruned_trial_s_curve_ends_in_a_cross():
    sweep = make_sweep()
    num_pruned = sum(one.trial.state == "pruned" for one in sweep.outcomes)
    assert plots.learning_curves(sweep).count('class="cross"') == num_pruned > 2


def test_a_missing_accuracy_leaves_a_gap_in_its_curve():
    assert plots.learning_curves(odd_sweeps()["a gap"]).count('class="curve"') == 2


def test_a_tooltip_says_what_a_trial_was():
    sweep = make_sweep()
    titles = [element.text for element in ET.fromstring(plots.cost(sweep)).iter("title")]
    assert any(title.startswith("trial 0, complete: lr=6e-4") for title in titles)


def test_the_last_label_of_the_best_so_far_is_the_best_of_the_search():
    sweep = make_sweep()
    best = sweep.complete[0]
    assert f"trial {best.trial.number}: {best.accuracy * 100:.1f}\u00a0%" in plots.best_so_far(sweep)


def test_a_logarithmic_axis_has_its_decades_alike():
    axis = axes.axis_of(DIMENSIONS[0], [])
    assert [round(axis.place(value), 6) for value in (1e-4, 1e-3, 1e-2)] == [0, 0.5, 1]


def test_an_experiment_s_value_beyond_the_range_widens_the_axis():
    axis = axes.axis_of(DIMENSIONS[1], [128])
    assert axis.place(64) < axis.place(128) == 1


def test_an_experiment_s_value_that_is_no_number_has_a_place_of_its_own():
    axis = axes.axis_of(DIMENSIONS[3], [None])
    assert (axis.place(None), axis.ticks[0].text) == (0, "null")
    assert axis.place(0.0) > 0.1


def test_long_choices_are_told_by_what_differs():
    choices = tuple(f"s3://bucket/runs/{name}/model.safetensors" for name in ("a-1", "b-22"))
    ticks = axes.axis_of(Dimension(key="train.parent", choices=choices), []).ticks
    assert [tick.text for tick in ticks] == ["…a-1", "…b-22"]


def test_long_choices_have_all_of_their_names_as_tooltips():
    sweep = odd_sweeps()["long names"]
    titles = [element.text for element in ET.fromstring(setting_plots.slices(sweep, FLIP)).iter("title")]
    assert set(sweep.dimensions[0].choices) <= set(titles)


def test_ticks_of_whole_numbers_are_whole():
    assert [tick.text for tick in axes.axis_of(Dimension(key="train.x.y", low=1, high=3), []).ticks] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(64, "64"), (0.05, "0.05"), (3e-4, "3e-4"), (1.25e-5, "1.25e-5"), (2.0, "2"), (True, "true"), (None, "null")],
)
def test_values_are_written_short(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8, "8.0 GPU seconds"), (738, "12.3 GPU minutes"), (3600 * 340, "340 GPU hours")]
)
def test_times_are_told_in_a_unit_that_suits_them(seconds, text):
    assert axes.time_text(seconds, "GPU") == text


def test_a_long_name_keeps_its_start_and_its_end():
    assert axes.fitted("resnet50-imagenet-v2", 11) == "resne…et-v2"


def test_the_table_s_rows_are_plain_values():
    """So that a reader without Arrow gets them as JSON."""
    assert json.dumps(analysis.table(make_sweep()).to_pylist())
