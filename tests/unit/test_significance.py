"""Significance of differences in accuracy: McNemar's test and the paired bootstrap."""

from collections import Counter
from functools import partial
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import multinomial

from carclass.experiments.significance import compare, difference_interval, mcnemar


def make_correct(only_first: int, only_second: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the correctness (first, second) of two classifiers, bool (N,) each, from counts of photos."""
    counts = (only_first, only_second, both, neither)
    return np.repeat([True, False, True, False], counts), np.repeat([False, True, True, False], counts)


def test_mcnemar_textbook_value():
    """Check an example of Siegel and Castellan (1988): 5 + 1 changes give 2 (1 + 6) / 64."""
    assert mcnemar(*make_correct(5, 1, 30, 4)) == pytest.approx(14 / 64)


@pytest.mark.parametrize(("only_first", "only_second"), [*product(range(1, 6), repeat=2), (30, 12), (0, 10)])
def test_mcnemar_equals_binomial_tails(only_first, only_second):
    total = only_first + only_second
    tail = sum(comb(total, k) for k in range(min(only_first, only_second) + 1)) / 2**total
    assert mcnemar(*make_correct(only_first, only_second, 7, 3)) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_without_disagreement_is_one():
    assert mcnemar(*make_correct(0, 0, 5, 5)) == 1.0


def test_mcnemar_is_symmetric():
    first, second = make_correct(9, 2, 20, 5)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_ignores_agreement():
    assert mcnemar(*make_correct(9, 2)) == mcnemar(*make_correct(9, 2, 500, 300))


def test_interval_equals_bootstrap_over_photos():
    """Compare with a bootstrap that resamples single photos."""
    first, second = make_correct(60, 30, 200, 110)
    generator = np.random.default_rng(3)
    gains = first.astype(int) - second.astype(int)
    resampled = [gains[generator.integers(0, 400, 400)].mean() for _ in range(10_000)]
    expected = np.percentile(resampled, (2.5, 97.5))
    assert difference_interval(first, second, seed=1) == pytest.approx(expected, abs=0.004)


def test_interval_width_matches_normal_approximation():
    first, second = make_correct(300, 200, 3000, 1500)
    low, high = difference_interval(first, second, seed=1)
    deviation = np.std(first.astype(int) - second.astype(int)) / np.sqrt(5000)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_interval_coverage_is_95_percent():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(400):
        correct = make_correct(*generator.multinomial(500, (0.12, 0.08, 0.6, 0.2)))
        low, high = difference_interval(*correct, seed=seed)
        inside += low <= 0.04 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_interval_without_disagreement_is_zero():
    assert difference_interval(*make_correct(0, 0, 5, 5), seed=1) == (0.0, 0.0)


def test_interval_is_deterministic():
    correct = make_correct(9, 2, 20, 5)
    assert difference_interval(*correct, seed=1) == difference_interval(*correct, seed=1)


def test_result_counts_disagreements():
    result = compare(*make_correct(9, 2, 20, 5), seed=1)
    assert (result.only_first, result.only_second, result.num_photos) == (9, 2, 36)


def test_result_has_difference_of_accuracies():
    first, second = make_correct(9, 2, 20, 5)
    assert compare(first, second, seed=1).difference == pytest.approx(first.mean() - second.mean())


@pytest.mark.parametrize(
    ("only_first", "only_second", "verdict"),
    [
        (90, 10, "better"),
        (10, 90, "worse"),
        (52, 48, "no clear difference"),
        (0, 0, "no clear difference"),
        (6, 0, "better"),
        (0, 6, "worse"),
    ],
)
def test_verdict_follows_interval_and_mcnemar(only_first, only_second, verdict):
    assert compare(*make_correct(only_first, only_second, 50, 50), seed=1).verdict == verdict


def test_five_disagreements_are_too_few_for_a_verdict():
    """Use counts whose interval excludes 0, at a p-value of 0.0625."""
    result = compare(*make_correct(5, 0, 50, 50), seed=1)
    assert result.low > 0
    assert result.verdict == "no clear difference"


@pytest.mark.parametrize("disagreement", [0.4, 0.6, 0.8])
def test_equal_classifiers_are_rarely_called_different(disagreement):
    """Sum the probabilities of all counts with a verdict, among 8 photos and classifiers of equal accuracy."""
    shares, rates = (disagreement / 2, disagreement / 2, 1 - disagreement), Counter[str]()
    for first, second in product(range(9), repeat=2):
        if first + second <= 8:
            counts = (first, second, 8 - first - second)
            verdict = compare(*make_correct(*counts), seed=1).verdict
            rates[verdict] += multinomial.pmf(counts, 8, shares)
    assert rates["better"] <= 0.025
    assert rates["better"] + rates["worse"] <= 0.05


def test_different_classifiers_are_told_apart():
    generator = np.random.default_rng(0)
    tables = generator.multinomial(300, (0.2, 0.05, 0.6, 0.15), 50)
    assert sum(compare(*make_correct(*table), seed=1).verdict == "better" for table in tables) > 45


@pytest.mark.parametrize("function", [mcnemar, partial(compare, seed=1), partial(difference_interval, seed=1)])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.ones(3, bool), np.ones(4, bool), "first has 3 photos and second 4: pass only photos that both have"),
        (np.ones(0, bool), np.ones(0, bool), "first and second are empty"),
        (np.ones(3, int), np.ones(3, bool), r"first must be bool of shape \(N,\), got int64 of shape"),
        (np.ones(3, bool), np.ones((3, 1), bool), r"second must be bool of shape \(N,\), got bool of shape \(3, 1\)"),
    ],
)
def test_invalid_input_is_refused(function, first, second, message):
    with pytest.raises(ValueError, match=message):
        function(first, second)
