"""The spot watcher drains its Ray node on an interruption notice in the instance's metadata, and only then."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clusters import Cluster

REPO = Path(__file__).parents[2]
WATCHER = REPO / "cluster" / "image" / "watch_spot.py"
INSTANCE = "i-0123456789abcdef0"
NOTICE = "spot/instance-action"


class Metadata(http.server.ThreadingHTTPServer):
    """A simulated metadata service of an instance (IMDSv2), which requires a session token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.items = {"instance-id": INSTANCE}
        self.broken = False
        self.requests: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, seconds: float) -> None:
        """Publish an interruption notice."""
        when = datetime.now(UTC) + timedelta(seconds=seconds)
        self.items[NOTICE] = json.dumps({"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})

    def count(self, status: int) -> int:
        """Count the requests for the notice with this status."""
        return sum(path.endswith(NOTICE) and code == status for path, code in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    """A request to the metadata service."""

    server: Metadata

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.reply(*((200, "a token") if known else (400, "")))

    def do_GET(self) -> None:
        item = self.server.items.get(self.path.removeprefix("/latest/meta-data/"))
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            self.reply(401, "")
        else:
            self.reply(*((404, "") if item is None else (200, item)))

    def reply(self, status: int, text: str) -> None:
        status = 500 if self.server.broken else status
        self.server.requests.append((self.path, status))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start two nodes; the second one has the instance's id, as the autoscaler sets it."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.environment["RAY_CLOUD_INSTANCE_ID"] = INSTANCE
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.stop()


QUICK = """
import runpy, sys, time

nap = time.sleep
time.sleep = lambda _: nap(0.1)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
"""Script that runs another one with all sleeps of a tenth of a second."""
Watch = Callable[..., subprocess.Popen]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Return a function that starts the watcher."""
    started = []

    def watch(endpoint: str, cluster: Cluster | None = None) -> subprocess.Popen:
        environment = cluster.environment if cluster else dict(os.environ)
        address = environment["RAY_ADDRESS"] if cluster else "127.0.0.1:1"
        environment = {**environment, "AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint}
        started.append(subprocess.Popen([sys.executable, "-c", QUICK, WATCHER, address], env=environment))
        return started[-1]

    yield watch
    for process in started:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait up to a minute until a condition is met."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


WORK = """
import json, os, sys, time, ray
from ray._raylet import GcsClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(log_to_driver=False)
client = GcsClient(address=ray.get_runtime_context().gcs_address)
spot, = (n.node_id.hex() for n in client.get_all_node_info().values() if n.instance_id)

@ray.remote
def node_id(end, timeout=60):
    started = time.monotonic()
    open(f"{end}.started", "w").close()
    while not os.path.exists(end) and time.monotonic() < started + timeout:
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()

running = node_id.options(scheduling_strategy=On(spot, soft=False), max_retries=0).remote(sys.argv[1])
while not os.path.exists(f"{sys.argv[1]}.started"):  # its CPU is taken before its process runs
    time.sleep(0.05)
print("running", flush=True)
sys.stdin.readline()
draining = client.get_draining_nodes()
others = ray.get([node_id.remote(sys.argv[1], 1) for _ in range(4)])  # two fit on the head at once
open(sys.argv[1], "w").close()
left = [deadline / 1000 - time.time() for deadline in draining.values()]
print(json.dumps({"spot": spot, "draining": [*draining], "left": left, "others": others, "running": ray.get(running)}))
"""


def test_without_a_notice_the_watcher_keeps_polling(metadata: Metadata, watch: Watch):
    watcher = watch(metadata.url)
    wait_until(lambda: metadata.count(404) >= 5)
    assert watcher.poll() is None


def test_errors_of_the_metadata_service_are_retried(metadata: Metadata, watch: Watch):
    metadata.broken = True
    watcher = watch(metadata.url)
    wait_until(lambda: len(metadata.requests) >= 5)
    metadata.broken = False
    wait_until(lambda: metadata.count(404) >= 2)
    assert watcher.poll() is None


def test_without_a_metadata_service_the_watcher_waits(watch: Watch):
    watcher = watch("http://127.0.0.1:1")
    with pytest.raises(subprocess.TimeoutExpired):
        watcher.wait(timeout=2)


@pytest.mark.slow  # 15 s
def test_a_failed_drain_is_retried(metadata: Metadata, cluster: Cluster, watch: Watch):
    metadata.items["instance-id"] = "i-whose-node-is-not-up-yet"
    metadata.announce(120)
    watcher = watch(metadata.url, cluster)
    wait_until(lambda: sum(path.endswith("instance-id") for path, _ in metadata.requests) >= 3)
    assert watcher.poll() is None


@pytest.mark.slow  # 15 s
def test_a_notice_drains_the_node_whose_running_task_finishes_while_new_ones_run_elsewhere(
    metadata: Metadata, cluster: Cluster, watch: Watch, tmp_path: Path
):
    command, pipe = [sys.executable, "-c", WORK, tmp_path / "end"], subprocess.PIPE
    job = subprocess.Popen(command, env=cluster.environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert job.stdout.readline() == "running\n"

    watcher = watch(metadata.url, cluster)
    metadata.announce(120)
    assert watcher.wait(timeout=60) == 0
    out, err = job.communicate("\n", timeout=60)
    assert job.returncode == 0, err
    result = json.loads(out)

    assert result["draining"] == [result["spot"]]
    assert 60 < result["left"][0] <= 120
    assert result["spot"] not in result["others"]
    assert result["running"] == result["spot"]
