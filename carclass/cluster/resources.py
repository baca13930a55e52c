"""Resources of a cluster: GPUs, CPUs and memory by kind of node, and waiting for nodes of the autoscaler."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from carclass.cluster import autoscaler
from carclass.errors import UserError
from carclass.formatting import duration_text
from carclass.progress import Throttle

log = logging.getLogger(__name__)
T = TypeVar("T")
WORK_LABEL = "carclass-work"
"""Node label with the kind of work (cluster/aws.yaml, kuberay.yaml); local clusters have none."""
MAX_NODES_LABEL = "carclass-max-nodes"
"""Node label with the largest number of nodes of its kind."""
MASK, TRAIN = "mask", "train"
GPU_WAIT_S = 60.0
"""Seconds to wait for a free GPU and a short task on it."""
MAX_WAIT_S, REPORT_EVERY_S = 1800.0, 30.0
"""Seconds to wait for nodes of the autoscaler, and between log lines meanwhile."""


def node_ids() -> set[str]:
    """Return the ids of the live nodes."""
    return {node["NodeID"] for node in _live_nodes()}


def node_selector(work: str | None) -> dict[str, str] | None:
    """Return Ray's `label_selector` for nodes of a kind of work, None on clusters without labels."""
    return {WORK_LABEL: work} if work is not None and is_labelled() else None


def is_labelled() -> bool:
    """Return True if nodes carry work labels: the cluster then has an autoscaler."""
    return any(WORK_LABEL in node["Labels"] for node in _live_nodes())


def decide_gpus(requested: bool | None, count: int, key: str, work: str | None, *, all_at_once: bool = True) -> bool:
    """Return True if a job is to use `count` GPUs. requested: the setting `key`; None: if available.

    On labelled nodes, GPUs are used unless requested is False, and waited for: all of them, or the first. work: kind of
    their nodes, None for any. Raise UserError if GPUs are requested and the cluster has fewer, or if PyTorch cannot use
    one, which would otherwise be a traceback of every process.
    """
    use_gpu = _decide_gpus(requested, count, key, work, all_at_once=all_at_once)
    if use_gpu:
        _gpu_bytes(work)
    return use_gpu


def _decide_gpus(requested: bool | None, count: int, key: str, work: str | None, *, all_at_once: bool) -> bool:
    """Return the result of decide_gpus, without using a GPU."""
    if is_labelled():
        if requested is not False:
            _wait_for({"GPU": 1}, count if all_at_once else 1, node_selector(work) or {}, key)
        return requested is not False
    available = int(_total("GPU"))
    if requested is None:
        if 0 < available < count:
            message = "`%s`: %d GPU(s) for %d processes, so CPUs are used; start %d processes to use the GPU(s)"
            log.warning(message, key, available, count, available)
        return available >= count
    if requested and available < count:
        raise UserError(
            f"`{key}` asks for {count} GPU(s), the cluster has {available}. "
            f"Add GPU nodes, lower the number of processes, or omit `{key}` to use CPUs."
        )
    return requested


def check_cpus(count: float, key: str, label: dict[str, str] | None = None) -> None:
    """Raise UserError if the cluster has fewer CPUs than a job needs at once: Ray would wait forever.

    On labelled nodes, wait for them. label: of the nodes that count, by default all.
    """
    available = sum(resources.get("CPU", 0) for resources in _resources(label))
    if available >= count:
        return
    if is_labelled():
        _wait_for({"CPU": 1}, math.ceil(count), label or {}, key)
    else:
        raise UserError(f"`{key}` needs {count:g} CPUs at once, the cluster has {available:g}. Lower it or add nodes.")


def await_cpus(key: str) -> None:
    """Wait until labelled nodes have a CPU, as after the loss of all of them; tasks that are pending request it.

    Raise UserError after MAX_WAIT_S.
    """

    def has_cpu() -> bool:
        time.sleep(1)
        return _total("CPU") >= 1

    if _total("CPU") < 1 and is_labelled():
        _report_until(has_cpu, "1 CPU(s)", key)


def cpus_per_worker(count: int) -> int:
    """Return the CPUs per process if `count` run at once, none spanning two nodes; at least 1."""
    nodes = [int(resources.get("CPU", 0)) for resources in _resources()]
    return next((cpus for cpus in range(max(nodes), 1, -1) if sum(size // cpus for size in nodes) >= count), 1)


def count_slots(resource: str, each: float, label: dict[str, str] | None = None) -> int:
    """Count the processes with `each` of a resource (`CPU`, `GPU`) that fit at once, none spanning two nodes.

    label: of the nodes to count, by default all.
    """
    return sum(int(resources.get(resource, 0) / each + 1e-9) for resources in _resources(label))


def count_possible_gpus(work: str) -> int | None:
    """Count the GPUs of a kind of work when Ray's autoscaler has started all nodes that it may; None if unknown.

    Ray does not tell; a node's label does, once there is one.
    """
    nodes = [node for node in _live_nodes() if node["Labels"].get(WORK_LABEL) == work]
    known = [node for node in nodes if node["Labels"].get(MAX_NODES_LABEL, "").isdigit()]
    counts = [int(node["Labels"][MAX_NODES_LABEL]) * int(node["Resources"].get("GPU", 0)) for node in known]
    return max(counts, default=0) or None


def object_store_bytes() -> int:
    """Return the size of the largest node's object store in bytes."""
    return int(max(resources.get("object_store_memory", 0) for resources in _resources()))


def memory_bytes(use_gpu: bool) -> int | None:
    """Return the bytes of one GPU, or of all nodes together; None if no GPU becomes free within a minute."""
    if not use_gpu:
        return int(_total("memory"))
    return _gpu_bytes(TRAIN)


def _gpu_bytes(work: str | None) -> int | None:
    """Return the bytes of a GPU of a kind of node; None if none becomes free within a minute."""
    key = ray.get_runtime_context().gcs_address, work
    if key not in _known_gpu_bytes and (size := run_on_gpu(_measure_gpu_bytes, work=work)) is not None:
        _known_gpu_bytes[key] = size
    return _known_gpu_bytes.get(key)


_known_gpu_bytes: dict[tuple[str, str | None], int] = {}
"""Memory of a GPU by cluster and kind of node, cached: runs that share GPUs leave none free for a query."""


def run_on_gpu(function: Callable[..., T], *args: Any, work: str | None = TRAIN) -> T | None:
    """Return the result of a function in a process with a free GPU; None if it has not ended within GPU_WAIT_S.

    work: kind of its node.
    """
    task = ray.remote(num_gpus=1, num_cpus=0, label_selector=node_selector(work) or {})(function).remote(*args)
    ready, _ = ray.wait([task], timeout=GPU_WAIT_S)
    if not ready:
        ray.cancel(task)
        return None
    result: T = ray.get(task)
    return result


def _measure_gpu_bytes() -> int:
    """Return the memory of this process' GPU."""
    import torch  # only this process needs it

    from carclass.cluster.device import choose_device

    return int(torch.cuda.get_device_properties(choose_device(True)).total_memory)


def _total(resource: str) -> float:
    """Return the sum of a resource over the live nodes."""
    return sum(resources.get(resource, 0) for resources in _resources())


def _resources(label: dict[str, str] | None = None) -> list[dict[str, float]]:
    """Return the resources of each live node, all or those with a label."""
    return [node["Resources"] for node in _live_nodes() if (label or {}).items() <= node["Labels"].items()]


def _live_nodes() -> list[dict[str, Any]]:
    """Return the live nodes from ray.nodes()."""
    return [node for node in ray.nodes() if node["Alive"]]


def _wait_for(bundle: dict[str, float], count: int, label: dict[str, str], key: str) -> None:
    """Wait until `count` of a resource are free at once; the pending placement group triggers Ray's autoscaler.

    Raise UserError after MAX_WAIT_S.
    """
    (resource,) = bundle
    group = placement_group([bundle] * count, bundle_label_selector=[label] * count)
    where = f" on nodes labelled {WORK_LABEL}={label[WORK_LABEL]}" if label else ""
    try:
        _report_until(lambda: bool(group.wait(timeout_seconds=1)), f"{count} {resource}(s){where}", key)
    finally:
        remove_placement_group(group)


def _report_until(are_there: Callable[[], bool], needed: str, key: str) -> None:
    """Wait for resources, and report why they are missing. Raise UserError after MAX_WAIT_S.

    are_there: waits for a second at most, and returns True if they are there.
    """
    started, throttle = time.monotonic(), Throttle(REPORT_EVERY_S, immediate=True)
    while not are_there():
        waited = time.monotonic() - started
        if waited > MAX_WAIT_S:
            reason = autoscaler.failed_launch() or "the node type's max_workers or the zone's capacity is too low"
            raise UserError(
                f"`{key}` needs {needed}; they did not start within {duration_text(MAX_WAIT_S)}. "
                f"See `ray status` and docs/cluster.md, Failures: {reason}."
            )
        if throttle.is_ready():
            cause = f"; {failure}" if (failure := autoscaler.failed_launch()) else ""
            log.info("waiting for %s, %s so far%s", needed, duration_text(waited), cause)
