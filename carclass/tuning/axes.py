"""What the charts of a sweep share: where values lie on an axis, how they are written, and how a trial is marked."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from carclass import svg
from carclass.svg import percent_text
from carclass.tuning.outcome import Outcome, Sweep
from carclass.tuning.space import Dimension, Value, text_of

STATES = {"begun": "not finished"}
"""States that the page calls otherwise than the records."""
ELSEWHERE = 0.0
"""Place of values that a range has no place for."""
FIRST = 0.16  # where a range starts on an axis that has such a value
LONG = 16  # characters from which on names are told by their differences
CROSS = Markup('<path class="cross" d="M-3.5-3.5 3.5 3.5M3.5-3.5-3.5 3.5"/>')
SQUARE = Markup('<rect class="square" x="-4" y="-4" width="8" height="8"/>')
RING = Markup('<circle class="ring" r="9.5"/>')


class Tick(NamedTuple):
    """What is written at a place of an axis."""

    place: float
    text: str
    """What tells the value apart from the others."""
    name: str
    """All of it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting's axis. Places are from 0, its start, to 1, its end."""

    ticks: list[Tick]
    start: float = 0.0
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[str, ...] = ()
    """All that occur, when the values have no order."""

    def place(self, value: Value) -> float:
        """Where a value lies."""
        if self.categories:
            return (self.categories.index(text_of(value)) + 0.5) / len(self.categories)
        if not _fits(value, self.log):
            return ELSEWHERE
        assert isinstance(value, int | float)
        low, here, high = (math.log(v) if self.log else v for v in (self.low, value, self.high))
        return self.start + (1 - self.start) * (here - low) / (high - low)


def axis_of(dimension: Dimension, values: Iterable[Value]) -> Axis:
    """The axis of a setting on which these values have a place too; only trial 0's may lie outside of the space."""
    given = list(values)
    if dimension.choices is not None:
        names = tuple(dict.fromkeys(text_of(value) for value in (*dimension.choices, *given)))
        texts = zip(_differences(names), names, strict=True)
        ticks = [Tick((i + 0.5) / len(names), text, name) for i, (text, name) in enumerate(texts)]
        return Axis(ticks=ticks, categories=names)
    inside = [float(v) for v in (dimension.low, dimension.high, *given) if _fits(v, dimension.log)]  # type: ignore[arg-type]
    others = sorted({text_of(value) for value in given if not _fits(value, dimension.log)})
    low, high, start = min(inside), max(inside), FIRST if others else 0.0
    axis = Axis(ticks=[], start=start, low=low, high=high, log=dimension.log)
    numbers = log_ticks(low, high) if dimension.log else _inside(low, high, dimension.is_int)
    ticks = [Tick(axis.place(number), text_of(number), text_of(number)) for number in numbers]
    if others:
        ticks.insert(0, Tick(ELSEWHERE, ", ".join(others), ", ".join(others)))
    return Axis(ticks=ticks, start=start, low=low, high=high, log=dimension.log)


def _differences(names: Sequence[str]) -> list[str]:
    """Names without the words at their start and end that all of them share, where any is long."""
    if len(names) < 2 or max(map(len, names)) <= LONG:
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


def _fits(value: Value, log: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or not log)


def round_ticks(low: float, high: float) -> list[float]:
    """Up to seven round steps, each 1, 2 or 5 times a power of ten, the first at `low` or below, the last above."""
    if high - low < 1e-9:
        low, high = low - 0.01, high + 0.01
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about as far apart in their logarithms: powers of ten, or some between them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [number for number in found if low * (1 - 1e-9) <= number <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return _inside(low, high, whole=False)


def _inside(low: float, high: float, whole: bool) -> list[float]:
    reach = 1e-9 * (high - low)
    ticks = [tick for tick in round_ticks(low, high) if low - reach <= tick <= high + reach]
    return [tick for tick in ticks if tick == int(tick)] if whole else ticks


def fitted(name: str, length: int) -> str:
    """A name in at most so many characters: of a longer one its start and end, which tell more than its middle."""
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def accuracy_ticks(accuracies: Iterable[float]) -> list[float]:
    """Ticks around accuracies, from 0 to 1 at most."""
    finite = [value for value in accuracies if math.isfinite(value)] or [0.0, 1.0]
    return [tick for tick in round_ticks(min(finite), max(finite)) if -1e-9 <= tick <= 1 + 1e-9]


def accuracy_text(accuracy: float, ticks: Sequence[float]) -> str:
    """A tick of val accuracy, with as many digits as its steps have."""
    step = 100 * (ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    return percent_text(accuracy, 0 if abs(step - round(step)) < 1e-6 else 1)


def unit_of(seconds: float) -> tuple[float, str]:
    """In what such a time is told: seconds of the unit, and its name."""
    return next((one for one in ((3600.0, "hours"), (60.0, "minutes")) if seconds >= one[0]), (1.0, "seconds"))


def time_text(seconds: float, device: str) -> str:
    """Device-seconds in words: '3.4 GPU hours'."""
    size, unit = unit_of(seconds)
    amount = seconds / size
    return f"{amount:.{0 if amount >= 100 else 1}f} {device} {unit}"


def state_of(one: Outcome) -> str:
    """A trial's state in words."""
    return STATES.get(one.trial.state, one.trial.state)


def told(one: Outcome) -> str:
    """A trial in a line, for tooltips."""
    reached = percent_text(one.accuracy) if one.epochs else "none"
    told_epochs = f"{len(one.epochs)} of {one.max_epochs} epochs"
    return f"trial {one.trial.number}, {state_of(one)}: {one.trial.title}; val accuracy {reached}, {told_epochs}"


def role(sweep: Sweep, one: Outcome) -> str:
    """Class names of a trial's line or mark: its state, and whether it is the best or the experiment as it stands."""
    found: list[str] = [one.trial.state]
    if one.trial.number == 0:
        found.append("baseline")
    if sweep.complete and one.trial.number == sweep.best.trial.number:
        found.append("best")
    return " ".join(found)


def measured(sweep: Sweep) -> list[Outcome]:
    """Searched trials with an accuracy, those that matter most last, so that they are drawn on top."""
    found = [one for one in sweep.searched if any(math.isfinite(row["val_accuracy"]) for row in one.epochs)]
    return sorted(found, key=lambda one: ("best" in role(sweep, one), one.trial.number == 0, one.accuracy))


def mark(sweep: Sweep, one: Outcome, x: float, y: float) -> Markup:
    """A trial's mark in a scatter: a dot, hollow when it did not get to its end, and a diamond for trial 0."""
    shape = Markup('<circle r="4.5"/>')
    if one.trial.number == 0:
        shape = Markup('<path d="M0-7 7 0 0 7-7 0z"/>')
    elif one.trial.state == "failed":
        shape = CROSS
    return Markup('<g class="trial {}" transform="translate({:.1f} {:.1f})"><title>{}</title>{}{}</g>').format(
        role(sweep, one), x, y, told(one), RING if "best" in role(sweep, one) else "", shape
    )


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plotting area with val accuracy upwards."""

    left: float
    right: float
    top: float
    bottom: float
    ticks: list[float]

    def x(self, place: float) -> float:
        """Of a place from 0, the left, to 1, the right."""
        return self.left + (self.right - self.left) * place

    def y(self, accuracy: float) -> float:
        """Of a val accuracy."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.bottom - (self.bottom - self.top) * (accuracy - low) / (high - low)

    def grid(self) -> Markup:
        """A line across at each tick."""
        parts = []
        for tick in self.ticks:
            parts.append(svg.line("grid", self.left, self.y(tick), self.right, self.y(tick)))
            parts.append(svg.text("tick end", self.left - 8, self.y(tick) + 4, accuracy_text(tick, self.ticks)))
        return Markup("").join(parts)
