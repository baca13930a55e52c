"""Ledgers of a large cluster: several, each with its own batches."""

import pytest

from carclass.data import crash_guard
from carclass.data.crash_guard import MAX_SINGLE_ATTEMPTS, CrashGuard
from carclass.data.quarantine import PhotoError

pytestmark = pytest.mark.usefixtures("ray_cluster")
BATCHES = [[f"{batch}/{i}.jpg" for i in range(3)] for batch in range(8)]


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> CrashGuard:
    """Return a guard with a ledger for each of the four CPUs."""
    monkeypatch.setattr(crash_guard, "CPUS_PER_LEDGER", 1)
    return CrashGuard()


def attempt(guard: CrashGuard, keys: list[str], finished: bool) -> list[list[int]]:
    """Return the indices that a worker processes at once; it crashes with the first ones unless it finishes."""
    processed: list[list[int]] = []

    def work(indices: list[int]) -> list[int]:
        processed.append(indices)
        return indices

    results = guard.run("read", keys, work)
    if not finished:
        next(results)
        results.close()
    else:
        list(results)
    return processed


def test_batches_are_spread_over_the_ledgers_of_a_large_cluster(guard: CrashGuard):
    assert len(guard.ledgers) == 4


def test_a_repeated_batch_is_recognized_and_others_are_not(guard: CrashGuard):
    for keys in BATCHES[::2]:
        attempt(guard, keys, finished=False)
    whole, singles = [[0, 1, 2]], [[0], [1], [2]]
    for number, keys in enumerate(BATCHES):
        assert attempt(guard, keys, finished=True) == (whole if number % 2 else singles)
        assert attempt(guard, keys, finished=True) == whole


def test_crashes_of_all_ledgers_are_counted(guard: CrashGuard):
    def crash(_: list[int]) -> list[int]:
        raise KeyboardInterrupt

    for keys in BATCHES:
        for _ in range(MAX_SINGLE_ATTEMPTS + 1):  # the first one is that of the whole batch
            with pytest.raises(KeyboardInterrupt):
                list(guard.run("read", keys, crash))
        assert isinstance(next(guard.run("read", keys, crash)), PhotoError)
    assert guard.count_crashes() == MAX_SINGLE_ATTEMPTS * len(BATCHES)
