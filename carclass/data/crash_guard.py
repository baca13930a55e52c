"""A photo that ends the process it is worked on in: found, tried a bounded number of times, and set aside.

A process that ends takes its batch along, and Ray gives the batch to another process, for ever. So every batch is
entered in a ledger before it is begun and struck out when it has ended. A batch found in the ledger ended a process
before: its photos are then worked on one by one, and one that ended NUM_ALONE processes alone is not tried again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from carclass.data.photo import PhotoError, Reason

MAX_SINGLE_ATTEMPTS = 2
"""With the attempt in its batch, a photo gets three. Ray repeats a task three times, so they must not be more."""


T = TypeVar("T")


class AttemptLedger:
    """What has been begun and hasn't ended. It remembers open work only, so it stays small."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.alone: Counter[str] = Counter()

    def begin(self, names: Sequence[str]) -> bool:
        """Enters a batch; whether any of it was entered before and never ended."""
        suspect = not self.open.isdisjoint(names)
        self.open.update(names)
        return suspect

    def begin_alone(self, name: str) -> int:
        """Enters one photo; how often it was begun alone before."""
        self.alone[name] += 1
        return self.alone[name] - 1

    def end(self, names: Sequence[str]) -> None:
        """Strikes out what has ended."""
        self.open.difference_update(names)
        for name in names:
            del self.alone[name]


class CrashGuard:
    """A ledger of one job, shared by all its processes. If its node is lost, the counts begin anew."""

    def __init__(self) -> None:
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(AttemptLedger)
        self.ledger: Any = actor.remote()

    def run(self, stage: str, keys: Sequence[str], work: Callable[[list[int]], list[T]]) -> list[T | PhotoError]:
        """Results of a batch, in the order of its keys; a PhotoError for a photo that isn't tried again.

        stage: what is done, so that other work on the same photos is told apart; work: indices into keys → results.
        """
        names = [f"{stage} {key}" for key in keys]
        results: list[T | PhotoError] = []
        if not ray.get(self.ledger.begin.remote(names)):
            results += work(list(range(len(keys))))
        else:
            for i, name in enumerate(names):
                earlier = ray.get(self.ledger.begin_alone.remote(name))
                if earlier < MAX_SINGLE_ATTEMPTS:
                    results += work([i])
                    self.ledger.end.remote([name])
                else:  # its count stays until all have ended: a later photo may end this process too
                    results.append(_crashed(stage))
        self.ledger.end.remote(names)
        return results


def _crashed(stage: str) -> PhotoError:
    attempts = MAX_SINGLE_ATTEMPTS + 1
    return PhotoError(Reason.CRASHED, f"{attempts} processes ended in the attempt to {stage} it", attempts)
