"""Ray tasks over a stream of items, with bounded memory, repeated after the loss of their process or node."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from carclass.cluster import resources
from carclass.errors import UserError

log = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")
TASKS_PER_CPU = 2
"""One runs, one is queued: the autoscaler sees pending demand."""
COUNT_EVERY_S = 1.0
"""Seconds between counts of the CPUs, which take 18 ms on 1,000 nodes."""
WINDOW, WINDOW_S = 1000, 0.05
"""Tasks that are waited for at a time, and seconds until the next ones are: a wait for 32,000 takes 13 ms."""
CHECK_EVERY_S = 5.0
"""Seconds without a result after which a check for the loss of all nodes follows: their tasks wait in silence."""
MAX_CRASHES = 5
"""Crashes of a task in a row, without progress in between, that stop the job."""


def run_tasks(
    function: Callable[[S], T], items: Iterable[S], count_progress: Callable[[], int] = lambda: 0
) -> Iterator[T]:
    """Yield function(item) for each item, unordered, each computed by a task on one CPU.

    Items are consumed only as tasks finish (backpressure). A task is repeated without limit if its node is lost, and up
    to MAX_CRASHES times in a row if its process crashes. count_progress: a number that changes when a crash brings the
    task forward, as with photos that are quarantined for crashes. Raise UserError for a task that crashes in vain.
    """
    pool = _TaskPool(function, count_progress)
    for item in items:
        if not pool.is_busy():
            resources.check_cpus(1, "a task")  # which tells the user that nodes are waited for
        while not pool.has_room():
            yield from pool.wait()
        pool.submit(_Attempt(item))
    while pool.is_busy():
        yield from pool.wait()


@dataclass
class _Attempt(Generic[S]):
    item: S
    crashes: int = 0  # in a row without progress
    progress: int = 0  # at the last crash


class _TaskPool(Generic[S, T]):
    """Running tasks, and those that wait to run alone because they were killed for lack of memory."""

    def __init__(self, function: Callable[[S], T], count_progress: Callable[[], int]) -> None:
        self.function, self.count_progress = function, count_progress
        self.task: Any = ray.remote(num_cpus=1, max_retries=0)(_call)
        self.running: dict[ray.ObjectRef, _Attempt[S]] = {}
        self.postponed: list[_Attempt[S]] = []
        self.room, self.counted = 0, -COUNT_EVERY_S
        self.heard = time.monotonic()  # of a result, or of the nodes

    def has_room(self) -> bool:
        """Return True if another task may be submitted."""
        if (now := time.monotonic()) >= self.counted + COUNT_EVERY_S:
            self.room, self.counted = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0))), now
        return len(self.running) < self.room

    def is_busy(self) -> bool:
        """Return True if a task is unfinished."""
        return bool(self.running or self.postponed)

    def submit(self, attempt: _Attempt[S]) -> None:
        """Start a task."""
        self.running[self.task.remote(self.function, attempt.item)] = attempt

    def wait(self) -> Iterator[T]:
        """Wait for tasks, and yield the results of those that do not have to be repeated."""
        if not self.running:
            self.submit(self.postponed.pop())
        window = list(islice(self.running, WINDOW))
        is_all = len(window) == len(self.running)
        done, waiting = ray.wait(window, num_returns=len(window), timeout=0)
        if not done:
            done, waiting = ray.wait(window, timeout=CHECK_EVERY_S if is_all else WINDOW_S)
        for task in () if is_all else waiting:
            self.running[task] = self.running.pop(task)  # the next call looks at the next ones
        if not done and time.monotonic() - self.heard >= CHECK_EVERY_S:
            resources.await_cpus("a task")
            self.heard = time.monotonic()
        if done:
            self.heard = time.monotonic()
        for task in done:
            yield from self._take(task)

    def _take(self, done: ray.ObjectRef) -> Iterator[T]:
        """Yield the result of a finished task unless it has to be repeated."""
        attempt = self.running.pop(done)
        try:
            result: T = ray.get(done)
        except NodeDiedError:
            self.submit(attempt)
        except OutOfMemoryError as error:
            if self.running:  # other tasks may have taken the memory
                log.warning("a task was killed for lack of memory; it is repeated alone when the others are finished")
                self.postponed.append(attempt)
            else:
                self._repeat(attempt, error)
        except (WorkerCrashedError, ObjectLostError) as error:
            self._repeat(attempt, error)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # without the task's traceback
                raise error.cause from None
            raise
        else:
            yield result

    def _repeat(self, attempt: _Attempt[S], error: Exception) -> None:
        """Repeat a crashed task. Raise UserError if it crashes again and again without progress."""
        progress = self.count_progress()
        crashes = 1 if progress != attempt.progress else attempt.crashes + 1
        if crashes == MAX_CRASHES:
            raise UserError(
                f"a task crashed {crashes} times in a row without progress ({str(error).splitlines()[0]}). The usual "
                "cause is too little memory: use nodes with more memory per CPU, or run fewer jobs at once. Then run "
                "the same command again; it keeps what is finished."
            ) from error
        self.submit(_Attempt(attempt.item, crashes, progress))


def _call(function: Callable[[S], T], item: S) -> T:
    return function(item)
