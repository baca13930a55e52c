"""Sampler: values within the space, determinism, and use of earlier results."""

import pytest

from carclass.tuning import sampler
from carclass.tuning.sampler import ObservedTrial
from carclass.tuning.search_space import Dimension

DIMENSIONS = (
    Dimension(key="train.unfrozen.lr", low=1e-4, high=1e-2, log=True),
    Dimension(key="train.unfrozen.batch_size", low=8, high=64),
    Dimension(key="train.unfrozen.appearance", choices=(False, True)),
)


def suggest(number: int, observed: list[ObservedTrial], kind: str = "tpe", seed: int = 1) -> dict:
    return sampler.suggest_values(DIMENSIONS, observed, kind, seed, number, 30)


def accuracy(values: dict) -> float:
    return 1 - abs(values["train.unfrozen.lr"] - 5e-3) * 50


def run_search(kind: str) -> list[dict]:
    observed: list[ObservedTrial] = []
    for number in range(1, 31):
        values = suggest(number, observed, kind)
        observed.append(ObservedTrial(values, "complete", {1: accuracy(values)}))
    return [trial.values for trial in observed]


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_values_are_within_the_space(kind: str):
    assert all(each.contains(values[each.key]) for values in run_search(kind) for each in DIMENSIONS)


def test_integers_stay_integers():
    assert {type(values["train.unfrozen.batch_size"]) for values in run_search("random")} == {int}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_suggestions_are_deterministic(kind: str):
    assert run_search(kind) == run_search(kind)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_complete_trial_that_has_lost_its_metrics_counts_as_failed(kind: str):
    values = suggest(1, [])
    lost, failed = (suggest(2, [ObservedTrial(values, state, {})], kind) for state in ("complete", "failed"))
    assert lost == failed


def test_seed_changes_suggestions():
    assert suggest(1, [], seed=1) != suggest(1, [], seed=2)


def test_random_suggestions_do_not_depend_on_results():
    observed = [ObservedTrial(suggest(1, []), "complete", {1: 0.5})]
    assert suggest(2, observed, "random") == suggest(2, [], "random")


def test_estimator_samples_near_good_trials():
    """Compare the second half of the trials: closer to the best rate than random ones."""

    def distance(kind: str) -> float:
        return sum(1 - accuracy(values) for values in run_search(kind)[15:])

    assert distance("tpe") < distance("random")


@pytest.mark.parametrize("state", ["begun", "pruned", "failed"])
def test_unfinished_trials_are_accepted(state: str):
    observed = [ObservedTrial(suggest(i, []), state, {} if state == "failed" else {1: 0.1}) for i in range(1, 15)]
    assert suggest(15, observed)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_no_settings_are_tried_twice_while_others_are_left(kind: str):
    flags = tuple(Dimension(key=f"train.unfrozen.{name}", choices=(False, True)) for name in "abc")
    observed: list[ObservedTrial] = []
    for number in range(8):
        values = sampler.suggest_values(flags, observed, kind, 1, number, 8)
        observed.append(ObservedTrial(values, "complete", {1: 0.9 if all(values.values()) else 0.1}))
    assert len({str(trial.values) for trial in observed}) == 8


def test_settings_are_repeated_where_no_others_are_left():
    flag = (Dimension(key="train.unfrozen.appearance", choices=(False, True)),)
    observed = [ObservedTrial({flag[0].key: value}, "complete", {1: 0.5}) for value in (False, True)]
    assert sampler.suggest_values(flag, observed, "tpe", 1, 2, 9)


def test_experiment_outside_of_the_space_is_ignored():
    outside = {**suggest(1, []), "train.unfrozen.lr": 1.0}
    assert suggest(12, [ObservedTrial(outside, "complete", {1: 0.9})]) == suggest(12, [])
