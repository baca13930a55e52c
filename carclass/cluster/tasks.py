"""Ray tasks over a stream of items, with bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

T = TypeVar("T")
TASKS_PER_CPU = 2
"""One runs, one is queued: the autoscaler sees pending demand."""


def run_tasks(function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Yield function(item) for each item, unordered, each computed by a task on one CPU.

    Items are consumed only as tasks finish (backpressure). A task whose process or node is lost is retried.
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
