"""A sweep in words: its best setting, how sure that is, what it cost, and what its figures say to try next."""

import math
from collections.abc import Iterator, Sequence
from statistics import variance
from typing import Any, get_args

from pydantic import BaseModel
from scipy.stats import t as student

from carclass.config.schema import TrainSettings
from carclass.formatting import device_time_text, percent_text, value_text
from carclass.tuning.importance import Importance
from carclass.tuning.marks import axis_of
from carclass.tuning.results import NUM_REPEATED, SeedRepeats, SweepResult, TrialResult
from carclass.tuning.search_space import Dimension, short_names

EDGE = 0.1
"""Outer share of a range in which the best value says that the range is too narrow."""
NEGLIGIBLE = 0.05
"""Importance below which a setting might as well be fixed."""
RISE = 0.005
"""Gain in val accuracy over the last fifth of the epochs from which on a trial was still learning."""
NARROW = 0.6
"""Share of a range within which the best trials have to be to say where it should be searched more finely."""
CONFIDENCE = 0.95


def found(sweep: SweepResult) -> list[str]:
    """What the sweep found, a sentence or two at a time. There must be a complete trial."""
    return [_best(sweep), *_sure(sweep), *_flattered(sweep), pruned(sweep), *_lost(sweep)]


def advice(sweep: SweepResult, ranked: Sequence[Importance]) -> list[str]:
    """What to try next, from what is known of the best trial and of importance; never empty."""
    minor = [one.key for one in ranked if one.mean < NEGLIGIBLE]
    wider = {one.key: text for one in sweep.dimensions if one.key not in minor and (text := _wider(sweep, one))}
    words = [*wider.values(), *_longer(sweep)]
    if len(ranked) > 1 and ranked[0].key not in wider:
        words.append(_finer(sweep, ranked[0]))
    if minor:
        names = ", ".join(f"{_name(sweep, key)} ({_value(sweep.best, key)})" for key in minor)
        matter = "it hardly matters" if len(minor) == 1 else "they hardly matter"
        words.append(f"Fix {names} as the best trial has {'it' if len(minor) == 1 else 'them'}: {matter} here.")
    return words or [
        "Nothing in these trials asks for another range or more epochs: next would be other seeds, or other settings."
    ]


def pruned(sweep: SweepResult) -> str:
    """What the search took, and what pruning saved of it."""
    early = [one for one in sweep.searched if one.trial.state == "pruned"]
    spent = sum(one.device_seconds for one in sweep.searched)
    saved = sum(one.saved_device_seconds for one in early)
    again = sum(one.device_seconds for one in sweep.outcomes) - spent
    more = f" Training with more seeds took {device_time_text(again, sweep.device)}." if again else ""
    if not early:
        return f"The search took {device_time_text(spent, sweep.device)}; no trial was pruned.{more}"
    share = percent_text(saved / (spent + saved) if spent + saved else 0.0, 0)
    return (
        f"The search took {device_time_text(spent, sweep.device)}. Pruning ended {len(early)} of {len(sweep.searched)} trials "
        f"early, which saved {device_time_text(saved, sweep.device)}, {share} of what all in full would have taken.{more}"
    )


def counts(sweep: SweepResult) -> str:
    """How the searched trials ended: '12 complete, 8 pruned, 1 failed'."""
    states = [one.trial.state for one in sweep.searched]
    words = {"complete": "complete", "pruned": "pruned", "failed": "failed", "begun": "not finished"}
    return ", ".join(f"{states.count(state)} {word}" for state, word in words.items() if states.count(state))  # type: ignore[arg-type]


def over_seeds(seeds: SeedRepeats) -> str:
    """'88.0 ± 0.3 %', or without the spread for a single seed."""
    spread = f" ± {seeds.spread * 100:.1f}" if len(seeds.accuracies) > 1 else ""
    return f"{seeds.mean * 100:.1f}{spread}\u00a0%"


def best_epoch(one: TrialResult) -> int | None:
    """The epoch with the highest val accuracy that is a number, the earlier of equals."""
    rows = [row for row in one.epochs if math.isfinite(row["val_accuracy"])]
    return max(rows, key=lambda row: row["val_accuracy"])["epoch"] if rows else None


def chance(groups: Sequence[SeedRepeats], one: SeedRepeats, other: SeedRepeats) -> float | None:
    """How far apart the means of two settings may lie by their seeds alone, in 95 of 100 cases.

    From the variance between seeds pooled over `groups`, as that of two or three seeds is hardly known. None when
    no setting has more than one seed.
    """
    several = [group for group in groups if len(group.accuracies) > 1]
    freedom = sum(len(group.accuracies) - 1 for group in several)
    if freedom == 0:
        return None
    pooled = sum((len(group.accuracies) - 1) * variance(group.accuracies) for group in several) / freedom
    factor = float(student.ppf((1 + CONFIDENCE) / 2, freedom))
    return factor * math.sqrt(pooled * (1 / len(one.accuracies) + 1 / len(other.accuracies)))


def compared(sweep: SweepResult) -> list[TrialResult]:
    """The settings trained with more seeds: the best of the search, and the experiment as it stands."""
    top = sweep.complete[:NUM_REPEATED]
    return [*top, *(one for one in sweep.complete[NUM_REPEATED:] if one.trial.number == 0)]


def _best(sweep: SweepResult) -> str:
    best = sweep.best
    reached = f"val accuracy {percent_text(best.accuracy)} in the search, in epoch {best_epoch(best)}"
    if best.trial.number == 0:
        return f"No setting tried is better than the experiment as it stands, {best.trial.title}: {reached}."
    return f"The best setting is trial {best.trial.number}, {best.trial.title}: {reached}."


def _sure(sweep: SweepResult) -> Iterator[str]:
    groups = [sweep.seeds(one.trial.number) for one in compared(sweep)]
    best = sweep.seeds(sweep.best.trial.number)
    now = next((group for group in groups if group.number == 0), None)
    if all(len(group.accuracies) == 1 for group in groups):
        if now is not None and now.number != best.number:
            lead = f"The experiment as it stands reaches {over_seeds(now)}, {_points(best.mean - now.mean)} less. "
            yield f"{lead}Each was trained with a single seed, so how much of it is chance isn't known."
        return
    if now is not None and now.number != best.number:
        yield _against_now(best, now, chance(groups, best, now))
    elif len(best.accuracies) > 1:
        yield f"Over {len(best.accuracies)} seeds it reaches {over_seeds(best)} (mean ± standard deviation)."
    yield from _told_apart(best, groups)


def _against_now(best: SeedRepeats, now: SeedRepeats, margin: float | None) -> str:
    gap = best.mean - now.mean
    less = f"{_points(gap)} less" if gap >= 0 else f"{_points(-gap)} more"
    known = (
        f"Over seeds (mean ± standard deviation) it reaches {over_seeds(best)}; the experiment as it stands "
        f"reaches {over_seeds(now)}, {less}."
    )
    if margin is None:
        return known
    explained = f"seeds alone explain up to {_points(margin)} (95\u00a0% interval)"
    if gap > margin:
        return f"{known} That is a gain: {explained}."
    return f"{known} That may be chance: {explained}."


def _told_apart(best: SeedRepeats, groups: Sequence[SeedRepeats]) -> Iterator[str]:
    """Whether other settings with more seeds may be as good as the best."""
    others = [group for group in groups if group.number not in (0, best.number)]
    alike = []
    for other in others:
        margin = chance(groups, best, other)
        if margin is not None and best.mean - other.mean <= margin:
            alike.append(str(other.number))
    if alike:
        names = f"trial {alike[0]}" if len(alike) == 1 else f"trials {' and '.join(alike)}"
        yield f"It can't be told apart from {names}: their difference is within what seeds alone explain."
    elif others:
        yield "It is ahead of the next best settings by more than seeds alone explain."


def _flattered(sweep: SweepResult) -> Iterator[str]:
    if len(sweep.searched) == 1:
        return
    yield (
        f"Accuracies of the search are flattered: the best of {len(sweep.searched)} was picked by the same val photos "
        "that measure it. Expect less of new photos; only photos that no choice was made by, such as the test split's, "
        "say how much."
    )


def _lost(sweep: SweepResult) -> Iterator[str]:
    failed = sum(one.trial.state == "failed" for one in sweep.outcomes)
    begun = sum(one.trial.state == "begun" for one in sweep.outcomes)
    if failed:
        yield f"{failed} {'trial' if failed == 1 else 'trials'} failed; the table has the reasons."
    if begun:
        yield (
            f"{begun} {'trial has' if begun == 1 else 'trials have'} not finished, so these are figures of a sweep "
            "that is under way or was interrupted."
        )


def _wider(sweep: SweepResult, dimension: Dimension) -> str | None:
    """What to say when the best value is at an end of its range beyond which the setting has more values."""
    value, low, high = sweep.best.trial.values[dimension.key], dimension.low, dimension.high
    if isinstance(value, bool) or not isinstance(value, int | float) or low is None or high is None:
        return None
    if dimension.log and value <= 0:
        return None
    at, start, end = (math.log(number) if dimension.log else number for number in (value, low, high))
    share, name = (at - start) / (end - start), _name(sweep, dimension.key)
    lowest, highest = _limits(dimension.key)
    where = f"the best value, {value_text(value)}, lies at that end of {value_text(low)} to {value_text(high)}"
    if share <= EDGE and (lowest is None or low > lowest):
        return f"Search {name} below {value_text(min(low, value))} too: {where}."
    if share >= 1 - EDGE and (highest is None or high < highest):
        return f"Search {name} above {value_text(max(high, value))} too: {where}."
    return None


def _limits(key: str) -> tuple[float | None, float | None]:
    """The lowest and the highest value that a setting may have at all, by the experiment's own types."""
    section: Any = TrainSettings
    *steps, last = key.split(".")[1:]
    for step in steps:
        field = section.model_fields.get(step)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return None, None
    rules = section.model_fields[last].metadata if last in section.model_fields else []
    ends = [
        next((getattr(rule, name) for rule in rules for name in names if hasattr(rule, name)), None)
        for names in (("ge", "gt"), ("le", "lt"))
    ]
    return ends[0], ends[1]


def _longer(sweep: SweepResult) -> Iterator[str]:
    """What to say when the best trial was still learning at its end."""
    rows = [row["val_accuracy"] for row in sweep.best.epochs if math.isfinite(row["val_accuracy"])]
    last = max(1, round(len(rows) / 5))
    if len(rows) > last and (gain := max(rows[-last:]) - max(rows[:-last])) >= RISE:
        since = "in its last epoch" if last == 1 else f"in its last {last} epochs"
        yield f"Give trials more than {len(rows)} epochs: the best still gained {_points(gain)} {since}."


def _finer(sweep: SweepResult, first: Importance) -> str:
    """What to say of the setting that decides most: where the best quarter of trials has it."""
    name, key = _name(sweep, first.key), first.key
    decides = f"it decides most (importance {first.mean:.2f} ± {first.spread:.2f})"
    dimension = next(one for one in sweep.dimensions if one.key == key)
    if dimension.choices is not None:
        return f"Fix {name} at {_value(sweep.best, key)}, and search the others: {decides}."
    ranked = sorted((one for one in sweep.searched if one.epochs), key=lambda one: -one.accuracy)
    inside = [one.trial.values[key] for one in ranked if dimension.contains(one.trial.values[key])]
    axis = axis_of(dimension, inside)
    best = sorted(inside[: max(2, math.ceil(len(inside) / 4))], key=axis.place)
    if axis.place(best[-1]) - axis.place(best[0]) > NARROW:
        return f"Search {name} with more trials: {decides}, and the best quarter of them has it all over its range."
    return (
        f"Search {name} more finely: {decides}, and the best quarter of the trials has it between "
        f"{value_text(best[0])} and {value_text(best[-1])}."
    )


def _name(sweep: SweepResult, key: str) -> str:
    return short_names([one.key for one in sweep.dimensions])[key]


def _value(one: TrialResult, key: str) -> str:
    return value_text(one.trial.values[key])


def _points(difference: float) -> str:
    return f"{difference * 100:.1f} points"
