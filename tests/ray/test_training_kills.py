"""A stage that loses a worker, its controller or its storage, or is told to leave, ends as if nothing had happened.

To the bit. Real Ray Train, a small network.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from carclass import config, dataset, ingest, lineage, storage
from carclass.training import checkpoint, stages
from tests.busy_s3 import Proxy
from tests.clusters import Job, below, start, titled

EPOCHS = 8
OUTAGE = 15.0  # seconds
TRAIN: dict[str, Any] = {
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": None,
    "unfrozen": {"epochs": EPOCHS, "batch_size": 8, "lr": 1e-3},
    "precision": "fp32",
    "checkpoint_steps": 1,
}


def train(root: str, name: str, **changes: Any) -> lineage.Run:
    return stages.run(root, config.Train(**{**TRAIN, "name": name, **changes}))


def losses(run: lineage.Run) -> list[tuple[int, int, float]]:
    """Of every step of every epoch."""
    rows = [(epoch, row["step"], row["loss"]) for epoch in range(1, EPOCHS + 1) for row in run.steps("unfrozen", epoch)]
    assert [row["epoch"] for row in run.metrics()] == list(range(1, EPOCHS + 1))
    return rows


def trained(run: lineage.Run) -> str:
    """The hash of what was published."""
    return storage.sha256(storage.read_bytes(f"{run.best('unfrozen')}.safetensors"))


def reached(root: str, name: str, wanted: str) -> bool:
    return checkpoint.names(f"{lineage.place(root, name)}/unfrozen")[-1:] >= [wanted]


def strike(root: str, name: str, wanted: str, victim: str, number: int) -> Callable[[], int]:
    """Sends a signal to one of our processes as soon as a checkpoint is there; returns what tells its id."""
    struck: list[int] = []

    def wait() -> None:
        while not reached(root, name, wanted):
            time.sleep(0.005)
        struck.append(titled(below(os.getpid()), victim)[-1])
        os.kill(struck[0], number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return lambda: (thread.join(timeout=1), struck[0])[1]


@pytest.fixture(scope="module")
def root(ingested: dataset.Dataset) -> str:
    return ingested.uri.rsplit("/", 2)[0]


@pytest.fixture(scope="module")
def undisturbed(root: str) -> lineage.Run:
    return train(root, "undisturbed", num_workers=2)


def assert_same(one: lineage.Run, other: lineage.Run) -> None:
    assert losses(one) == losses(other)
    assert trained(one) == trained(other)


def test_a_killed_worker_leaves_no_trace(root: str, undisturbed: lineage.Run, caplog: pytest.LogCaptureFixture):
    name = f"killed-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002-00000008", "ray::RayTrainWorker", signal.SIGKILL)
    run = train(root, name, num_workers=undisturbed.settings.num_workers)
    assert struck()
    assert "workers were lost" in caplog.text
    assert_same(run, undisturbed)


def test_a_killed_controller_leaves_no_trace(root: str, undisturbed: lineage.Run, caplog: pytest.LogCaptureFixture):
    name = f"controller-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002-00000008", "ray::TrainController", signal.SIGKILL)
    run = train(root, name, num_workers=undisturbed.settings.num_workers)
    assert struck()
    assert "workers were lost" in caplog.text
    assert_same(run, undisturbed)


def test_a_worker_told_to_end_saves_where_it_is(root: str, undisturbed: lineage.Run, caplog: pytest.LogCaptureFixture):
    """Without checkpoints within epochs, so that the one it goes on from can only be that of its leaving."""
    name = f"told-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002", "ray::RayTrainWorker", signal.SIGTERM)
    run = train(root, name, num_workers=undisturbed.settings.num_workers, checkpoint_steps=None)
    assert struck()
    assert "workers left; going on from epoch-000" in caplog.text
    assert_same(run, undisturbed)


# Storage


def wait_until(reached: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.005)


def test_training_outlives_an_outage_of_its_storage(
    ray_cluster: str,
    photos_folder: Path,
    bucket: str,
    proxy: Proxy,
    tmp_path: Path,
):
    root, name = f"s3://{bucket}/root", "outage"
    labels = str(photos_folder / "labels.csv")
    ingest.run(root, config.Ingest(photos=str(photos_folder / "photos"), labels=labels))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    config_file = tmp_path / "train.yml"
    config_file.write_text(yaml.safe_dump({"root": root, "train": {**TRAIN, "name": name}}))
    job = start("train.py", config_file, environment)
    wait_until(lambda: reached(root, name, "epoch-0001"), job)
    proxy.share = 1.0
    time.sleep(OUTAGE)
    proxy.share = 0.0
    job.end()
    assert proxy.refused > 0
    assert "workers were lost" not in job.log.read_text()
    losses(lineage.load(root, name))
