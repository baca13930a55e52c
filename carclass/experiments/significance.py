"""Significance of the difference in accuracy between two classifiers on the same photos."""

from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest

NUM_RESAMPLES = 10_000
LEVEL = 0.05
"""Largest rate of wrong verdicts on equal classifiers, "better" and "worse" together."""
Verdict = Literal["better", "worse", "no clear difference"]


class AccuracyDifference(NamedTuple):
    """Difference in accuracy of a first and a second classifier on the same photos, as fractions."""

    difference: float
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the 95 % interval of the difference."""
    p_value: float
    only_first: int
    """Number of photos that only the first classifies correctly."""
    only_second: int
    """Number of photos that only the second classifies correctly."""
    num_photos: int

    @property
    def verdict(self) -> Verdict:
        """Return "better" or "worse" for the first classifier if the interval and McNemar's test agree.

        On few photos the interval alone excludes 0 too often: with 5 disagreements that all favour the first, p is
        0.0625.
        """
        if self.p_value >= LEVEL:
            return "no clear difference"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"


def compare(first: np.ndarray, second: np.ndarray, seed: int) -> AccuracyDifference:
    """Compare two classifiers. bool (N,) each: correctly classified photos, in the same order.

    Raise ValueError if there are no photos or if their numbers differ.
    """
    only_first, only_second = _count_disagreements(first, second)
    low, high = difference_interval(first, second, seed)
    difference = (only_first - only_second) / len(first)
    return AccuracyDifference(difference, low, high, mcnemar(first, second), only_first, only_second, len(first))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact (binomial) test (1947, Psychometrika 12:153-157).

    bool (N,) each, as in `compare`. 1 if the classifiers never disagree.
    """
    only_first, only_second = _count_disagreements(first, second)
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def difference_interval(first: np.ndarray, second: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of accuracy(first) - accuracy(second): paired bootstrap over photos (Efron 1979).

    bool (N,) each, as in `compare`. Percentiles; covers the choice of photos, not the randomness of training.
    """
    only_first, only_second = _count_disagreements(first, second)
    total = len(first)
    # A resample's difference depends only on these three counts, so they are drawn instead of photos.
    shares = np.array([only_first, only_second, total - only_first - only_second]) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, NUM_RESAMPLES)
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / total, (2.5, 97.5))
    return float(low), float(high)


def _count_disagreements(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Return the numbers of photos that only the first and only the second classifies correctly."""
    for name, correct in (("first", first), ("second", second)):
        if correct.dtype != bool or correct.ndim != 1:
            raise ValueError(f"{name} must be bool of shape (N,), got {correct.dtype} of shape {correct.shape}")
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} photos and second {len(second)}: pass only photos that both have")
    if not len(first):
        raise ValueError("first and second are empty: pass photos that both have")
    return int((first & ~second).sum()), int((second & ~first).sum())
