"""A masking run that loses processes or a machine at random moments ends as one that nothing happened to.

400 photos; five runs lose the raylet of one of two nodes, then a detector, then the driver. One loses a node alone and
has to end by itself, one has a cluster of its own and loses all of it.
"""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from carclass import command_line, config, dataset
from carclass.masking import stream
from carclass.sample.generate import write_sample

JOBS = Path(__file__).parents[2] / "jobs"
RAY = Path(sys.executable).with_name("ray")
CASES = [*(("node, detector, driver", seed) for seed in range(5)), ("node", 5), ("machine", 6)]
PART_ROWS = 20
CONFIG = """
root: {folder}/root
ingest: {{photos: {folder}/photos, labels: {folder}/labels.csv}}
mask:
  detector: {{model: sample, weights: sample, short_side: 96, num_proposals: 10}}
  exclude: {{touches_border: true}}
  num_actors: 2
  part_rows: {part_rows}
"""

Files = dict[str, tuple[int, int]]
Rows = list[dict[str, Any]]


# Clusters and jobs, each in processes of its own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def below(pid: int) -> dict[int, str]:
    """Every process that a process started, and those that these started, with their titles."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (FileNotFoundError, ProcessLookupError):  # ended in the meantime
            continue
    found, generation = set(), {pid}
    while generation := {child for child, parent in parents.items() if parent in generation}:
        found |= generation
    return {child: titles[child] for child in sorted(found) if child in titles}


def titled(pids: dict[int, str], start: str) -> list[int]:
    return [pid for pid, title in pids.items() if title.split(" ")[0].rsplit("/", 1)[-1].startswith(start)]


class Cluster:
    """A Ray cluster on this machine whose nodes can be lost."""

    def __init__(self, folder: Path, *, dashboard: bool = False) -> None:
        self.folder, self.port = folder, free_port()
        known = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**known, **token, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        self.environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
        # A lost node is noticed in two seconds, not in fifteen; idle workers stay, as starting one costs seconds.
        system = {
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
            "health_check_initial_delay_ms": 1000,
            "idle_worker_killing_time_threshold_ms": 600_000,
        }
        options = [f"--port={self.port}", f"--include-dashboard={dashboard}", f"--system-config={json.dumps(system)}"]
        self.started: list[subprocess.Popen] = []
        self.head = self._start("head", "--head", *options)
        self.node: subprocess.Popen | None = None

    def add_node(self) -> None:
        """A second node, which can be lost."""
        self.node = self._start("node", f"--address=127.0.0.1:{self.port}")

    def lose_node(self) -> None:
        """Kills the second node's raylet and waits for what the node leaves behind."""
        assert self.node is not None
        (raylet,) = titled(below(self.node.pid), "raylet")
        os.kill(raylet, signal.SIGKILL)
        self.node.wait(timeout=60)
        self.node = None

    def detectors(self) -> list[int]:
        """Processes of the actors that have a detector."""
        return titled(below(self.head.pid) | (below(self.node.pid) if self.node else {}), "ray::MapWorker(")

    def stop(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)

    def _start(self, name: str, *options: str) -> subprocess.Popen:
        more = ["--num-cpus=2", "--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}"]
        more += ["--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1", "--block"]
        log = self.folder / f"{name}-{time.monotonic_ns()}.log"
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        with log.open("w") as out:
            process = subprocess.Popen([RAY, "start", *options, *more], env=environment, stdout=out, stderr=out)
        self.started.append(process)
        wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)
        return process


def wait_for(reached: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


class Job(NamedTuple):
    """A running job and its log."""

    process: subprocess.Popen
    log: Path

    def end(self) -> None:
        """Waits until the job has ended well."""
        assert self.process.wait(timeout=180) == 0, self.log.read_text()


def start(name: str, config_file: Path, environment: dict[str, str], *options: str) -> Job:
    log = config_file.with_name(f"{name.removesuffix('.py')}-{time.monotonic_ns()}.log")
    command = [sys.executable, JOBS / name, "--config", config_file, *options]
    with log.open("w") as out:
        return Job(subprocess.Popen(command, env=environment, stdout=out, stderr=out), log)


# The runs


class Disturbed(NamedTuple):
    """A run in which something was killed, once or more."""

    published: dataset.Dataset
    killed: list[int]  # how many processes, each time
    missing: int  # photos not yet written at the last of these moments
    before: Files  # Parquet files that were there at that moment
    after: Files


class Runs:
    """A cluster, a dataset of 400 photos, and the files that each run leaves."""

    def __init__(self, folder: Path, cluster: Cluster, files_below: Callable[[str], Files]) -> None:
        self.folder, self.cluster, self.files_below = folder, cluster, files_below
        write_sample(folder, train_per_class=30, test_per_class=10)
        self.config_file = folder / "config.yml"
        self.config_file.write_text(CONFIG.format(folder=folder, part_rows=PART_ROWS))
        start("ingest.py", self.config_file, cluster.environment).end()
        self.mask("undisturbed", cluster.environment).end()

    @property
    def root(self) -> str:
        return str(self.folder / "root")

    def settings(self, name: str) -> config.Mask:
        found = command_line.load(self.config_file, {"mask.dataset": name}).mask
        assert found is not None
        return found

    def mask(self, name: str, environment: dict[str, str]) -> Job:
        return start("mask.py", self.config_file, environment, "--dataset", name)

    def written(self, name: str) -> Files:
        """The Parquet files of a dataset, finished or not."""
        files = self.files_below(dataset.place(self.root, name))
        return {path: stat for path, stat in files.items() if path.endswith(".parquet")}

    def disturb(self, victims: str, seed: int) -> Disturbed:
        name, rng = f"disturbed-{seed}", np.random.default_rng(seed)
        alone = {key: value for key, value in self.cluster.environment.items() if not key.startswith("RAY_")}
        if "node" in victims:
            self.cluster.add_node()
        job = self.mask(name, alone if victims == "machine" else self.cluster.environment)
        killed, parts = [], 0
        for victim in victims.split(", "):
            parts += rng.integers(1, 4)
            self.wait_for_parts(name, parts, job)
            before = self.written(name)
            killed.append(self.kill(victim, rng, job))
            missing = self.missing(name, list(before))
        if victim in ("driver", "machine"):
            assert job.process.wait(timeout=60) != 0
            job = self.mask(name, self.cluster.environment)
        job.end()
        return Disturbed(dataset.load(self.root, name), killed, missing, before, self.written(name))

    def wait_for_parts(self, name: str, count: int, job: Job) -> None:
        """Returns when so many parts are written. Few enough: the detectors run ahead of the parts."""
        parts = Path(dataset.place(self.root, name)) / "parts"
        wait_for(lambda: len(list(parts.glob("*.parquet"))) >= count, job.process, job.log)

    def kill(self, victim: str, rng: np.random.Generator, job: Job) -> int:
        """Kills it, and counts what depends on it: detectors, or the driver."""
        detectors = self.cluster.detectors()
        if victim == "detector":
            os.kill(rng.choice(detectors), signal.SIGKILL)
            return 1
        if victim == "driver":
            job.process.kill()
            return 1
        if victim == "machine":
            processes = below(job.process.pid)
            (raylet,) = titled(processes, "raylet")
            os.kill(raylet, signal.SIGKILL)
            return len(titled(processes, "ray::MapWorker("))
        self.cluster.lose_node()
        return len(set(detectors) - set(self.cluster.detectors()))

    def missing(self, name: str, files: list[str]) -> int:
        """Photos that are in none of these files."""
        uri = dataset.place(self.root, name)
        tables = [dataset.written(uri, folder, ["key"]).to_pylist() for folder in ("parts", "quarantine")]
        keys = {row["key"] for table in tables for row in table if row["part"] in files}
        return dataset.load(self.root, "v1").manifest["rows"] - len(keys)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of processes of its own, which pytest's doesn't know of."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, files_below: Callable[[str], Files]) -> Runs:
    """Everything up to an undisturbed run."""
    return Runs(tmp_path_factory.mktemp("kills"), cluster, files_below)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def disturbed(request: pytest.FixtureRequest, runs: Runs) -> Disturbed:
    """A run that lost something and has come to its end."""
    return runs.disturb(*request.param)


def test_the_kills_came_while_photos_were_missing(disturbed: Disturbed):
    assert min(disturbed.killed) >= 1
    assert disturbed.missing >= PART_ROWS


def test_rows_and_quarantine_are_those_of_an_undisturbed_run(
    disturbed: Disturbed, runs: Runs, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    expected, found = contents(dataset.load(runs.root, "undisturbed")), contents(disturbed.published)
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    for one, other in zip(found, expected, strict=True):
        assert [a["key"] for a, b in zip(one, other, strict=True) if a != b] == []


def test_what_was_written_before_the_kill_is_not_written_again(disturbed: Disturbed):
    assert {path: disturbed.after.get(path) for path in disturbed.before} == disturbed.before


def test_one_more_run_writes_nothing(disturbed: Disturbed, runs: Runs, files_below: Callable[[str], Files]):
    before = files_below(runs.root)
    assert stream.run(runs.root, runs.settings(disturbed.published.name)) == disturbed.published
    assert files_below(runs.root) == before
