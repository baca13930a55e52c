"""Progress lines, their rate limit, and tables."""

import logging

import pytest

from carclass import progress
from carclass.progress import Progress, Throttle, table


class Clock:
    """Replacement of time.monotonic that tests move on."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    replacement = Clock()
    monkeypatch.setattr(progress, "time", replacement)
    return replacement


def test_a_throttle_is_ready_once_per_interval(clock: Clock):
    throttle = Throttle(5)
    ready = []
    for clock.seconds in (101, 104.9, 105, 106, 112, 113):
        ready.append(throttle.is_ready())
    assert ready == [False, False, True, False, True, False]


def test_an_immediate_throttle_is_ready_at_first(clock: Clock):
    throttle = Throttle(5, immediate=True)
    assert [throttle.is_ready(), throttle.is_ready()] == [True, False]


@pytest.mark.parametrize(
    ("total", "line"),
    [(6_923, "mask: 500 of 6,923 photos, 50/s, 2 min left"), (None, "mask: 500 photos, 50/s")],
)
def test_progress_is_logged_at_most_once_per_interval(
    clock: Clock, caplog: pytest.LogCaptureFixture, total: int | None, line: str
):
    counter = Progress("mask", total=total)
    with caplog.at_level(logging.INFO, logger="carclass"):
        counter.add(100)
        clock.seconds += 10
        counter.add(400)
        counter.add(1)
    assert caplog.messages == [line]
    assert counter.done == 501


def test_progress_of_a_worker_is_written_to_its_own_stream(clock: Clock):
    lines: list[str] = []
    counter = Progress("first features", total=200, interval=1.0, write=lines.append)
    clock.seconds += 2
    counter.add(100)
    assert lines == ["first features: 100 of 200 photos, 50/s, 2 s left"]


def test_a_table_aligns_its_columns():
    assert table([("rows", "5"), ("quarantined", "1")], title="dataset v1").splitlines() == [
        "dataset v1",
        "─" * 23,
        "rows         5",
        "quarantined  1",
    ]
