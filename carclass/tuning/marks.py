"""Marks of trials and axes of settings in a sweep's charts."""

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from carclass.formatting import Value, percent_text, value_text
from carclass.reporting.axes import LONG_NAME, OFF_SCALE, RANGE_START, Axis, Tick, is_on_scale, log_ticks, ticks_within
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import Dimension

STATE_LABELS = {"begun": "not finished"}
"""Labels of states that differ from the state's name."""
CROSS = Markup('<path class="cross" d="M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5"/>')
SQUARE = Markup('<rect class="square" x="-4" y="-4" width="8" height="8"/>')
RING = Markup('<circle class="ring" r="9.5"/>')


def setting_axis(dimension: Dimension, values: Iterable[Value]) -> Axis:
    """Return the axis of a setting, extended to the given values; only those of trial 0 can be outside of its range."""
    values = list(values)
    if dimension.choices is not None:
        names = tuple(dict.fromkeys(value_text(value) for value in (*dimension.choices, *values)))
        labels = zip(_distinct_parts(names), names, strict=True)
        ticks = [Tick((i + 0.5) / len(names), label, name) for i, (label, name) in enumerate(labels)]
        return Axis(ticks=ticks, categories=names)
    numbers = [float(v) for v in (dimension.low, dimension.high, *values) if is_on_scale(v, dimension.log)]  # type: ignore[arg-type]
    off_scale = sorted({value_text(value) for value in values if not is_on_scale(value, dimension.log)})
    low, high, start = min(numbers), max(numbers), RANGE_START if off_scale else 0.0
    axis = Axis(ticks=[], start=start, low=low, high=high, log=dimension.log)
    places = log_ticks(low, high) if dimension.log else ticks_within(low, high, dimension.is_int)
    ticks = [Tick(axis.place(number), value_text(number), value_text(number)) for number in places]
    if off_scale:
        ticks.insert(0, Tick(OFF_SCALE, ", ".join(off_scale), ", ".join(off_scale)))
    return Axis(ticks=ticks, start=start, low=low, high=high, log=dimension.log)


def _distinct_parts(names: Sequence[str]) -> list[str]:
    """Return names without their common first and last words, if one of them is long."""
    if len(names) < 2 or max(map(len, names)) <= LONG_NAME:
        return list(names)
    words = [re.findall(r"[^/._-]+[/._-]*|[/._-]+", name) for name in names]
    num_first = _num_common(words)
    rest = [parts[num_first:] for parts in words]
    num_last = _num_common([parts[::-1] for parts in rest])
    texts = ["".join(parts[: len(parts) - num_last]) for parts in rest]
    before, after = "…" if num_first else "", "…" if num_last and not num_first else ""
    return [f"{before}{text.rstrip('/._-') if num_last else text}{after}" for text in texts]


def _num_common(words: Sequence[Sequence[str]]) -> int:
    """Return the number of leading words that all have in common."""
    differing = (i for i, parts in enumerate(zip(*words, strict=False)) if len({*parts}) > 1)
    return next(differing, min(map(len, words)))


def state_label(result: TrialResult) -> str:
    """Return a trial's state in words."""
    return STATE_LABELS.get(result.trial.state, result.trial.state)


def tooltip(result: TrialResult) -> str:
    """Return a trial's state, settings and result in one line."""
    accuracy = percent_text(result.accuracy) if result.best_epoch else "none"
    epochs = f"{len(result.epochs)} of {result.max_epochs} epochs"
    return (
        f"trial {result.trial.number}, {state_label(result)}: {result.trial.title}; val accuracy {accuracy}, {epochs}"
    )


def css_classes(sweep: SweepResult, result: TrialResult) -> str:
    """Return the CSS classes of a trial's line or mark: its state, `baseline` for trial 0, `best`."""
    classes: list[str] = [result.trial.state]
    if result.trial.number == 0:
        classes.append("baseline")
    if is_best(sweep, result):
        classes.append("best")
    return " ".join(classes)


def is_best(sweep: SweepResult, result: TrialResult) -> bool:
    """Return True for the best trial of a sweep."""
    return bool(sweep.complete) and result.trial.number == sweep.best.trial.number


def best_classes(sweep: SweepResult) -> str:
    """Return the CSS classes of the best trial's line, for legends; it is trial 0's line too if that is the best."""
    return f"trial {css_classes(sweep, sweep.best)}"


def charted_trials(sweep: SweepResult) -> list[TrialResult]:
    """Return the searched trials with an accuracy in drawing order: the best and trial 0 last, on top of the others."""
    charted = [result for result in sweep.searched if result.best_epoch is not None]
    return sorted(charted, key=lambda result: (is_best(sweep, result), result.trial.number == 0, result.accuracy))


def mark(sweep: SweepResult, result: TrialResult, x: float, y: float) -> Markup:
    """Draw a trial's mark in a scatter plot: dot, diamond for trial 0, cross for a failure, ring for the best."""
    shape = Markup('<circle r="4.5"/>')
    if result.trial.number == 0:
        shape = Markup('<path d="M0-7 7 0 0 7-7 0z"/>')
    elif result.trial.state == "failed":
        shape = CROSS
    ring = RING if is_best(sweep, result) else ""
    return Markup('<g class="trial {}" transform="translate({:.1f} {:.1f})"><title>{}</title>{}{}</g>').format(
        css_classes(sweep, result), x, y, tooltip(result), ring, shape
    )
