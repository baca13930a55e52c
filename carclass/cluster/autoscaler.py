"""The autoscaler of a cluster on AWS as its head tells: its largest size, nodes that start, launches that failed.

Jobs' drivers run on the head. Elsewhere, as on Kubernetes, nothing of it is known.
"""

import json
import re
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ray
from ray._private.worker import global_worker

CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Copy of build/aws.yaml, in JSON, that `ray up` makes on the head; it has the resources of the instance types too."""
FAILED_LAUNCH = re.compile(
    r"^(\S+ \S+),\d+\t.* -- (Failed to launch \d+ nodes of type .+|Ray installation failed on instance [\w-]+)",
    re.MULTILINE,
)
RECENT = timedelta(minutes=2)
"""Age up to which a failure still counts: Ray repeats launches every few seconds, and setups every minute or so."""
TAIL_BYTES = 100_000
NodeTypes = dict[str, dict[str, Any]]


def node_types() -> NodeTypes:
    """Return the types of the nodes that the autoscaler starts, as in cluster/aws.yaml, none if they are not known."""
    with suppress(FileNotFoundError):
        config = json.loads(CONFIG.expanduser().read_text())
        return {name: each for name, each in config["available_node_types"].items() if name != config["head_node_type"]}
    return {}


def largest_size() -> dict[str, float] | None:
    """Return the sums of resources over all nodes without GPUs that may run at once, None if they are not known."""
    cpu_nodes = _cpu_nodes()
    names = {name for each in cpu_nodes for name in each["resources"]}
    sums = {name: sum(each["max_workers"] * each["resources"].get(name, 0) for each in cpu_nodes) for name in names}
    return sums or None


def largest_node_cpus() -> int:
    """Return the CPUs of the largest node without GPUs that may run, 0 if it is not known."""
    return max((int(each["resources"].get("CPU", 0)) for each in _cpu_nodes() if each["max_workers"]), default=0)


def _cpu_nodes() -> list[dict[str, Any]]:
    """Return the types of nodes without GPUs."""
    return [each for each in node_types().values() if not each["resources"].get("GPU")]


def starting_types() -> list[str]:
    """Return the type of each node that AWS has started and that has not joined the cluster yet."""
    from ray.autoscaler.v2.sdk import get_cluster_status  # only this function needs it

    with suppress(ray.exceptions.RpcError):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [node.ray_node_type_name for node in status.pending_nodes]
    return []


def failed_launch() -> str | None:
    """Return why the autoscaler could not launch or set up a node within the last minutes, None if it could."""
    if (node := global_worker.node) is None:
        return None
    with suppress(FileNotFoundError), Path(node.get_logs_dir_path(), "monitor.log").open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        return find_failure(file.read().decode(errors="replace"), datetime.now())
    return None


def find_failure(log: str, now: datetime) -> str | None:
    """Return the last failure of a launch in the autoscaler's log, None without a recent one."""
    *_, last = None, *FAILED_LAUNCH.findall(log)
    if last is None or now - datetime.fromisoformat(last[0]) > RECENT:
        return None
    return str(last[1])
