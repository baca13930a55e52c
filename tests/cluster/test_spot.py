"""The spot watcher: a notice in the instance's metadata drains its Ray node, and nothing else does."""

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
    """An instance's metadata service: IMDSv2, which answers nobody without a token of its own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.items = {"instance-id": INSTANCE}
        self.broken = False
        self.asked: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, seconds: float) -> None:
        when = datetime.now(UTC) + timedelta(seconds=seconds)
        self.items[NOTICE] = json.dumps({"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})

    def count(self, status: int) -> int:
        """How often the notice was asked for with this outcome."""
        return sum(path.endswith(NOTICE) and outcome == status for path, outcome in self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

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
        self.server.asked.append((self.path, status))
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
    """Two nodes with a token; the second is on the instance, as the autoscaler tells it."""
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
"""Runs a script that waits a tenth of a second where it would wait longer."""
Watch = Callable[..., subprocess.Popen]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Starts the watcher."""
    started = []

    def watch(endpoint: str, cluster: Cluster | None = None) -> subprocess.Popen:
        environment = cluster.environment if cluster else dict(os.environ)
        address = environment["RAY_ADDRESS"] if cluster else "127.0.0.1:1"
        known = {**environment, "AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint}
        started.append(subprocess.Popen([sys.executable, "-c", QUICK, WATCHER, address], env=known))
        return started[-1]

    yield watch
    for process in started:
        process.kill()
        process.wait()


def until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
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
def where(end, at_most=60):
    began = time.monotonic()
    while not os.path.exists(end) and time.monotonic() < began + at_most:
        time.sleep(0.05)
    return ray.get_runtime_context().get_node_id()

running = where.options(scheduling_strategy=On(spot, soft=False), max_retries=0).remote(sys.argv[1])
while not ray.available_resources().get("CPU") == 3:
    time.sleep(0.05)
print("running", flush=True)
sys.stdin.readline()
draining = client.get_draining_nodes()
others = ray.get([where.remote(sys.argv[1], 1) for _ in range(4)])  # the head has room for two at once
open(sys.argv[1], "w").close()
left = [deadline / 1000 - time.time() for deadline in draining.values()]
print(json.dumps({"spot": spot, "draining": [*draining], "left": left, "others": others, "running": ray.get(running)}))
"""


def test_without_a_notice_nothing_happens(metadata: Metadata, watch: Watch):
    watcher = watch(metadata.url)
    until(lambda: metadata.count(404) >= 5)
    assert watcher.poll() is None


def test_a_metadata_service_in_trouble_is_asked_again(metadata: Metadata, watch: Watch):
    metadata.broken = True
    watcher = watch(metadata.url)
    until(lambda: len(metadata.asked) >= 5)
    metadata.broken = False
    until(lambda: metadata.count(404) >= 2)
    assert watcher.poll() is None


def test_where_there_is_no_metadata_service_the_watcher_waits(watch: Watch):
    watcher = watch("http://127.0.0.1:1")
    with pytest.raises(subprocess.TimeoutExpired):
        watcher.wait(timeout=2)


@pytest.mark.slow  # 15 s
def test_a_notice_that_cannot_be_acted_upon_yet_is_tried_again(metadata: Metadata, cluster: Cluster, watch: Watch):
    metadata.items["instance-id"] = "i-whose-node-is-not-up-yet"
    metadata.announce(120)
    watcher = watch(metadata.url, cluster)
    until(lambda: sum(path.endswith("instance-id") for path, _ in metadata.asked) >= 3)
    assert watcher.poll() is None


@pytest.mark.slow  # 15 s
def test_a_notice_drains_the_node_whose_running_task_ends_while_new_ones_go_elsewhere(
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
    said = json.loads(out)

    assert said["draining"] == [said["spot"]]
    assert 60 < said["left"][0] <= 120
    assert said["spot"] not in said["others"]
    assert said["running"] == said["spot"]
