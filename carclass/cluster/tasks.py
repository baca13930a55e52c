"""Ray tasks over a stream of items, with bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from carclass.cluster.connection import T

TASKS_PER_CPU = 2
"""One is at work and one is on its way; a cluster that grows by what waits sees that something does."""


def run_tasks(function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Results of function(item), in no order, each by a task on a CPU of its own.

    Items are taken only as tasks end, so that nothing waits in memory, however many there are. A task whose process or
    node is lost is begun again.
    """
    task: Any = ray.remote(num_cpus=1, max_retries=-1)(_call)
    running: list[ray.ObjectRef] = []
    for item in items:
        if len(running) >= TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0))):
            (done,), running = ray.wait(running)
            yield ray.get(done)
        running.append(task.remote(function, item))
    while running:
        (done,), running = ray.wait(running)
        yield ray.get(done)


def _call(function: Callable[[Any], T], item: Any) -> T:
    return function(item)
