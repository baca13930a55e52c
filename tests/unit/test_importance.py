"""Importance of the settings of a sweep."""

import random
from dataclasses import replace

import pytest

from carclass.tuning.importance import MIN_TRIALS, importances
from carclass.tuning.search_space import Dimension
from tests.helpers.sweeps import (
    BASE_VALUES,
    DROPOUT,
    FLIP,
    LR,
    make_epochs,
    make_result,
    make_sweep,
)

pytestmark = pytest.mark.usefixtures("few_resamples")


def test_most_important_setting():
    first = importances(make_sweep(num_trials=40))[0]
    assert (first.key, first.mean > 0.6) == (LR, True)


def test_unimportant_setting():
    means = {each.key: each.mean for each in importances(make_sweep(num_trials=40))}
    assert means[FLIP] < 0.1


def test_importance_adds_up_to_one():
    assert sum(each.mean for each in importances(make_sweep())) == pytest.approx(1)


def test_importance_is_deterministic():
    assert importances(make_sweep()) == importances(make_sweep())


def test_importance_uses_logarithmic_scale():
    """Let accuracy change in the lowest of three decades only, a hundredth of the range on a linear scale."""
    lr = Dimension(key=LR, low=1e-5, high=1e-2, log=True)
    dropout = Dimension(key=DROPOUT, low=0.0, high=0.6)
    generator, results = random.Random(1), []
    for number in range(40):
        values = {LR: 10 ** generator.uniform(-5, -2), DROPOUT: generator.uniform(0, 0.6)}
        accuracy = 0.5 + 0.3 * (values[LR] > 1e-4) + 0.2 * values[DROPOUT]
        results.append(make_result(number, make_epochs(accuracy), values=values))
    assert importances(make_sweep(dimensions=[lr, dropout], trials=results, repeats=False))[0].key == LR


def test_resamples_without_variance_are_skipped():
    values = [{FLIP: n == 0} for n in range(9)]
    results = [make_result(n, make_epochs(0.5 + n / 50), values=v) for n, v in enumerate(values)]
    flip = Dimension(key=FLIP, choices=(True, False))
    assert [each.mean for each in importances(make_sweep(dimensions=[flip], trials=results, repeats=False))] == [1]


def test_too_few_trials_for_importance():
    assert importances(make_sweep(num_trials=MIN_TRIALS - 1)) == []


def test_equal_trials_have_no_importance():
    results = [make_result(n, make_epochs(0.8)) for n in range(20)]
    assert importances(make_sweep(trials=results, repeats=False)) == []


def test_experiment_outside_of_space_is_left_out_of_importance():
    sweep = make_sweep(repeats=False)
    outside = make_result(0, make_epochs(0.1), values={**BASE_VALUES, LR: 1.0})
    same = importances(replace(sweep, trials=sweep.trials[1:]))
    assert importances(replace(sweep, trials=[outside, *sweep.trials[1:]])) == same
