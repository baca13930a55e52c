"""Axes, ticks and frames of SVG charts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from carclass.formatting import Value, percent_text, value_text
from carclass.reporting import svg

OFF_SCALE = 0.0
"""Place of values that a range has no place for."""
RANGE_START = 0.16  # where a range starts on an axis that has such a value
LONG_NAME = 16  # characters from which on names are told by their differences


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
            return (self.categories.index(value_text(value)) + 0.5) / len(self.categories)
        if not is_on_scale(value, self.log):
            return OFF_SCALE
        assert isinstance(value, int | float)
        low, here, high = (math.log(v) if self.log else v for v in (self.low, value, self.high))
        return self.start + (1 - self.start) * (here - low) / (high - low)


def is_on_scale(value: Value, log: bool) -> bool:
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
    return ticks_within(low, high, whole=False)


def ticks_within(low: float, high: float, whole: bool) -> list[float]:
    reach = 1e-9 * (high - low)
    ticks = [tick for tick in round_ticks(low, high) if low - reach <= tick <= high + reach]
    return [tick for tick in ticks if tick == int(tick)] if whole else ticks


def fit_text(name: str, length: int) -> str:
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
