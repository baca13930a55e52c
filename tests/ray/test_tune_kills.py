"""A sweep that is killed three times tries and finds what an undisturbed one does, and nothing twice."""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from carclass import storage
from carclass.data import dataset
from carclass.tuning import results, trial_records
from carclass.tuning.collect import collect_sweep
from tests.helpers.clusters import Cluster, Job, below, kill, start, titled, wait_for

SEARCH: dict[str, Any] = {
    "experiment": "experiment.yml",
    "space": {
        "train.frozen.lr": {"min": 1e-4, "max": 3e-2, "log": True},
        "train.frozen.ema_decay": {"choices": [None, 0.9]},
    },
    "num_trials": 8,
    "num_seeds": 2,
    "min_epochs": 2,
    # One after the other: what several at a time learn from each other depends on which of them is faster.
    "max_concurrent_trials": 1,
}
TRAIN: dict[str, Any] = {
    "name": "small",
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": {"epochs": 30, "batch_size": 8},
    "unfrozen": None,
    "checkpoint_steps": 1,
}
SEED = 5
TRIAL = "ray::TrialProcess"
"""What the title of a trial's process begins with."""


@pytest.fixture(scope="module")
def root(ingested: dataset.Dataset) -> str:
    return ingested.uri.rsplit("/", 2)[0]


@pytest.fixture(scope="module")
def folder(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "experiment.yml").write_text(yaml.safe_dump({"root": root, "train": TRAIN}))
    for name in ("undisturbed", "killed"):
        (folder / f"{name}.yml").write_text(yaml.safe_dump({"name": name, **SEARCH}))
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder, dashboard=True)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(root: str, folder: Path, cluster: Cluster) -> results.SweepResult:
    start("tune.py", folder / "undisturbed.yml", cluster.environment).end()
    return collect_sweep(root, "undisturbed")


def num_epochs(root: str) -> int:
    """How many epochs the killed sweep's trials have, all together."""
    folder = f"{trial_records.sweep_uri(root, 'killed')}/trials"
    paths = [path for path in storage.list_files(folder) if path.endswith("/metrics.jsonl")]
    return sum(storage.read_bytes(storage.join(folder, path)).count(b"\n") for path in paths)


def wait_for_epochs(root: str, wanted: int, job: Job) -> None:
    deadline = time.monotonic() + 180
    while num_epochs(root) < wanted:
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.01)


class Killed(NamedTuple):
    """The sweep in the end, and the times of the epochs of trials that were over when it was killed."""

    found: results.SweepResult
    over: dict[str, list[float]]


def kill_a_trial(cluster: Cluster) -> bool:
    """Kills a trial's process, if there is one: trials end, and others begin, at any moment."""
    with suppress(IndexError, ProcessLookupError):
        os.kill(titled(below(cluster.head.pid), TRIAL)[0], signal.SIGKILL)
        return True
    return False


@pytest.fixture(scope="module")
def killed(root: str, folder: Path, cluster: Cluster, undisturbed: results.SweepResult) -> Killed:
    """Killed at three random moments: the driver alone twice, then the whole machine. In the end, a trial's process."""
    total = sum(len(one.epochs) for one in undisturbed.outcomes)
    moments = sorted(random.Random(SEED).sample(range(1, total * 2 // 3), 3))
    over = {}
    for turn, wanted in enumerate(moments):
        job = start("tune.py", folder / "killed.yml", cluster.environment)
        wait_for_epochs(root, wanted, job)
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait(timeout=60)
        ended = [one for one in collect_sweep(root, "killed").outcomes if one.trial.is_over]
        over |= {one.trial.name: [row["time"] for row in one.epochs] for one in ended}
        if turn == 2:
            kill(cluster.head)
    cluster.stop()
    another = Cluster(folder, dashboard=True)
    try:
        job = start("tune.py", folder / "killed.yml", another.environment, "--resume")
        wait_for(lambda: kill_a_trial(another), job.process, job.log)
        job.end()
    finally:
        another.stop()
    return Killed(collect_sweep(root, "killed"), over)


def epochs(found: results.SweepResult) -> list[list[tuple]]:
    keys = ("epoch", "train_loss", "val_accuracy")
    return [[tuple(row[key] for key in keys) for row in one.epochs] for one in found.outcomes]


def tried(found: results.SweepResult) -> list[tuple]:
    return [(one.trial.number, one.trial.name, one.trial.repeats, one.trial.state) for one in found.outcomes]


def test_the_same_trials_end_the_same_way(undisturbed: results.SweepResult, killed: Killed):
    assert tried(killed.found) == tried(undisturbed)


def test_some_trials_were_ended_early(undisturbed: results.SweepResult):
    assert {"complete", "pruned"} == {one.trial.state for one in undisturbed.outcomes}


def test_no_trial_is_trained_twice(root: str, killed: Killed):
    folders = {path.split("/")[0] for path in storage.list_files(f"{trial_records.sweep_uri(root, 'killed')}/trials")}
    assert sorted(folders) == sorted(one.trial.name for one in killed.found.outcomes)


def test_every_epoch_is_the_undisturbed_one_and_is_there_once(undisturbed: results.SweepResult, killed: Killed):
    assert epochs(killed.found) == epochs(undisturbed)


def test_the_best_is_the_same(undisturbed: results.SweepResult, killed: Killed):
    assert killed.found.best.trial == undisturbed.best.trial
    assert killed.found.best.accuracy == undisturbed.best.accuracy


def test_trials_that_were_over_are_not_trained_again(killed: Killed):
    """Each of their epochs keeps its time."""
    assert killed.over
    after = {one.trial.name: [row["time"] for row in one.epochs] for one in killed.found.outcomes}
    assert {name: after[name] for name in killed.over} == killed.over
