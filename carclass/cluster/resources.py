"""What a cluster has, and which of its machines do which work: those that aren't there yet are waited for."""

import logging
import math
import time
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from carclass.errors import UserError
from carclass.formatting import duration_text

log = logging.getLogger(__name__)
WORK_LABEL = "carclass-work"
"""Label of a node (cluster/aws.yaml, kuberay.yaml): what it is there for. A laptop's have none."""
MASK, TRAIN = "mask", "train"
MAX_WAIT_S, REPORT_EVERY_S = 1800.0, 30.0
"""Seconds until nodes that the autoscaler was asked for are given up, and between lines that say so."""


def node_ids() -> set[str]:
    """The machines that are there, by their ids."""
    return {node["NodeID"] for node in _alive()}


def node_selector(work: str | None) -> dict[str, str] | None:
    """The label that nodes for some work have, for Ray's `label_selector`; None where nodes have no labels."""
    return {WORK_LABEL: work} if work is not None and is_labelled() else None


def is_labelled() -> bool:
    """Whether nodes say what they are for: then it is a cluster that an autoscaler makes as large as need be."""
    return any(WORK_LABEL in node["Labels"] for node in _alive())


def decide_gpus(wanted: bool | None, count: int, key: str, work: str | None, *, together: bool = True) -> bool:
    """Whether to use GPUs; UserError when they are asked for and the cluster has fewer than count.

    Where nodes are labelled, GPUs are used unless wanted is False, and waited for: all at once, or the first. work:
    what their nodes are for; None: any.
    """
    if is_labelled():
        if wanted is not False:
            _wait_for({"GPU": 1}, count if together else 1, node_selector(work) or {}, key)
        return wanted is not False
    there = int(_total("GPU"))
    if wanted is None:
        if 0 < there < count:
            log.warning(
                "`%s`: %d GPU(s) for %d processes: none is used; start %d to use them", key, there, count, there
            )
        return there >= count
    if wanted and there < count:
        raise UserError(
            f"`{key}` asks for {count} GPU(s), the cluster has {there}. "
            f"Add GPU nodes, lower the number of processes, or leave `{key}` out to use CPUs."
        )
    return wanted


def check_cpus(count: float, key: str) -> None:
    """UserError when the cluster has fewer CPUs than a job needs at once: Ray would wait for ever.

    Where nodes are labelled, they are waited for.
    """
    there = _total("CPU")
    if there >= count:
        return
    if is_labelled():
        _wait_for({"CPU": 1}, math.ceil(count), {}, key)
    else:
        raise UserError(f"`{key}` needs {count:g} CPUs at once, the cluster has {there:g}. Lower it or add nodes.")


def cpus_per_worker(count: int) -> int:
    """CPUs that each of `count` processes can have when all run at once, none spanning two nodes; at least 1."""
    nodes = [int(resources.get("CPU", 0)) for resources in _nodes()]
    return next((cpus for cpus in range(max(nodes), 1, -1) if sum(there // cpus for there in nodes) >= count), 1)


def count_slots(resource: str, each: float, label: dict[str, str] | None = None) -> int:
    """How many processes with so much of a resource (`CPU`, `GPU`) fit at once, none spanning two nodes.

    label: of the nodes that count, by default all.
    """
    there = [node["Resources"] for node in _alive() if (label or {}).items() <= node["Labels"].items()]
    return sum(int(resources.get(resource, 0) / each + 1e-9) for resources in there)


def object_store_bytes() -> int:
    """Bytes that the largest node has for objects."""
    return int(max(resources.get("object_store_memory", 0) for resources in _nodes()))


def memory_bytes(use_gpu: bool) -> int | None:
    """Bytes of one GPU, or of all nodes together; None where every GPU stays taken for a minute."""
    if not use_gpu:
        return int(_total("memory"))
    address = ray.get_runtime_context().gcs_address
    if address not in _known_gpus and (found := _ask_gpu()) is not None:
        _known_gpus[address] = found
    return _known_gpus.get(address)


_known_gpus: dict[str, int] = {}
"""Memory of a GPU by cluster: runs that share GPUs leave none free to ask."""


def _ask_gpu() -> int | None:
    asked = ray.remote(num_gpus=1, num_cpus=0, label_selector=node_selector(TRAIN) or {})(_gpu_memory).remote()
    ready, _ = ray.wait([asked], timeout=60)
    if not ready:
        ray.cancel(asked)
        return None
    return int(ray.get(asked))


def _gpu_memory() -> int:
    import torch  # here: only this one process needs it

    return int(torch.cuda.get_device_properties(0).total_memory)


def _total(resource: str) -> float:
    return sum(resources.get(resource, 0) for resources in _nodes())


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in _alive()]


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _wait_for(bundle: dict[str, float], count: int, label: dict[str, str], key: str) -> None:
    """Waits until so many of a resource are free at once; what waits is what Ray's autoscaler starts nodes for."""
    (resource,) = bundle
    group = placement_group([bundle] * count, bundle_label_selector=[label] * count)
    started = said = time.monotonic()
    where = f" on nodes labelled {WORK_LABEL}={label[WORK_LABEL]}" if label else ""
    try:
        while not group.wait(timeout_seconds=1):
            waited = time.monotonic() - started
            if waited > MAX_WAIT_S:
                raise UserError(
                    f"`{key}` needs {count} {resource}(s){where}; they didn't come in {duration_text(MAX_WAIT_S)}. See "
                    "`ray status`: a type's max_workers, the account's quota or the zone's capacity may be too low."
                )
            if time.monotonic() - said > REPORT_EVERY_S or said == started:
                said = time.monotonic()
                log.info("waiting for %d %s(s)%s, %s so far", count, resource, where, duration_text(waited))
    finally:
        remove_placement_group(group)
