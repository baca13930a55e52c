"""Findings of a sweep in sentences: best trial, confidence, cost, and recommendations for the next sweep."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from carclass.config.schema import TrainSettings
from carclass.formatting import device_time_text, percent_text, value_text
from carclass.tuning import significance
from carclass.tuning.importance import Importance
from carclass.tuning.marks import setting_axis
from carclass.tuning.results import NUM_REPEATED, SeedRepeats, SweepResult, TrialResult
from carclass.tuning.search_space import Dimension, short_names

EDGE = 0.1
"""Share of a range at each end; a best value there suggests a wider range."""
NEGLIGIBLE = 0.05
"""Importance below which a setting is better fixed."""
STILL_LEARNING = 0.005
"""Gain in val accuracy over the last fifth of the epochs above which more epochs are recommended."""
NARROW = 0.6
"""Largest share of a range with the best quarter of trials for which a finer search is recommended."""


def describe_results(sweep: SweepResult) -> list[str]:
    """Return the results of a sweep in sentences; there must be a complete trial."""
    return [
        _describe_best(sweep),
        *_describe_ties(sweep),
        *_describe_confidence(sweep),
        *_describe_selection_bias(sweep),
        describe_pruning(sweep),
        *_describe_unfinished(sweep),
    ]


def recommend(sweep: SweepResult, ranked: Sequence[Importance]) -> list[str]:
    """Return recommendations for the next sweep, at least one. ranked: importances, highest first."""
    minor = [importance.key for importance in ranked if importance.mean < NEGLIGIBLE]
    dimensions = [dimension for dimension in sweep.dimensions if dimension.key not in minor]
    wider = {dimension.key: text for dimension in dimensions if (text := _recommend_wider(sweep, dimension))}
    sentences = [*wider.values(), *_recommend_longer(sweep)]
    if len(ranked) > 1 and ranked[0].key not in wider:
        sentences.append(_recommend_finer(sweep, ranked[0]))
    if minor:
        names = ", ".join(f"{_name(sweep, key)} ({_best_value(sweep, key)})" for key in minor)
        subject = "it hardly matters" if len(minor) == 1 else "they hardly matter"
        sentences.append(f"Fix {names} as in the best trial: {subject}.")
    return sentences or [
        "These results suggest neither other ranges nor more epochs. Next, try other seeds or vary other settings."
    ]


def describe_pruning(sweep: SweepResult) -> str:
    """Return the device time of the search and the time that pruning saved."""
    spent, saved = sweep.device_seconds, sweep.saved_device_seconds
    repeats = sum(result.device_seconds for result in sweep.trials) - spent
    time = device_time_text(spent, sweep.device)
    more = f" Repeats with other seeds took {device_time_text(repeats, sweep.device)}." if repeats else ""
    if not sweep.pruned:
        return f"The search took {time}; no trial was pruned.{more}"
    share = percent_text(saved / (spent + saved) if spent + saved else 0.0, 0)
    return (
        f"The search took {time}. Pruning ended {len(sweep.pruned)} of {len(sweep.searched)} trials early and saved "
        f"{device_time_text(saved, sweep.device)}, {share} of the time without pruning.{more}"
    )


def state_counts(sweep: SweepResult) -> str:
    """Return the number of searched trials by state: "12 complete, 8 pruned, 1 failed"."""
    states: list[str] = [result.trial.state for result in sweep.searched]
    labels = {"complete": "complete", "pruned": "pruned", "failed": "failed", "begun": "not finished", "lost": "lost"}
    return ", ".join(f"{states.count(state)} {label}" for state, label in labels.items() if state in states)


def mean_std_text(repeats: SeedRepeats) -> str:
    """Return "88.0 ± 0.3 %", for a single seed without the standard deviation."""
    std = f" ± {repeats.std * 100:.1f}" if len(repeats.accuracies) > 1 else ""
    return f"{repeats.mean * 100:.1f}{std}\u00a0%"


def _describe_best(sweep: SweepResult) -> str:
    best = sweep.best
    accuracy = f"val accuracy {percent_text(best.accuracy)} in epoch {best.best_epoch} of the search"
    if best.trial.number == 0:
        seeds = "" if best is sweep.complete[0] else " over other seeds than the search's"
        return f"No trial is better than the unchanged experiment{seeds}, {best.trial.title}: {accuracy}."
    return f"The best trial is trial {best.trial.number}, {best.trial.title}: {accuracy}."


def _describe_ties(sweep: SweepResult) -> Iterator[str]:
    """Name the trials that equal the best one, and those that equal the last finalist but were not repeated."""
    if sweep.tied:
        yield f"It is the first of equals, with {_trials_text(sweep.tied)}."
    finalists, others = sweep.distinct[:NUM_REPEATED], sweep.distinct[NUM_REPEATED:]
    missed = [result for result in others if result.accuracy == finalists[-1].accuracy and result.trial.number != 0]
    if missed and any(sweep.seed_repeats(result.trial.number).accuracies for result in finalists):
        last = f"trial {finalists[-1].trial.number}"
        yield f"Equal to {last} in the search, but not trained with other seeds: {_trials_text(missed)}."


def _trials_text(results: Sequence[TrialResult]) -> str:
    numbers = [str(result.trial.number) for result in results]
    return f"trial {numbers[0]}" if len(numbers) == 1 else f"trials {', '.join(numbers[:-1])} and {numbers[-1]}"


def _describe_confidence(sweep: SweepResult) -> Iterator[str]:
    """Describe the best trial's accuracy over other seeds, its gain over trial 0 and its lead over other finalists."""
    best = sweep.seed_repeats(sweep.best.trial.number)
    base = next((result for result in sweep.repeated if result.trial.number == 0 and best.number != 0), None)
    if base is not None:
        yield _compare_means(sweep.best, best, base, sweep.seed_repeats(0))
    elif best.accuracies:
        yield f"{_over_seeds(best)} it reaches {mean_std_text(best)}."
    if len(sweep.repeated) == 1:
        return
    if (obstacle := significance.find_obstacle(sweep)) is not None:
        yield f"Nothing can be said about differences between these trials, which may be chance: {obstacle}."
        return
    if base is not None:
        p_value = significance.gain_p_value(sweep)
        conclusion = "is a gain on these val photos" if p_value < significance.GAIN_LEVEL else "may be chance"
        yield f"This {conclusion} ({_p_text(p_value)}, one-sided, by Dunnett's test over these seeds)."
    yield from _describe_lead(significance.lead_p_values(sweep))


def _compare_means(best: TrialResult, repeats: SeedRepeats, base: TrialResult, base_repeats: SeedRepeats) -> str:
    """Compare the best trial with trial 0 over other seeds, or in the search if one of them has no other."""
    if repeats.accuracies and base_repeats.accuracies:
        start = f"{_over_seeds(repeats)} it reaches {mean_std_text(repeats)}; the"
        text, gap = mean_std_text(base_repeats), repeats.mean - base_repeats.mean
    else:
        start, text, gap = "In the search the", percent_text(base.accuracy), best.accuracy - base.accuracy
    return f"{start} unchanged experiment reaches {text}, {_points(abs(gap))} {'less' if gap >= 0 else 'more'}."


def _over_seeds(repeats: SeedRepeats) -> str:
    count = len(repeats.accuracies)
    if count == 1:
        return "With one seed other than the search's"
    return f"Over {count} seeds other than the search's (mean ± standard deviation)"


def _p_text(p_value: float) -> str:
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p below 0.001"


def _describe_lead(p_values: dict[int, float]) -> Iterator[str]:
    """Name the other finalists over which the best trial's lead may be chance. p_values: of lead_p_values."""
    similar = [str(number) for number, p_value in sorted(p_values.items()) if p_value >= significance.LEAD_LEVEL]
    if similar:
        names = f"trial {similar[0]}" if len(similar) == 1 else f"trials {' and '.join(similar)}"
        yield f"Its lead over {names} may be chance: it is within the variation between seeds (Tukey's test)."
    elif p_values:
        yield "Its lead over the next best trials is larger than the variation between seeds (Tukey's test)."


def _describe_selection_bias(sweep: SweepResult) -> Iterator[str]:
    if len(sweep.searched) > 1:
        yield (
            f"Val accuracies of the search are optimistic: the best of {len(sweep.searched)} trials was selected on "
            "the same val photos. Expect a lower accuracy on new photos; only photos that no choice used, "
            "such as the test split, give an unbiased estimate."
        )


def _describe_unfinished(sweep: SweepResult) -> Iterator[str]:
    failed = sum(result.trial.state == "failed" for result in sweep.counted)
    begun = sum(result.trial.state == "begun" for result in sweep.counted)
    if failed:
        yield f"{failed} {'trial' if failed == 1 else 'trials'} failed; the table lists the reasons."
    if sweep.lost:
        yield (
            f"{len(sweep.lost)} {'trial has' if len(sweep.lost) == 1 else 'trials have'} lost the metrics, and "
            f"{'is' if len(sweep.lost) == 1 else 'are'} neither ranked nor tested; the table lists the reasons."
        )
    if begun:
        yield (
            f"{begun} {'trial has' if begun == 1 else 'trials have'} not finished: the sweep is running or was "
            "interrupted, and these results are preliminary."
        )


def _recommend_wider(sweep: SweepResult, dimension: Dimension) -> str | None:
    """Recommend a wider range if the best value is at an end of it and the setting allows values beyond."""
    value, low, high = sweep.best.trial.values[dimension.key], dimension.low, dimension.high
    if isinstance(value, bool) or not isinstance(value, int | float) or low is None or high is None:
        return None
    if dimension.log and value <= 0:
        return None
    scaled, start, end = (math.log(number) if dimension.log else number for number in (value, low, high))
    share, name = (scaled - start) / (end - start), _name(sweep, dimension.key)
    lowest, highest = _setting_bounds(dimension.key)
    reason = f"the best value, {value_text(value)}, is at that end of the range {value_text(low)} to {value_text(high)}"
    if share <= EDGE and (lowest is None or low > lowest):
        return f"Search {name} below {value_text(min(low, value))} too: {reason}."
    if share >= 1 - EDGE and (highest is None or high < highest):
        return f"Search {name} above {value_text(max(high, value))} too: {reason}."
    return None


def _setting_bounds(key: str) -> tuple[float | None, float | None]:
    """Return the smallest and the largest value that the schema allows for a setting; None for no bound."""
    section: Any = TrainSettings
    *steps, last = key.split(".")[1:]
    for step in steps:
        field = section.model_fields.get(step)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return None, None
    rules = section.model_fields[last].metadata if last in section.model_fields else []
    bounds = [
        next((getattr(rule, name) for rule in rules for name in names if hasattr(rule, name)), None)
        for names in (("ge", "gt"), ("le", "lt"))
    ]
    return bounds[0], bounds[1]


def _recommend_longer(sweep: SweepResult) -> Iterator[str]:
    """Recommend more epochs if the best trial still improved in its last ones."""
    accuracies = [row["val_accuracy"] for row in sweep.best.epochs if math.isfinite(row["val_accuracy"])]
    num_last = max(1, round(len(accuracies) / 5))
    if len(accuracies) <= num_last:
        return
    gain = max(accuracies[-num_last:]) - max(accuracies[:-num_last])
    if gain >= STILL_LEARNING:
        since = "in its last epoch" if num_last == 1 else f"in its last {num_last} epochs"
        yield f"Give trials more than {len(accuracies)} epochs: the best one still gained {_points(gain)} {since}."


def _recommend_finer(sweep: SweepResult, first: Importance) -> str:
    """Recommend how to search the most important setting, by its values in the best quarter of trials."""
    name, key = _name(sweep, first.key), first.key
    reason = f"it is the most important setting (importance {first.mean:.2f} ± {first.std:.2f})"
    dimension = next(dimension for dimension in sweep.dimensions if dimension.key == key)
    if dimension.choices is not None:
        return f"Fix {name} at {_best_value(sweep, key)} and search the others: {reason}."
    ranked = sorted(
        (result for result in sweep.searched if result.best_epoch is not None), key=lambda result: -result.accuracy
    )
    values = [result.trial.values[key] for result in ranked if dimension.contains(result.trial.values[key])]
    axis = setting_axis(dimension, values)
    best = sorted(values[: max(2, math.ceil(len(values) / 4))], key=axis.place)
    if axis.place(best[-1]) - axis.place(best[0]) > NARROW:
        return f"Search {name} with more trials: {reason}, and the best quarter of trials covers most of its range."
    return (
        f"Search {name} more finely: {reason}, and in the best quarter of trials it is between "
        f"{value_text(best[0])} and {value_text(best[-1])}."
    )


def _name(sweep: SweepResult, key: str) -> str:
    return short_names([dimension.key for dimension in sweep.dimensions])[key]


def _best_value(sweep: SweepResult, key: str) -> str:
    return value_text(sweep.best.trial.values[key])


def _points(difference: float) -> str:
    return f"{difference * 100:.1f} points"
