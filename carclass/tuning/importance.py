"""How much each setting decides of the accuracy that trials reach: Optuna's fANOVA, on resamples of the trials."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator

from carclass.formatting import Value
from carclass.tuning import sampler
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import Dimension

MIN_TRIALS = 8
"""Fewer say nothing of importance."""
NUM_RESAMPLES = 20
NUM_TREES = 32  # with 20 resamples as good as Optuna's 64; 33 trials of 6 settings take a second


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A setting's share in how accuracy varies over the whole space."""

    key: str
    mean: float
    """Over resamples of the trials; those of all settings add up to 1."""
    spread: float
    """Standard deviation over them: how much hangs on which trials there happen to be."""


def importances(sweep: SweepResult) -> list[Importance]:
    """Every varied setting's importance, the highest first; empty when trials are too few or all alike.

    A pruned trial counts with what it had reached. Trial 0 is left out when it lies outside of the space.
    """
    found = [one for one in sweep.searched if _counts(one, sweep.dimensions)]
    trials = [_trial(one, sweep.dimensions) for one in found]
    if len(trials) < MIN_TRIALS or not _differ(trials):
        return []
    generator = np.random.default_rng(sweep.seed)
    shares = []
    for _ in range(NUM_RESAMPLES):
        drawn = [trials[i] for i in generator.integers(0, len(trials), len(trials))]
        seed = int(generator.integers(2**31))
        if _differ(drawn):
            shares.append(_shares(drawn, seed))
    if not shares:
        return []
    table = {one.key: [share[one.key] for share in shares] for one in sweep.dimensions}
    ranked = [
        Importance(key=key, mean=float(np.mean(values)), spread=float(np.std(values))) for key, values in table.items()
    ]
    return sorted(ranked, key=lambda one: (-one.mean, one.key))


def _counts(one: TrialResult, dimensions: Sequence[Dimension]) -> bool:
    inside = all(dimension.contains(one.trial.values[dimension.key]) for dimension in dimensions)
    return inside and bool(one.epochs) and math.isfinite(one.accuracy)


def _trial(one: TrialResult, dimensions: Sequence[Dimension]) -> optuna.trial.FrozenTrial:
    """A trial as Optuna knows it, with the logarithm of each value that was searched by its logarithm.

    Optuna's fANOVA takes such ranges as they are, and so would judge a learning rate by the top of its range alone.
    """
    params: dict[str, Value] = {}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for dimension in dimensions:
        value = one.trial.values[dimension.key]
        if dimension.log and dimension.low is not None and dimension.high is not None:
            params[dimension.key] = math.log(float(value))  # type: ignore[arg-type]
            distributions[dimension.key] = optuna.distributions.FloatDistribution(
                math.log(dimension.low), math.log(dimension.high)
            )
        else:
            params[dimension.key] = value
            distributions[dimension.key] = sampler.distribution(dimension)
    return optuna.trial.create_trial(value=one.accuracy, params=params, distributions=distributions)


def _differ(trials: Sequence[optuna.trial.FrozenTrial]) -> bool:
    """Whether there is anything to explain, and anything to explain it by."""
    return len({trial.value for trial in trials}) > 1 and len({str(trial.params) for trial in trials}) > 1


def _shares(trials: Sequence[optuna.trial.FrozenTrial], seed: int) -> dict[str, float]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    evaluator = FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
