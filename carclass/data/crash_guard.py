"""Quarantine of photos that crash the worker that processes them, as by a segmentation fault or for lack of memory.

The batch of a crashed worker is repeated. Therefore every batch is recorded in a ledger while it is
processed. A batch that is in the ledger already has crashed a worker, so its photos are retried one by one; after
MAX_SINGLE_ATTEMPTS crashes of its own, a photo gets a PhotoError instead of another attempt.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from carclass.data.quarantine import PhotoError, Reason
from carclass.errors import UserError

MAX_SINGLE_ATTEMPTS = 2
"""With the attempt in its batch, a photo gets three; more would exceed the three retries of a Ray task."""
CPUS_PER_LEDGER = 128
"""CPUs of a cluster whose workers share a ledger: each makes one to five calls per second."""

T = TypeVar("T")


class AttemptLedger:
    """Unfinished attempts of a job, and the photos that are given up. Finished attempts are removed to save memory."""

    def __init__(self) -> None:
        self.unfinished: set[str] = set()
        self.single_attempts: Counter[str] = Counter()
        self.crashes = 0

    def begin_batch(self, names: Sequence[str]) -> bool:
        """Record a batch, and return True if an earlier attempt on any of it did not finish."""
        crashed_before = not self.unfinished.isdisjoint(names)
        self.unfinished.update(names)
        return crashed_before

    def begin_single(self, name: str) -> int:
        """Record an attempt on a single photo, and return the number of earlier ones."""
        self.crashes += 0 < self.single_attempts[name] <= MAX_SINGLE_ATTEMPTS
        self.single_attempts[name] += 1
        return self.single_attempts[name] - 1

    def end(self, names: Sequence[str]) -> None:
        """Remove finished attempts.

        Photos that are given up stay recorded: a batch that finished just before its worker crashed may be repeated.
        """
        finished = [name for name in names if self.single_attempts[name] <= MAX_SINGLE_ATTEMPTS]
        self.unfinished.difference_update(finished)
        for name in finished:
            del self.single_attempts[name]

    def count_crashes(self) -> int:
        """Return the number of crashes in attempts on a single photo."""
        return self.crashes


class CrashGuard:
    """Ledgers of one job, shared by its workers through Ray actors; one starts empty if the actor's node is lost.

    A ledger answers a thousand calls per second, so that large clusters have several. A batch and its photos always use
    the same one: that of its first photo, as a repeated batch has the same photos.
    """

    def __init__(self) -> None:
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        actor = ray.remote(scheduling_strategy="SPREAD", **options)(AttemptLedger)
        number = math.ceil(ray.cluster_resources().get("CPU", 0) / CPUS_PER_LEDGER)
        self.ledgers: list[Any] = [actor.remote() for _ in range(max(1, number))]

    def run(
        self, stage: str, keys: Sequence[str], work: Callable[[list[int]], Iterable[T]]
    ) -> Iterator[T | PhotoError]:
        """Process a batch, and yield one result per key: a PhotoError for photos that are not tried again.

        stage: an infinitive, such as "decode", that separates attempts on the same photos; work: indices into keys →
        results, which may be computed one by one as they are consumed.
        """
        if not keys:
            return
        names = [f"{stage} {key}" for key in keys]
        ledger = self.ledgers[zlib.crc32(names[0].encode()) % len(self.ledgers)]
        if not ray.get(ledger.begin_batch.remote(names)):
            yield from work(list(range(len(keys))))
        else:
            for i, name in enumerate(names):
                if ray.get(ledger.begin_single.remote(name)) < MAX_SINGLE_ATTEMPTS:
                    results = list(work([i]))
                    ledger.end.remote([name])
                    yield from results
                else:  # keep its count until the batch has ended: a later photo may crash this worker too
                    yield _crash_error(stage)
        ledger.end.remote(names)

    def run_strictly(self, stage: str, keys: Sequence[str], work: Callable[[list[int]], Iterable[T]]) -> list[T]:
        """Process a batch as `run` does. Raise UserError for a photo that is not tried again and cannot be left out."""
        results = []
        for key, result in zip(keys, self.run(stage, keys, work), strict=True):
            if isinstance(result, PhotoError):
                raise UserError(
                    f"the photo {key} cannot be used: {result.detail}. If memory was short, use nodes with more of it "
                    "per CPU, or a smaller batch. Otherwise remove the photo from its source, and publish the dataset "
                    "again by the option --update of jobs/ingest.py and jobs/mask.py."
                )
            results.append(result)
        return results

    def count_crashes(self) -> int:
        """Return the number of crashes in attempts on a single photo, each of which brings its batch forward."""
        return sum(ray.get([ledger.count_crashes.remote() for ledger in self.ledgers]))


class NoCrashGuard(CrashGuard):
    """The interface of a crash guard for work in the job's own process, whose crash ends the job."""

    def __init__(self) -> None:
        pass

    def run(
        self, stage: str, keys: Sequence[str], work: Callable[[list[int]], Iterable[T]]
    ) -> Iterator[T | PhotoError]:
        """Process a batch."""
        yield from work(list(range(len(keys))))


def _crash_error(stage: str) -> PhotoError:
    attempts = MAX_SINGLE_ATTEMPTS + 1
    return PhotoError(Reason.CRASHED, f"{attempts} processes crashed in the attempt to {stage} it", attempts)
