"""Which settings are tried next: within the ranges, the same whenever the same is known, and the better the more is."""

import pytest

from carclass.tuning import sampler
from carclass.tuning.sampler import KnownTrial
from carclass.tuning.search_space import Dimension

DIMENSIONS = (
    Dimension(key="train.unfrozen.lr", low=1e-4, high=1e-2, log=True),
    Dimension(key="train.unfrozen.batch_size", low=8, high=64),
    Dimension(key="train.unfrozen.appearance", choices=(False, True)),
)


def suggest(number: int, known: list[KnownTrial], kind: str = "tpe", seed: int = 1) -> dict:
    return sampler.suggest_values(DIMENSIONS, known, kind, seed, number, 30)


def accuracy(values: dict) -> float:
    return 1 - abs(values["train.unfrozen.lr"] - 5e-3) * 50


def searched(kind: str) -> list[dict]:
    known: list[KnownTrial] = []
    for number in range(1, 31):
        values = suggest(number, known, kind)
        known.append(KnownTrial(values, "complete", {1: accuracy(values)}))
    return [one.values for one in known]


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_every_value_is_one_to_try(kind: str):
    assert all(one.contains(values[one.key]) for values in searched(kind) for one in DIMENSIONS)


def test_whole_numbers_stay_whole():
    assert {type(values["train.unfrozen.batch_size"]) for values in searched("random")} == {int}


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_the_same_is_tried_whenever_the_same_is_known(kind: str):
    assert searched(kind) == searched(kind)


def test_another_seed_tries_something_else():
    assert suggest(1, [], seed=1) != suggest(1, [], seed=2)


def test_what_chance_chooses_does_not_depend_on_results():
    known = [KnownTrial(suggest(1, []), "complete", {1: 0.5})]
    assert suggest(2, known, "random") == suggest(2, [], "random")


def test_the_estimator_looks_where_trials_were_good():
    """In the second half of its trials, closer to the best rate than chance."""

    def distance(kind: str) -> float:
        return sum(1 - accuracy(values) for values in searched(kind)[15:])

    assert distance("tpe") < distance("random")


@pytest.mark.parametrize("state", ["begun", "pruned", "failed"])
def test_trials_that_did_not_finish_are_no_obstacle(state: str):
    known = [KnownTrial(suggest(i, []), state, {} if state == "failed" else {1: 0.1}) for i in range(1, 15)]
    assert suggest(15, known)


def test_an_experiment_outside_of_the_ranges_teaches_nothing():
    outside = {**suggest(1, []), "train.unfrozen.lr": 1.0}
    assert suggest(12, [KnownTrial(outside, "complete", {1: 0.9})]) == suggest(12, [])
