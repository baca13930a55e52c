"""Significance of differences in val accuracy between the finalists of a sweep and its unchanged experiment.

Only seeds of training besides the search's count: with that one the finalists were chosen, so it flatters them. The
tests assume that the accuracies of all settings vary equally between seeds, as a few seeds can't show it for each.
"""

import warnings
from statistics import variance

import numpy as np
from scipy.stats import dunnett, tukey_hsd

from carclass.tuning.results import SeedRepeats, SweepResult

GAIN_LEVEL, LEAD_LEVEL = 0.025, 0.05
"""p-values below which a gain over trial 0 (one-sided) and a lead over another finalist (two-sided) are significant."""
MIN_REPEATS = 2
"""Number of seeds besides the search's that each of the compared settings needs."""


def find_obstacle(sweep: SweepResult) -> str | None:
    """Return the reason why the repeated trials can't be compared over seeds; None if they can."""
    groups = _seed_repeats(sweep)
    if sweep.lost:
        return "the metrics of some trials are lost"
    if any(group.num_missing for group in groups) or len({len(group.accuracies) for group in groups}) > 1:
        return "some repeats with other seeds failed or are not finished"
    if min(len(group.accuracies) for group in groups) < MIN_REPEATS:
        return f"it takes {MIN_REPEATS} seeds that did not choose the best trial (`num_seeds: {MIN_REPEATS + 1}`)"
    if not any(variance(group.accuracies) for group in groups):
        return "every seed reaches the same accuracy, so the variation between seeds is unknown"
    return None


def gain_p_value(sweep: SweepResult) -> float:
    """Return the one-sided p-value of the best trial's gain over trial 0; there must be no obstacle.

    Dunnett's test (1955, JASA 50:1096-1121) of all finalists accounts for the choice among them.
    """
    finalists = [group for group in _seed_repeats(sweep) if group.number != 0]
    with warnings.catch_warnings(action="ignore"):  # of a group whose seeds are alike; the pooled variance counts
        result = dunnett(
            *(group.accuracies for group in finalists),
            control=sweep.seed_repeats(0).accuracies,
            alternative="greater",
            rng=np.random.default_rng(0),  # p-values are quasi-Monte Carlo integrals
        )
    return float(result.pvalue[[group.number for group in finalists].index(sweep.best.trial.number)])


def lead_p_values(sweep: SweepResult) -> dict[int, float]:
    """Return the two-sided p-value of the best trial's lead over each other finalist, by number, but for trial 0.

    Tukey's test (1949, Biometrics 5:99-114) of all pairs accounts for the choice of the best. Empty if there is no
    other; there must be no obstacle.
    """
    groups, best = _seed_repeats(sweep), sweep.best.trial.number
    others = [i for i, group in enumerate(groups) if group.number not in (0, best)]
    if not others:
        return {}
    p_values = tukey_hsd(*(group.accuracies for group in groups)).pvalue
    first = [group.number for group in groups].index(best)
    return {groups[i].number: float(p_values[first, i]) for i in others}


def _seed_repeats(sweep: SweepResult) -> list[SeedRepeats]:
    return [sweep.seed_repeats(result.trial.number) for result in sweep.repeated]
