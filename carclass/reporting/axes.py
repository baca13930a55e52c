"""Axes, ticks and frames of SVG charts."""

import bisect
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from markupsafe import Markup

from carclass.formatting import Value, percent_text, value_text
from carclass.reporting import svg

OFF_SCALE = 0.0
"""Position of values that are not on the axis' numeric scale, such as null."""
RANGE_START = 0.16  # start of the numeric scale on an axis with such values
LONG_NAME = 16  # characters above which names are shortened to their differences


class Tick(NamedTuple):
    """A labelled position on an axis."""

    place: float
    text: str
    """The value, shortened to its difference from the other ticks."""
    name: str
    """The full value."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting's axis. Positions are from 0, its start, to 1, its end."""

    ticks: list[Tick]
    start: float = 0.0
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[str, ...] = ()
    """All values, if they have no order."""

    def place(self, value: Value) -> float:
        """Return the position of a value."""
        if self.categories:
            return (self.categories.index(value_text(value)) + 0.5) / len(self.categories)
        if not is_on_scale(value, self.log):
            return OFF_SCALE
        assert isinstance(value, int | float)
        low, scaled, high = (math.log(v) if self.log else v for v in (self.low, value, self.high))
        return self.start + (1 - self.start) * (scaled - low) / (high - low)


def is_on_scale(value: Value, log: bool) -> bool:
    """Return True for a finite number, positive on a logarithmic scale."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (value > 0 or not log)


def round_ticks(low: float, high: float) -> list[float]:
    """Return up to seven round ticks, spaced 1, 2 or 5 times a power of ten, that enclose [low, high]."""
    if high - low < 1e-9:
        low, high = low - 0.01, high + 0.01
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= (high - low) * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within [low, high], about evenly spaced in their logarithms."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        numbers = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [number for number in numbers if low * (1 - 1e-9) <= number <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 6)]
    return ticks_within(low, high, whole=False)


def ticks_within(low: float, high: float, whole: bool) -> list[float]:
    """Return the round ticks within [low, high], with `whole` only integers."""
    tolerance = 1e-9 * (high - low)
    ticks = [tick for tick in round_ticks(low, high) if low - tolerance <= tick <= high + tolerance]
    return [tick for tick in ticks if tick == int(tick)] if whole else ticks


def fit_text(name: str, length: int) -> str:
    """Shorten a name to the width of `length` Latin letters by replacing its middle with an ellipsis."""
    if sum(map(_width, name)) <= length:
        return name
    end = (length - 1) // 2
    return f"{_first_characters(name, length - 1 - end)}…{_first_characters(name[::-1], end)[::-1]}"


def _width(character: str) -> int:
    """Return 2 for a character as wide as two Latin letters, such as 日."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _first_characters(name: str, length: int) -> str:
    """Return the first characters of a name that fit the width of `length` Latin letters."""
    return name[: bisect.bisect_right(list(accumulate(map(_width, name))), length)]


def accuracy_ticks(accuracies: Iterable[float]) -> list[float]:
    """Return ticks that enclose accuracies, within [0, 1]."""
    finite = [value for value in accuracies if math.isfinite(value)] or [0.0, 1.0]
    return [tick for tick in round_ticks(min(finite), max(finite)) if -1e-9 <= tick <= 1 + 1e-9]


def accuracy_text(accuracy: float, ticks: Sequence[float]) -> str:
    """Format a tick of val accuracy with as many digits as the tick spacing needs."""
    step = 100 * (ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    return percent_text(accuracy, 0 if abs(step - round(step)) < 1e-6 else 1)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A plotting area with val accuracy on the vertical axis."""

    left: float
    right: float
    top: float
    bottom: float
    ticks: list[float]

    def x(self, place: float) -> float:
        """Convert a horizontal position, 0 (left) to 1 (right), to a coordinate."""
        return self.left + (self.right - self.left) * place

    def y(self, accuracy: float) -> float:
        """Convert a val accuracy to a coordinate."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.bottom - (self.bottom - self.top) * (accuracy - low) / (high - low)

    def grid(self) -> Markup:
        """Draw a horizontal line and a label at each tick."""
        parts = []
        for tick in self.ticks:
            parts.append(svg.line("grid", self.left, self.y(tick), self.right, self.y(tick)))
            parts.append(svg.text("tick end", self.left - 8, self.y(tick) + 4, accuracy_text(tick, self.ticks)))
        return Markup("").join(parts)
