"""A sweep that is killed twice has the trials and results of an uninterrupted one."""

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
from carclass.tuning import results, trial_records
from carclass.tuning.collect import collect_sweep
from tests.helpers.clusters import Cluster, Job, descendants, find_by_title, kill, start, wait_for

SEARCH: dict[str, Any] = {
    "experiment": "experiment.yml",
    "space": {
        "train.frozen.lr": {"min": 1e-4, "max": 3e-2, "log": True},
        "train.frozen.ema_decay": {"choices": [None, 0.9]},
    },
    "num_trials": 6,
    "num_seeds": 2,
    "min_epochs": 2,
    # One at a time: suggestions to concurrent trials depend on the order in which these finish.
    "max_concurrent_trials": 1,
}
TRAIN: dict[str, Any] = {
    "name": "small",
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": {"epochs": 16, "batch_size": 8},
    "unfrozen": None,
    "checkpoint_seconds": 0,
}
SEED = 5
pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # 90 s
TRIAL = "ray::TrialProcess"
"""Prefix of the title of a trial's process."""


@pytest.fixture(scope="module")
def folder(root: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "experiment.yml").write_text(yaml.safe_dump({"root": root, "train": TRAIN}))
    for name in ("uninterrupted", "killed"):
        (folder / f"{name}.yml").write_text(yaml.safe_dump({"name": name, **SEARCH}))
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder, dashboard=True)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def uninterrupted(root: str, folder: Path, cluster: Cluster) -> results.SweepResult:
    start("tune.py", folder / "uninterrupted.yml", cluster.environment).end()
    return collect_sweep(root, "uninterrupted")


def num_epochs(root: str) -> int:
    """Return the total number of epochs of the killed sweep's trials."""
    folder = f"{trial_records.sweep_uri(root, 'killed')}/trials"
    paths = [path for path in storage.list_files(folder) if path.endswith("/metrics.jsonl")]
    return sum(storage.read_bytes(storage.join(folder, path)).count(b"\n") for path in paths)


def wait_for_epochs(root: str, min_epochs: int, job: Job) -> None:
    deadline = time.monotonic() + 180
    while num_epochs(root) < min_epochs:
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.01)


class Killed(NamedTuple):
    """Final results of the sweep, and times of the epochs of trials that were finished when it was killed."""

    sweep: results.SweepResult
    finished: dict[str, list[float]]


def kill_a_trial(cluster: Cluster) -> bool:
    """Kill a trial's process; return False if there is none at the moment."""
    with suppress(IndexError, ProcessLookupError):
        os.kill(find_by_title(descendants(cluster.head.pid), TRIAL)[0], signal.SIGKILL)
        return True
    return False


@pytest.fixture(scope="module")
def killed(root: str, folder: Path, cluster: Cluster, uninterrupted: results.SweepResult) -> Killed:
    """Kill a sweep at two random moments: the driver, then the whole node; finally kill a trial's process."""
    total = sum(len(result.epochs) for result in uninterrupted.trials)
    moments = sorted(random.Random(SEED).sample(range(1, total * 2 // 3), 2))
    finished = {}
    for turn, min_epochs in enumerate(moments):
        job = start("tune.py", folder / "killed.yml", cluster.environment)
        wait_for_epochs(root, min_epochs, job)
        os.kill(job.process.pid, signal.SIGKILL)
        job.process.wait(timeout=60)
        ended = [result for result in collect_sweep(root, "killed").trials if result.trial.is_over]
        finished |= {result.trial.name: [row["time"] for row in result.epochs] for result in ended}
        if turn == 1:
            kill(cluster.head)
    cluster.stop()
    another = Cluster(folder, dashboard=True)
    try:
        job = start("tune.py", folder / "killed.yml", another.environment, "--resume")
        wait_for(lambda: kill_a_trial(another), job.process, job.log)
        job.end()
    finally:
        another.stop()
    return Killed(collect_sweep(root, "killed"), finished)


def epochs(sweep: results.SweepResult) -> list[list[tuple]]:
    keys = ("epoch", "train_loss", "val_accuracy")
    return [[tuple(row[key] for key in keys) for row in result.epochs] for result in sweep.trials]


def trial_states(sweep: results.SweepResult) -> list[tuple]:
    return [
        (result.trial.number, result.trial.name, result.trial.repeats, result.trial.state) for result in sweep.trials
    ]


def test_trials_end_in_the_same_states(uninterrupted: results.SweepResult, killed: Killed):
    assert trial_states(killed.sweep) == trial_states(uninterrupted)


def test_some_trials_are_pruned(uninterrupted: results.SweepResult):
    assert {"complete", "pruned"} == {result.trial.state for result in uninterrupted.trials}


def test_no_trial_has_two_runs(root: str, killed: Killed):
    folders = {path.split("/")[0] for path in storage.list_files(f"{trial_records.sweep_uri(root, 'killed')}/trials")}
    assert sorted(folders) == sorted(result.trial.name for result in killed.sweep.trials)


def test_epochs_equal_those_of_the_uninterrupted_sweep(uninterrupted: results.SweepResult, killed: Killed):
    assert epochs(killed.sweep) == epochs(uninterrupted)


def test_best_trial_is_the_same(uninterrupted: results.SweepResult, killed: Killed):
    assert killed.sweep.best.trial == uninterrupted.best.trial
    assert killed.sweep.best.accuracy == uninterrupted.best.accuracy


def test_finished_trials_are_not_trained_again(killed: Killed):
    """Compare the recorded times of epochs."""
    assert killed.finished
    after = {result.trial.name: [row["time"] for row in result.epochs] for result in killed.sweep.trials}
    assert {name: after[name] for name in killed.finished} == killed.finished
