"""Masking jobs that lose processes or nodes at random moments end with the same dataset as an uninterrupted job.

Of 400 photos. Five jobs lose the raylet of one of two nodes, then a detector, then the driver; they are resumed. One
loses only a node and must finish by itself. One starts its own cluster and loses all of it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from carclass.config import cli
from carclass.config.schema import Config, MaskSettings
from carclass.data import dataset, publishing
from carclass.masking.mask import mask_dataset
from carclass.sample.generate import write_sample
from tests.helpers.clusters import Cluster, Job, descendants, find_by_title, start, wait_for

KILLS = "node, detector, driver"
CASES = [
    (KILLS, 0),
    *(pytest.param((KILLS, seed), marks=pytest.mark.nightly) for seed in (1, 2, 3, 4)),  # 60 s each
    pytest.param(("node", 5), marks=pytest.mark.nightly),  # 60 s
    pytest.param(("machine", 6), marks=pytest.mark.nightly),  # 80 s
]
PART_ROWS = 20
pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # 70 s
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


# The jobs


class Interrupted(NamedTuple):
    """A job in which processes were killed."""

    published: dataset.Dataset
    num_killed: list[int]  # processes per kill
    num_missing: int  # photos not yet written at the last kill
    before: Files  # Parquet files at the last kill
    after: Files


class MaskingJobs:
    """Masking jobs on one cluster and a dataset of 400 photos."""

    def __init__(self, folder: Path, cluster: Cluster, files_below: Callable[[str], Files]) -> None:
        self.folder, self.cluster, self.files_below = folder, cluster, files_below
        write_sample(folder, train_per_class=30, test_per_class=10)
        self.config_file = folder / "config.yml"
        self.config_file.write_text(CONFIG.format(folder=folder, part_rows=PART_ROWS))
        start("ingest.py", self.config_file, cluster.environment).end()
        self.mask("uninterrupted", cluster.environment).end()

    @property
    def root(self) -> str:
        return str(self.folder / "root")

    def settings(self, name: str) -> MaskSettings:
        settings = cli.load_config(self.config_file, {"mask.dataset": name}, Config).mask
        assert settings is not None
        return settings

    def mask(self, name: str, environment: dict[str, str]) -> Job:
        return start("mask.py", self.config_file, environment, "--dataset", name)

    def written_files(self, name: str) -> Files:
        """Return the Parquet files of a dataset, finished or not."""
        files = self.files_below(dataset.dataset_uri(self.root, name))
        return {path: stat for path, stat in files.items() if path.endswith(".parquet")}

    def interrupt(self, victims: str, seed: int) -> Interrupted:
        name, rng = f"interrupted-{seed}", np.random.default_rng(seed)
        alone = {key: value for key, value in self.cluster.environment.items() if not key.startswith("RAY_")}
        if "node" in victims:
            self.cluster.add_node()
        job = self.mask(name, alone if victims == "machine" else self.cluster.environment)
        num_killed, parts = [], 0
        for victim in victims.split(", "):
            parts += rng.integers(1, 4)
            self.wait_for_parts(name, parts, job)
            before = self.written_files(name)
            num_killed.append(self.kill(victim, rng, job))
            num_missing = self.count_missing(name, list(before))
        if victim in ("driver", "machine"):
            assert job.process.wait(timeout=60) != 0
            job = self.mask(name, self.cluster.environment)
        job.end()
        published = dataset.load_dataset(self.root, name)
        return Interrupted(published, num_killed, num_missing, before, self.written_files(name))

    def wait_for_parts(self, name: str, count: int, job: Job) -> None:
        """Wait until `count` parts are written; only few, as the detectors run ahead of the parts."""
        parts = Path(dataset.dataset_uri(self.root, name)) / "parts"
        wait_for(lambda: len(list(parts.glob("*.parquet"))) >= count, job.process, job.log)

    def kill(self, victim: str, rng: np.random.Generator, job: Job) -> int:
        """Kill the victim, and return the number of detectors or drivers that end with it."""
        detectors = self.cluster.detectors()
        if victim == "detector":
            os.kill(rng.choice(detectors), signal.SIGKILL)
            return 1
        if victim == "driver":
            job.process.kill()
            return 1
        if victim == "machine":
            processes = descendants(job.process.pid)
            (raylet,) = find_by_title(processes, "raylet")
            os.kill(raylet, signal.SIGKILL)
            return len(find_by_title(processes, "ray::MapWorker("))
        self.cluster.lose_node()
        return len(set(detectors) - set(self.cluster.detectors()))

    def count_missing(self, name: str, files: list[str]) -> int:
        """Return the number of photos in none of the files."""
        uri = dataset.dataset_uri(self.root, name)
        tables = [publishing.read_written(uri, folder, ["key"]).to_pylist() for folder in ("parts", "quarantine")]
        keys = {row["key"] for table in tables for row in table if row["part"] in files}
        return dataset.load_dataset(self.root, "v1").manifest["rows"] - len(keys)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster separate from that of the test session."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def jobs(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, files_below: Callable[[str], Files]
) -> MaskingJobs:
    """Masking jobs with an uninterrupted one finished."""
    return MaskingJobs(tmp_path_factory.mktemp("kills"), cluster, files_below)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def interrupted(request: pytest.FixtureRequest, jobs: MaskingJobs) -> Interrupted:
    """A finished job that lost processes."""
    return jobs.interrupt(*request.param)


def test_processes_were_killed_while_photos_were_missing(interrupted: Interrupted):
    assert min(interrupted.num_killed) >= 1
    assert interrupted.num_missing >= PART_ROWS


def test_rows_and_quarantine_equal_those_of_an_uninterrupted_job(
    interrupted: Interrupted, jobs: MaskingJobs, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    expected, actual = contents(dataset.load_dataset(jobs.root, "uninterrupted")), contents(interrupted.published)
    assert [len(rows) for rows in actual] == [len(rows) for rows in expected]
    for rows, expected_rows in zip(actual, expected, strict=True):
        assert [row["key"] for row, other in zip(rows, expected_rows, strict=True) if row != other] == []


def test_files_from_before_the_kill_are_not_rewritten(interrupted: Interrupted):
    assert {path: interrupted.after.get(path) for path in interrupted.before} == interrupted.before


def test_a_repeated_job_writes_nothing(
    interrupted: Interrupted, jobs: MaskingJobs, files_below: Callable[[str], Files]
):
    before = files_below(jobs.root)
    assert mask_dataset(jobs.root, jobs.settings(interrupted.published.name)) == interrupted.published
    assert files_below(jobs.root) == before
