"""What a person sees of long work: a line every few seconds, and a table at the end."""

import logging
import sys
import time
from collections.abc import Sequence

from carclass.formatting import duration_text

log = logging.getLogger(__name__)


class Tally:
    """Counts things done, of which nobody knows the number, and says so at most every few seconds.

    As `list: 1,200,000 keys, 8,500/s`.
    """

    def __init__(self, job: str, noun: str, *, every: float = 5.0) -> None:
        self.job, self.noun, self.every = job, noun, every
        self.done = 0
        self.started = self.said = time.monotonic()

    def add(self, count: int) -> None:
        """Counts more of them."""
        self.done += count
        now = time.monotonic()
        if now - self.said >= self.every:
            self.said = now
            log.info("%s: %s", self.job, self.line(self.done / (now - self.started)))

    def line(self, rate: float) -> str:
        """What is said. rate: per second."""
        return f"{self.done:,} {self.noun}, {rate:,.0f}/s"


class Progress(Tally):
    """Counts things done of a known number: `mask: 512 of 6,923 photos, 31/s, 3 min left`."""

    def __init__(self, job: str, total: int, noun: str = "photos", *, every: float = 5.0) -> None:
        super().__init__(job, noun, every=every)
        self.total = total

    def line(self, rate: float) -> str:
        """What is said. rate: per second."""
        left = duration_text((self.total - self.done) / rate if rate else 0.0)
        return f"{self.done:,} of {self.total:,} {self.noun}, {rate:.3g}/s, {left} left"


def say(line: str) -> None:
    """A line from a training process; Ray Train would show what is printed there twice."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def table(rows: Sequence[tuple[str, str]], *, title: str) -> str:
    """Two columns under a title, aligned, as text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "─" * max(len(title), width + 12), *(f"{name:<{width}}  {value}" for name, value in rows)])
