"""Whether one classifier is better than another, from which of the same photos each gets right."""

from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import binomtest

NUM_RESAMPLES = 10_000
Words = Literal["better", "worse", "no clear difference"]


class Verdict(NamedTuple):
    """How far accuracy of one classifier is above another's on the same photos; all but counts are fractions of one."""

    difference: float
    low: float
    """Lower end of the difference's 95 % interval."""
    high: float
    p_value: float
    only_ours: int
    """Photos that only the first classifier gets right."""
    only_theirs: int
    num_photos: int

    @property
    def words(self) -> Words:
        """What the interval says: the two differ when it leaves out 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"


def compare(ours: np.ndarray, theirs: np.ndarray, seed: int) -> Verdict:
    """Compare two classifiers. bool (N,) each: whether a photo was classified correctly, photos in the same order.

    ValueError when there are no photos or not the same number of them.
    """
    only_ours, only_theirs = _disagreements(ours, theirs)
    low, high = difference_interval(ours, theirs, seed)
    difference = (only_ours - only_theirs) / len(ours)
    return Verdict(difference, low, high, mcnemar(ours, theirs), only_ours, only_theirs, len(ours))


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The two-sided p-value of McNemar's test (1947, Psychometrika 12:153-157) in its exact, binomial form.

    bool (N,) each, as `compare` takes them. 1 where the two disagree nowhere.
    """
    only_ours, only_theirs = _disagreements(ours, theirs)
    if only_ours + only_theirs == 0:
        return 1.0
    return float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def difference_interval(ours: np.ndarray, theirs: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % interval of accuracy(ours) - accuracy(theirs): a bootstrap over photos (Efron 1979), percentiles.

    bool (N,) each, as `compare` takes them. It knows of the chance in which photos there are, not of that in training.
    """
    only_ours, only_theirs = _disagreements(ours, theirs)
    total = len(ours)
    # A resample's difference hangs on these three counts alone, so they are drawn instead of the photos.
    shares = np.array([only_ours, only_theirs, total - only_ours - only_theirs]) / total
    counts = np.random.default_rng(seed).multinomial(total, shares, NUM_RESAMPLES)
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / total, (2.5, 97.5))
    return float(low), float(high)


def _disagreements(ours: np.ndarray, theirs: np.ndarray) -> tuple[int, int]:
    """How many photos only the first gets right, and only the second."""
    for name, correct in (("ours", ours), ("theirs", theirs)):
        if correct.dtype != bool or correct.ndim != 1:
            raise ValueError(f"{name} must be bool of shape (N,), got {correct.dtype} of {correct.shape}")
    if len(ours) != len(theirs):
        raise ValueError(f"ours holds {len(ours)} photos and theirs {len(theirs)}: pass the photos that both have")
    if not len(ours):
        raise ValueError("ours and theirs hold no photos: there is nothing to compare, pass photos that both have")
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
