"""Ray clusters and jobs in separate processes, which tests can kill."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

JOBS = Path(__file__).parents[2] / "jobs"
RAY = Path(sys.executable).with_name("ray")
SYSTEM = {
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
    "idle_worker_killing_time_threshold_ms": 600_000,
}
"""Detect lost nodes within two seconds instead of fifteen; keep idle workers, because starting one takes seconds."""


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> dict[int, str]:
    """Return the titles of all descendants of a process, by pid."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError):  # exited meanwhile
            continue
    children, generation = set(), {pid}
    while generation := {child for child, parent in parents.items() if parent in generation}:
        children |= generation
    return {child: titles[child] for child in sorted(children) if child in titles}


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its descendants; a terminated Ray node would wait half a minute for its tasks."""
    if process.poll() is None:
        for pid in (process.pid, *descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)


def find_by_title(pids: dict[int, str], start: str) -> list[int]:
    """Return the pids of the processes whose title starts with a text."""
    return [pid for pid, title in pids.items() if title.split(" ")[0].rsplit("/", 1)[-1].startswith(start)]


class Cluster:
    """A Ray cluster on this machine with nodes that can be killed. gpus: of each node, which exist for Ray only."""

    def __init__(
        self, folder: Path, *, dashboard: bool = False, variables: Mapping[str, str] | None = None, gpus: int = 0
    ) -> None:
        self.folder, self.port, self.gpus = folder, free_port(), gpus
        environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**environ, **token, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        self.environment |= variables or {}
        self.environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
        dashboard_port = free_port()
        if dashboard:  # otherwise a helper of Ray Train queries the controller of another cluster
            self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard_port}"
        options = [f"--port={self.port}", f"--system-config={json.dumps(SYSTEM)}"]
        options += [f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"]
        self.started: list[subprocess.Popen] = []
        self.head = self._start("head", "--head", *options)
        self.node: subprocess.Popen | None = None

    def add_node(self) -> None:
        """Start a second node."""
        self.node = self._start("node", f"--address=127.0.0.1:{self.port}")

    def lose_node(self) -> None:
        """Kill the second node's raylet and wait for the node's other processes."""
        assert self.node is not None
        (raylet,) = find_by_title(descendants(self.node.pid), "raylet")
        os.kill(raylet, signal.SIGKILL)
        self.node.wait(timeout=60)
        self.node = None

    def detectors(self) -> list[int]:
        """Return the pids of the actors with a detector."""
        nodes = [node for node in (self.head, self.node) if node is not None]
        return [pid for node in nodes for pid in find_by_title(descendants(node.pid), "ray::MapWorker(")]

    def stop(self) -> None:
        """Kill all nodes."""
        for process in reversed(self.started):
            kill(process)
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)

    def _start(self, name: str, *options: str) -> subprocess.Popen:
        common = [
            "--num-cpus=2",
            f"--num-gpus={self.gpus}",
            "--object-store-memory=200000000",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        common += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1", "--block"]
        log = self.folder / f"{name}-{time.monotonic_ns()}.log"
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with log.open("w") as out:
            process = subprocess.Popen([RAY, "start", *options, *common], env=environment, stdout=out, stderr=out)
        self.started.append(process)
        wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)
        return process


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    """Wait until a condition is met while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


class Job(NamedTuple):
    """A running job and its log."""

    process: subprocess.Popen
    log: Path

    def end(self) -> None:
        """Wait for the job and assert that it succeeds."""
        assert self.process.wait(timeout=400) == 0, self.log.read_text()


def start(name: str, config_file: Path, environment: dict[str, str], *options: str) -> Job:
    """Start a job of jobs/ with a config file."""
    log = config_file.with_name(f"{name.removesuffix('.py')}-{time.monotonic_ns()}.log")
    command = [sys.executable, JOBS / name, "--config", config_file, *options]
    with log.open("w") as out:
        return Job(subprocess.Popen(command, env=environment, stdout=out, stderr=out), log)
