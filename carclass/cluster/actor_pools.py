"""Actor pools with one actor per GPU, also on nodes that join while a job runs, or one per CPU.

Where a label tells how many nodes the autoscaler may start, all actors that the job deserves exist from its beginning;
those that wait for a GPU are the demand that the autoscaler sees. Elsewhere Ray Data adds an actor as soon as there is
another GPU.
"""

import math
from typing import Any, NamedTuple

import ray.data

from carclass.cluster import resources
from carclass.formatting import count_text

BATCHES_PER_NODE = 128
"""Batches of an actor for which the autoscaler is to start a node: minutes of work, as the start takes minutes."""


class ActorPool(NamedTuple):
    """Size, device and nodes of a pool."""

    smallest: int
    largest: int
    use_gpu: bool
    node_selector: dict[str, str] | None
    task_cpus: float
    """CPUs that a task beside the pool reserves."""

    @property
    def actor_cpus(self) -> float:
        """Return the CPUs that an actor reserves: none beside a GPU, as the tasks that feed it would miss them."""
        return 0 if self.use_gpu else self.task_cpus

    def describe(self, actor: str) -> str:
        """Return the number of actors in words. actor: name of one."""
        growth = f", up to {self.largest:,} as GPUs join" if self.largest > self.smallest else ""
        return count_text(self.smallest, actor) + growth

    def options(self) -> dict[str, Any]:
        """Return the options of map_batches."""
        return {
            "compute": ray.data.ActorPoolStrategy(min_size=self.smallest, max_size=self.largest),
            "num_cpus": self.actor_cpus,
            "num_gpus": 1 if self.use_gpu else 0,
            "label_selector": self.node_selector,
        }

    def configure(self, stream: ray.data.Dataset) -> ray.data.Dataset:
        """Return the stream, set up for the pool.

        Its tasks run on the pool's kind of node too: Ray Data asks the autoscaler for nodes, and without a label it
        would get the largest GPU nodes, which are for training.
        """
        context = stream.context
        context.execution_options.label_selector = self.node_selector
        # An actor without work for a moment is kept: to load its network takes longer.
        context.autoscaling_config.actor_pool_util_downscaling_threshold = 0
        return stream


def plan_pool(requested: int | None, num_batches: int, work: str, *, use_gpu: bool, task_cpus: float) -> ActorPool:
    """Return the pool for a number of batches. requested: number of actors; None: chosen; work: kind of GPU node."""
    selector = resources.node_selector(work) if use_gpu else None
    available = max(1, resources.count_slots("GPU" if use_gpu else "CPU", 1, selector))
    smallest = largest = requested or max(1, min(available, num_batches))
    if use_gpu and requested is None:
        deserved = math.ceil(num_batches / BATCHES_PER_NODE) if selector else num_batches
        if (possible := resources.count_possible_gpus(work)) is not None:
            smallest = max(smallest, min(possible, deserved))
        largest = smallest if possible is not None else max(smallest, deserved)
    return ActorPool(smallest, largest, use_gpu, selector, task_cpus)


def check_cpus(key: str, *pools: ActorPool) -> None:
    """Raise UserError if the cluster has too few CPUs for a stream through pools, see resources.check_cpus.

    They are one for Ray's own repartitioning, and those of the actors and of one more task.
    """
    (task_cpus,) = {pool.task_cpus for pool in pools}
    count = 1 + task_cpus + sum(pool.smallest * pool.actor_cpus for pool in pools)
    resources.check_cpus(count, key, pools[0].node_selector)
