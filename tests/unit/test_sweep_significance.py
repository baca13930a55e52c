"""Error rates of a sweep's verdicts, over simulated sweeps whose trials do not differ."""

import numpy as np
import pytest
from scipy.stats import binom

from carclass.tuning.results import SweepResult
from carclass.tuning.significance import GAIN_LEVEL, LEAD_LEVEL, gain_p_value, lead_p_values
from tests.helpers.sweeps import LR, make_epochs, make_result, make_sweep, with_seeds

MEAN, DEVIATION = 0.8, 0.01
NUM_TRIALS = 12


def simulate(generator: np.random.Generator, gain: float = 0.0, num_repeats: int = 2) -> SweepResult:
    """Return a sweep whose accuracies differ by chance only, but for a gain of trial 1."""
    means = np.full(NUM_TRIALS, MEAN)
    means[1] += gain
    curves = ([{**make_epochs(1.0, 1)[0], "val_accuracy": one}] for one in generator.normal(means, DEVIATION))
    trials = [make_result(i, epochs, values={LR: (i + 1) / 1000}) for i, epochs in enumerate(curves)]
    sweep = make_sweep(trials=trials, repeats=False)
    numbers = [result.trial.number for result in sweep.repeated]
    return with_seeds(sweep, generator.normal(means[numbers, None], DEVIATION, (len(numbers), num_repeats)))


def claims_gain(sweep: SweepResult) -> bool:
    return sweep.best.trial.number != 0 and gain_p_value(sweep) < GAIN_LEVEL


def claims_lead(sweep: SweepResult) -> bool:
    return min(lead_p_values(sweep).values()) < LEAD_LEVEL


def count(claims, number: int, **settings) -> int:
    """Return the number of simulated sweeps with a claim."""
    generator = np.random.default_rng(1)
    return sum(claims(simulate(generator, **settings)) for _ in range(number))


@pytest.mark.slow
def test_a_gain_is_claimed_in_a_fortieth_of_sweeps_without_one():
    assert count(claims_gain, 400) <= binom.ppf(0.999, 400, GAIN_LEVEL)


def test_a_large_gain_is_found():
    assert count(claims_gain, 20, gain=10 * DEVIATION) >= 15


@pytest.mark.slow  # 7 s: SciPy integrates the studentized range for each pair
def test_a_lead_over_any_finalist_is_claimed_in_a_twentieth_of_sweeps_without_one():
    assert count(claims_lead, 200) <= binom.ppf(0.999, 200, LEAD_LEVEL)


def test_a_large_lead_is_found():
    assert count(claims_lead, 20, gain=10 * DEVIATION) >= 15


def test_p_values_are_reproducible():
    sweep = simulate(np.random.default_rng(3))
    assert gain_p_value(sweep) == gain_p_value(sweep)
