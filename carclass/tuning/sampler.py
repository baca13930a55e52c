"""Which settings to try next: Optuna's samplers, asked so that the answer depends on (seed, number, results) alone."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import optuna

from carclass.formatting import Value
from carclass.tuning.search_space import Dimension
from carclass.tuning.trial_records import State

MAX_BY_CHANCE = 10
"""Trials before the estimator has its say, at most; Optuna's default."""
STATES = {
    "begun": optuna.trial.TrialState.RUNNING,
    "complete": optuna.trial.TrialState.COMPLETE,
    "pruned": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
}


class KnownTrial(NamedTuple):
    """What is known of a trial when the next settings are asked for."""

    values: dict[str, Value]
    state: State
    accuracies: dict[int, float]  # by epoch


optuna.logging.set_verbosity(optuna.logging.WARNING)  # else every question is a line


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """What Optuna calls a range or choices."""
    if dimension.choices is not None:
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.is_int:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def suggest_values(
    dimensions: Sequence[Dimension], known: Sequence[KnownTrial], sampler: str, seed: int, number: int, num_trials: int
) -> dict[str, Value]:
    """The settings of trial `number` of `num_trials`, by dotted key.

    Every trial has a generator of its own, so a sweep that is interrupted and one that isn't try the same.
    known: the trials before it; those outside of the dimensions, as the experiment itself may be, teach nothing.
    """
    distributions = {dimension.key: distribution(dimension) for dimension in dimensions}
    own_seed = (seed * 1_000_003 + number) % 2**32
    chosen: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(own_seed)
    if sampler == "tpe":
        by_chance = min(MAX_BY_CHANCE, num_trials // 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar, for years
            # Trials that are still running count as bad ones, lest several at a time try the same.
            chosen = optuna.samplers.TPESampler(n_startup_trials=by_chance, seed=own_seed, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=chosen)
    for one in known:
        if all(dimension.contains(one.values[dimension.key]) for dimension in dimensions):
            study.add_trial(
                optuna.trial.create_trial(
                    state=STATES[one.state],
                    value=max(one.accuracies.values()) if one.state == "complete" else None,
                    params=one.values,
                    distributions=distributions,
                    intermediate_values=one.accuracies,
                )
            )
    return dict(study.ask(distributions).params)
