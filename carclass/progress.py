"""Progress lines of long work, and tables of results."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from carclass.formatting import duration_text

log = logging.getLogger(__name__)
CLOCK = "%H:%M:%S"
"""Format of the time that begins each line."""


class HeldLines(logging.Handler):
    """Log lines of an attempt, to be written if it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.records.append(record)

    def write(self) -> None:
        """Write the lines to the log."""
        for record in self.records:
            logging.getLogger(record.name).handle(record)


@contextmanager
def hold_lines(logger: str) -> Iterator[HeldLines]:
    """Keep the lines of a logger, and of those below it, out of the log."""
    source, held = logging.getLogger(logger), HeldLines()
    before = source.handlers, source.propagate
    source.handlers, source.propagate = [held], False
    try:
        yield held
    finally:
        source.handlers, source.propagate = before


class Throttle:
    """Limit of repeated work, such as log lines, to once per interval.

    interval: seconds. immediate: ready at once instead of after the first interval.
    """

    def __init__(self, interval: float, *, immediate: bool = False) -> None:
        self.interval = interval
        self.last = -float("inf") if immediate else time.monotonic()

    def is_ready(self) -> bool:
        """Return True and start the next interval if the current one is over."""
        now = time.monotonic()
        if now - self.last < self.interval:
            return False
        self.last = now
        return True


class Progress:
    """Counter of finished items that writes a line at most every few seconds, by default to the log.

    `mask: 512 of 6,923 photos, 31/s, 3 min left`, or without a total: `list: 1,200,000 keys, 8,500/s`.
    """

    def __init__(
        self,
        job: str,
        noun: str = "photos",
        total: int | None = None,
        *,
        interval: float = 5.0,
        write: Callable[[str], None] = log.info,
    ) -> None:
        self.job, self.noun, self.total, self.write = job, noun, total, write
        self.done, self.started, self.throttle = 0, time.monotonic(), Throttle(interval)

    def add(self, count: int) -> None:
        """Count finished items."""
        self.done += count
        if self.throttle.is_ready():
            self.write(f"{self.job}: {self.line(self.done / (time.monotonic() - self.started))}")

    def line(self, rate: float) -> str:
        """Return the progress as text. rate: items per second."""
        if self.total is None:
            return f"{self.done:,} {self.noun}, {rate:,.0f}/s"
        left = duration_text((self.total - self.done) / rate if rate else 0.0)
        return f"{self.done:,} of {self.total:,} {self.noun}, {rate:.3g}/s, {left} left"


def print_line(line: str) -> None:
    """Write a line with the time to stdout from a training worker; Ray Train would show output of `print` twice."""
    sys.stdout.write(f"{time.strftime(CLOCK)} {line}\n")
    sys.stdout.flush()


def table(rows: Sequence[tuple[str, str]], *, title: str) -> str:
    """Return two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "─" * max(len(title), width + 12), *(f"{name:<{width}}  {value}" for name, value in rows)])
