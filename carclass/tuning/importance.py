"""Importance of each varied setting for val accuracy: Optuna's fANOVA on resamples of the trials."""

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
"""Smallest number of trials from which importance is estimated."""
NUM_RESAMPLES = 20
NUM_TREES = 32  # with 20 resamples as accurate as Optuna's default of 64; 33 trials of 6 settings take a second


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Share of the variance of val accuracy over the whole space that a setting by itself accounts for."""

    key: str
    mean: float
    """Mean over resamples of the trials; the means of all settings add up to 1."""
    std: float
    """Standard deviation over resamples."""


def importances(sweep: SweepResult) -> list[Importance]:
    """Return the importance of every varied setting, highest first; empty if trials are too few or all alike.

    Pruned trials count with their accuracy so far. Trial 0 is left out if it lies outside of the space.
    """
    trials = [_to_optuna(result, sweep.dimensions) for result in sweep.searched if _is_usable(result, sweep.dimensions)]
    if len(trials) < MIN_TRIALS or not _has_variance(trials):
        return []
    generator = np.random.default_rng(sweep.seed)
    samples = []
    for _ in range(NUM_RESAMPLES):
        resample = [trials[i] for i in generator.integers(0, len(trials), len(trials))]
        seed = int(generator.integers(2**31))
        if _has_variance(resample):
            samples.append(_fanova(resample, seed))
    if not samples:
        return []
    by_key = {one.key: [sample[one.key] for sample in samples] for one in sweep.dimensions}
    ranked = [
        Importance(key=key, mean=float(np.mean(values)), std=float(np.std(values))) for key, values in by_key.items()
    ]
    return sorted(ranked, key=lambda importance: (-importance.mean, importance.key))


def _is_usable(result: TrialResult, dimensions: Sequence[Dimension]) -> bool:
    is_inside = all(dimension.contains(result.trial.values[dimension.key]) for dimension in dimensions)
    return is_inside and result.best_epoch is not None


def _to_optuna(result: TrialResult, dimensions: Sequence[Dimension]) -> optuna.trial.FrozenTrial:
    """Return Optuna's form of a trial, with the logarithms of values that are searched on a logarithmic scale.

    Optuna's fANOVA ignores the scale, so the top of the range would dominate the importance of a learning rate.
    """
    params: dict[str, Value] = {}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for dimension in dimensions:
        value = result.trial.values[dimension.key]
        if dimension.log and dimension.low is not None and dimension.high is not None:
            params[dimension.key] = math.log(float(value))  # type: ignore[arg-type]
            distributions[dimension.key] = optuna.distributions.FloatDistribution(
                math.log(dimension.low), math.log(dimension.high)
            )
        else:
            params[dimension.key] = value
            distributions[dimension.key] = sampler.distribution(dimension)
    return optuna.trial.create_trial(value=result.accuracy, params=params, distributions=distributions)


def _has_variance(trials: Sequence[optuna.trial.FrozenTrial]) -> bool:
    """Return True if both the accuracies and the settings of the trials differ."""
    return len({trial.value for trial in trials}) > 1 and len({str(trial.params) for trial in trials}) > 1


def _fanova(trials: Sequence[optuna.trial.FrozenTrial], seed: int) -> dict[str, float]:
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    evaluator = FanovaImportanceEvaluator(n_trees=NUM_TREES, seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
