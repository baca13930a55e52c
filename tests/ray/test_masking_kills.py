"""A masking run that loses processes or a machine at random moments ends as one that nothing happened to.

400 photos; five runs lose the raylet of one of two nodes, then a detector, then the driver. One loses a node alone and
has to end by itself, one has a cluster of its own and loses all of it.
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
from tests.helpers.clusters import Cluster, Job, below, start, titled, wait_for

KILLS = "node, detector, driver"
CASES = [
    *((KILLS, seed) for seed in (0, 1)),
    *(pytest.param((KILLS, seed), marks=pytest.mark.nightly) for seed in (2, 3, 4)),  # 60 s each
    ("node", 5),
    ("machine", 6),
]
PART_ROWS = 20
pytestmark = pytest.mark.slow  # 190 s
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

    def settings(self, name: str) -> MaskSettings:
        found = cli.load_config(self.config_file, {"mask.dataset": name}, Config).mask
        assert found is not None
        return found

    def mask(self, name: str, environment: dict[str, str]) -> Job:
        return start("mask.py", self.config_file, environment, "--dataset", name)

    def written(self, name: str) -> Files:
        """The Parquet files of a dataset, finished or not."""
        files = self.files_below(dataset.dataset_uri(self.root, name))
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
        return Disturbed(dataset.load_dataset(self.root, name), killed, missing, before, self.written(name))

    def wait_for_parts(self, name: str, count: int, job: Job) -> None:
        """Returns when so many parts are written. Few enough: the detectors run ahead of the parts."""
        parts = Path(dataset.dataset_uri(self.root, name)) / "parts"
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
        uri = dataset.dataset_uri(self.root, name)
        tables = [publishing.read_written(uri, folder, ["key"]).to_pylist() for folder in ("parts", "quarantine")]
        keys = {row["key"] for table in tables for row in table if row["part"] in files}
        return dataset.load_dataset(self.root, "v1").manifest["rows"] - len(keys)


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
    expected, found = contents(dataset.load_dataset(runs.root, "undisturbed")), contents(disturbed.published)
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]
    for one, other in zip(found, expected, strict=True):
        assert [a["key"] for a, b in zip(one, other, strict=True) if a != b] == []


def test_what_was_written_before_the_kill_is_not_written_again(disturbed: Disturbed):
    assert {path: disturbed.after.get(path) for path in disturbed.before} == disturbed.before


def test_one_more_run_writes_nothing(disturbed: Disturbed, runs: Runs, files_below: Callable[[str], Files]):
    before = files_below(runs.root)
    assert mask_dataset(runs.root, runs.settings(disturbed.published.name)) == disturbed.published
    assert files_below(runs.root) == before
