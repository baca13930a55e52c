"""Sampler of trial settings: Optuna's samplers, made deterministic in (seed, trial number, earlier results)."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import optuna

from carclass.formatting import Value
from carclass.tuning.search_space import Dimension
from carclass.tuning.trial_records import State

MAX_STARTUP_TRIALS = 10
"""Largest number of random trials before the estimator is used; Optuna's default."""
MAX_DRAWS = 30
"""Largest number of draws for settings that no earlier trial has; of small spaces all may have been tried."""
STATES = {
    "begun": optuna.trial.TrialState.RUNNING,
    "complete": optuna.trial.TrialState.COMPLETE,
    "pruned": optuna.trial.TrialState.PRUNED,
    "failed": optuna.trial.TrialState.FAIL,
    "lost": optuna.trial.TrialState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it logs a line per suggestion otherwise


class ObservedTrial(NamedTuple):
    """Settings and results of an earlier trial."""

    values: dict[str, Value]
    state: State
    accuracies: dict[int, float]  # by epoch


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Return Optuna's distribution of a dimension."""
    if dimension.choices is not None:
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.is_int:
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def suggest_values(
    dimensions: Sequence[Dimension],
    observed: Sequence[ObservedTrial],
    sampler: str,
    seed: int,
    number: int,
    num_trials: int,
) -> dict[str, Value]:
    """Return the settings of trial `number` of `num_trials`, by dotted key.

    Each trial has its own random generator, so an interrupted sweep suggests the same settings as an uninterrupted one.
    Settings of an earlier trial are not suggested again as long as others are found: their result is known.
    observed: earlier trials; those outside of the dimensions, as trial 0 may be, are ignored.
    """
    distributions = {dimension.key: distribution(dimension) for dimension in dimensions}
    study = optuna.create_study(direction="maximize", sampler=_make_sampler(sampler, seed, number, num_trials))
    for trial in observed:
        state = "lost" if trial.state == "complete" and not trial.accuracies else trial.state
        if all(dimension.contains(trial.values[dimension.key]) for dimension in dimensions):
            study.add_trial(
                optuna.trial.create_trial(
                    state=STATES[state],
                    value=max(trial.accuracies.values()) if state == "complete" else None,
                    params=trial.values,
                    distributions=distributions,
                    intermediate_values=trial.accuracies,
                )
            )
    former = [trial.values for trial in observed]
    for _ in range(MAX_DRAWS):
        values = dict(study.ask(distributions).params)  # counts as a running trial, so that the next one differs
        if values not in former:
            break
    return values


def _make_sampler(name: str, seed: int, number: int, num_trials: int) -> optuna.samplers.BaseSampler:
    trial_seed = (seed * 1_000_003 + number) % 2**32
    if name == "random":
        return optuna.samplers.RandomSampler(trial_seed)
    num_startup = min(MAX_STARTUP_TRIALS, num_trials // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar
        # Running trials count as bad ones, so that concurrent trials do not try the same settings.
        return optuna.samplers.TPESampler(n_startup_trials=num_startup, seed=trial_seed, constant_liar=True)
