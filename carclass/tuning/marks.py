"""Marks of trials in a sweep's charts."""

import math
import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from carclass.formatting import Value, percent_text, value_text
from carclass.reporting.axes import LONG_NAME, OFF_SCALE, RANGE_START, Axis, Tick, is_on_scale, log_ticks, ticks_within
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import Dimension

STATES = {"begun": "not finished"}
"""States that the page calls otherwise than the records."""
CROSS = Markup('<path class="cross" d="M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5"/>')
SQUARE = Markup('<rect class="square" x="-4" y="-4" width="8" height="8"/>')
RING = Markup('<circle class="ring" r="9.5"/>')


def axis_of(dimension: Dimension, values: Iterable[Value]) -> Axis:
    """The axis of a setting on which these values have a place too; only trial 0's may lie outside of the space."""
    given = list(values)
    if dimension.choices is not None:
        names = tuple(dict.fromkeys(value_text(value) for value in (*dimension.choices, *given)))
        texts = zip(_differences(names), names, strict=True)
        ticks = [Tick((i + 0.5) / len(names), text, name) for i, (text, name) in enumerate(texts)]
        return Axis(ticks=ticks, categories=names)
    inside = [float(v) for v in (dimension.low, dimension.high, *given) if is_on_scale(v, dimension.log)]  # type: ignore[arg-type]
    others = sorted({value_text(value) for value in given if not is_on_scale(value, dimension.log)})
    low, high, start = min(inside), max(inside), RANGE_START if others else 0.0
    axis = Axis(ticks=[], start=start, low=low, high=high, log=dimension.log)
    numbers = log_ticks(low, high) if dimension.log else ticks_within(low, high, dimension.is_int)
    ticks = [Tick(axis.place(number), value_text(number), value_text(number)) for number in numbers]
    if others:
        ticks.insert(0, Tick(OFF_SCALE, ", ".join(others), ", ".join(others)))
    return Axis(ticks=ticks, start=start, low=low, high=high, log=dimension.log)


def _differences(names: Sequence[str]) -> list[str]:
    """Names without the words at their start and end that all of them share, where any is long."""
    if len(names) < 2 or max(map(len, names)) <= LONG_NAME:
        return list(names)
    words = [re.findall(r"[^/._-]+[/._-]*|[/._-]+", name) for name in names]
    first = _num_shared(words)
    rest = [found[first:] for found in words]
    last = _num_shared([found[::-1] for found in rest])
    texts = ["".join(found[: len(found) - last]) for found in rest]
    before, after = "…" if first else "", "…" if last and not first else ""
    return [f"{before}{text.rstrip('/._-') if last else text}{after}" for text in texts]


def _num_shared(words: Sequence[Sequence[str]]) -> int:
    """With how many of the same words all begin."""
    return next((i for i, found in enumerate(zip(*words, strict=False)) if len({*found}) > 1), min(map(len, words)))


def state_of(one: TrialResult) -> str:
    """A trial's state in words."""
    return STATES.get(one.trial.state, one.trial.state)


def told(one: TrialResult) -> str:
    """A trial in a line, for tooltips."""
    reached = percent_text(one.accuracy) if one.epochs else "none"
    told_epochs = f"{len(one.epochs)} of {one.max_epochs} epochs"
    return f"trial {one.trial.number}, {state_of(one)}: {one.trial.title}; val accuracy {reached}, {told_epochs}"


def role(sweep: SweepResult, one: TrialResult) -> str:
    """Class names of a trial's line or mark: its state, and whether it is the best or the experiment as it stands."""
    found: list[str] = [one.trial.state]
    if one.trial.number == 0:
        found.append("baseline")
    if sweep.complete and one.trial.number == sweep.best.trial.number:
        found.append("best")
    return " ".join(found)


def measured(sweep: SweepResult) -> list[TrialResult]:
    """Searched trials with an accuracy, those that matter most last, so that they are drawn on top."""
    found = [one for one in sweep.searched if any(math.isfinite(row["val_accuracy"]) for row in one.epochs)]
    return sorted(found, key=lambda one: ("best" in role(sweep, one), one.trial.number == 0, one.accuracy))


def mark(sweep: SweepResult, one: TrialResult, x: float, y: float) -> Markup:
    """A trial's mark in a scatter: a dot, hollow when it did not get to its end, and a diamond for trial 0."""
    shape = Markup('<circle r="4.5"/>')
    if one.trial.number == 0:
        shape = Markup('<path d="M0-7 7 0 0 7-7 0z"/>')
    elif one.trial.state == "failed":
        shape = CROSS
    return Markup('<g class="trial {}" transform="translate({:.1f} {:.1f})"><title>{}</title>{}{}</g>').format(
        role(sweep, one), x, y, told(one), RING if "best" in role(sweep, one) else "", shape
    )
