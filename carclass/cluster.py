"""Joining a Ray cluster, and asking it what it has."""

import logging
import os

import ray

from carclass.errors import UserError

log = logging.getLogger(__name__)


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names (every submitted job has it), else starts one on this machine."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=True, logging_level=logging.WARNING)
    found = ray.cluster_resources()
    log.info("Ray: %d CPUs, %d GPUs, %d nodes", found.get("CPU", 0), found.get("GPU", 0), len(ray.nodes()))


def gpus(wanted: bool | None, count: int, key: str) -> bool:
    """Whether to use GPUs; UserError when they are asked for and the cluster has fewer than count."""
    there = int(ray.cluster_resources().get("GPU", 0))
    if wanted is None:
        return there >= count
    if wanted and there < count:
        raise UserError(
            f"`{key}` asks for {count} GPU(s), the cluster has {there}. "
            f"Add GPU nodes, lower the number of processes, or leave `{key}` out to use CPUs."
        )
    return wanted


def check_cpus(count: float, key: str) -> None:
    """UserError when the cluster has fewer CPUs than a job needs at once: Ray would wait for ever."""
    there = ray.cluster_resources().get("CPU", 0)
    if there < count:
        raise UserError(f"`{key}` needs {count:g} CPUs at once, the cluster has {there:g}. Lower it or add nodes.")
