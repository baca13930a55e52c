"""Benchmark of a cluster of 1,000 nodes: seconds of scheduling, and memory of the head's processes.

A real head, which runs Ray's GCS and raylet and this driver, with nodes of `_stub_nodes`, which run no code: start of
processes, transfer of objects and work itself are not measured.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN  # type: ignore[attr-defined]  # protobuf adds it

from carclass.cluster import connection, resources, tasks, telemetry
from carclass.errors import UserError
from carclass.progress import print_line
from carclass.tools.benchmarks.memory import peak_mb

NUM_NODES, NUM_TASKS = 1000, 4000
RESOURCES = {"CPU": 4.0, "GPU": 1.0, "memory": 12e9, "object_store_memory": 4e9}
LABELS = {resources.WORK_LABEL: resources.MASK, telemetry.PRICE_LABEL: "0.8048"}
"""Those of a node for masking, as in cluster/aws.yaml."""
FIRST_PORT = 6400
START_S = 120.0
Seconds = dict[str, float]


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Return the seconds of each request to the cluster, tasks per second, and peak memory in MB."""
    if photos is not None or weights is not None:
        raise UserError("--photos and --weights have no effect on the benchmark `nodes`, which has none. Omit them.")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    address = f"127.0.0.1:{connection.free_port(FIRST_PORT)}"
    environment = {**os.environ, **token, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}
    seconds: Seconds = {}
    with _start_head(folder, environment) as head, _start_nodes(folder, environment, seconds):
        # In a process of its own, as Ray reads its environment when it is imported.
        command = [sys.executable, "-m", __name__]
        driver = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
        figures = {**json.loads(driver.stdout.splitlines()[-1]), **_peaks(head.pid)}
    with _timed(seconds, "autoscaler_chooses_nodes"):
        _choose_nodes()
    return {"nodes": NUM_NODES, **_in_seconds(seconds), **figures}


def _measure() -> None:
    """Print the figures of a driver on the cluster."""
    seconds: Seconds = {}
    with _timed(seconds, "connect"):
        connection.connect()
    _measure_requests(seconds)
    with _timed(seconds, "finish_tasks"):
        assert sum(1 for _ in tasks.run_tasks(len, ["item"] * NUM_TASKS)) == NUM_TASKS
    figures = {**_in_seconds(seconds), "tasks_per_s": NUM_TASKS / seconds["finish_tasks"], "driver_mb": peak_mb()}
    print(json.dumps(figures, allow_nan=False), flush=True)


def _in_seconds(seconds: Seconds) -> dict[str, float]:
    return {f"{name}_s": value for name, value in seconds.items()}


def _measure_requests(seconds: Seconds) -> None:
    """Measure what jobs ask of a cluster before and while they work."""
    with _timed(seconds, "read_resources"):
        assert resources.count_slots("GPU", 1, LABELS) == NUM_NODES
    with _timed(seconds, "add_up_cost"):
        telemetry.CostMeter().update(ray.nodes(), time.monotonic())
    with _timed(seconds, "place_a_gpu_per_node"):
        assert resources.decide_gpus(None, NUM_NODES, "mask.use_gpu", resources.MASK)
    selector = resources.node_selector(resources.MASK) or {}
    with _timed(seconds, "create_an_actor_per_node"):
        actor: Any = ray.remote(num_gpus=1, num_cpus=0, label_selector=selector)(_Idle)
        handles = [actor.remote() for _ in range(NUM_NODES)]
        _wait_for(lambda: [row["State"] for row in actors().values()].count("ALIVE") == len(handles))


class _Idle:
    """An actor that does nothing."""


def _choose_nodes() -> None:
    """Let Ray's autoscaler choose the nodes for as many requests of a GPU, on a cluster that has none yet."""
    kind = {"min_worker_nodes": 0, "max_worker_nodes": NUM_NODES, "resources": RESOURCES, "labels": LABELS}
    selector = (resources.WORK_LABEL, LABEL_OPERATOR_IN, [resources.MASK])
    demand = [ResourceRequestUtil.make({"GPU": 1}, label_selectors=[[selector]])] * NUM_NODES
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={"mask": NodeTypeConfig("mask", **kind)},  # type: ignore[arg-type]
        max_num_nodes=NUM_NODES,
        resource_requests=ResourceRequestUtil.group_by_count(demand),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    assert sum(launch.count for launch in reply.to_launch) == NUM_NODES


@contextmanager
def _start_head(folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a head without CPUs at the environment's address."""
    port = environment["RAY_ADDRESS"].rpartition(":")[2]
    options = ["--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0"]
    options += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
    options += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *options]
    environment = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    with _running(command, environment, folder / "head.log") as head:
        _wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text())
        yield head


@contextmanager
def _start_nodes(folder: Path, environment: dict[str, str], seconds: Seconds) -> Iterator[None]:
    """Register the nodes, which answer until the end."""
    kinds = folder / "nodes.json"
    kinds.write_text(json.dumps([{"count": NUM_NODES, "resources": RESOURCES, "labels": LABELS}], allow_nan=False))
    module = "carclass.tools.benchmarks._stub_nodes"
    command = [sys.executable, "-m", module, environment["RAY_ADDRESS"], str(kinds)]
    with _running(command, environment, folder / "nodes.log"):
        with _timed(seconds, "register_nodes"):
            _wait_for(lambda: (folder / "nodes.log").read_text() == f"{NUM_NODES}\n")
        yield


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and end it afterwards."""
    with log.open("w") as out:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _timed(seconds: Seconds, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    print_line(f"{name.replace('_', ' ')}: {seconds[name]:.2f} s")


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, "the cluster does not answer"
        time.sleep(0.05)


def _peaks(session: int) -> dict[str, float]:
    """Return the peak memory in MB of the head's GCS and raylet."""
    peaks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        name = (folder / "comm").read_text().strip()
        if name in ("gcs_server", "raylet") and os.getsid(int(folder.name)) == session:
            peaks[f"{name}_mb"] = peak_mb(folder.name)
    return peaks


if __name__ == "__main__":
    _measure()
