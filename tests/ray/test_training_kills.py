"""A stage that loses a worker, its controller, a node or its storage, or is told to leave, ends as if undisturbed.

To the bit with as many workers; to within the order of sums with others. Real Ray Train, a small network.
"""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import yaml

from carclass import storage
from carclass.config.schema import IngestSettings, TrainSettings
from carclass.data import dataset
from carclass.ingestion.ingest import ingest_photos
from carclass.runs.run import Run, find_run, run_uri
from carclass.training import checkpoint
from carclass.training.train import train_run
from tests.helpers.busy_s3 import Proxy
from tests.helpers.clusters import Cluster, Job, below, start, titled

EPOCHS = 8
OUTAGE = 60.0  # seconds
TRAIN: dict[str, Any] = {
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": None,
    # Photos nearly black or gray make more of rounding than the comparison of other workers could bear.
    "unfrozen": {"epochs": EPOCHS, "batch_size": 8, "lr": 1e-3, "appearance": False},
    "precision": "fp32",
    "checkpoint_steps": 1,
}


def train(root: str, name: str, **changes: Any) -> Run:
    return train_run(root, TrainSettings(**{**TRAIN, "name": name, **changes}))


def losses(run: Run) -> list[tuple[int, int, float]]:
    """Of every step of every epoch."""
    rows = [(epoch, row["step"], row["loss"]) for epoch in range(1, EPOCHS + 1) for row in run.steps("unfrozen", epoch)]
    assert [row["epoch"] for row in run.metrics()] == list(range(1, EPOCHS + 1))
    return rows


def trained(run: Run) -> str:
    """The hash of what was published."""
    return storage.sha256(storage.read_bytes(f"{run.best('unfrozen')}.safetensors"))


def reached(root: str, name: str, wanted: str) -> bool:
    return checkpoint.names(f"{run_uri(root, name)}/unfrozen")[-1:] >= [wanted]


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
def undisturbed(root: str) -> Run:
    return train(root, "undisturbed", num_workers=2)


def assert_same(one: Run, other: Run) -> None:
    assert losses(one) == losses(other)
    assert trained(one) == trained(other)


def test_a_killed_worker_leaves_no_trace(root: str, undisturbed: Run, caplog: pytest.LogCaptureFixture):
    name = f"killed-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002-00000008", "ray::RayTrainWorker", signal.SIGKILL)
    run = train(root, name, num_workers=undisturbed.settings.num_workers)
    assert struck()
    assert "workers were lost" in caplog.text
    assert_same(run, undisturbed)


def test_a_killed_controller_leaves_no_trace(root: str, undisturbed: Run, caplog: pytest.LogCaptureFixture):
    name = f"controller-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002-00000008", "ray::TrainController", signal.SIGKILL)
    run = train(root, name, num_workers=undisturbed.settings.num_workers)
    assert struck()
    assert "workers were lost" in caplog.text
    assert_same(run, undisturbed)


def test_a_worker_told_to_end_saves_where_it_is(root: str, undisturbed: Run, caplog: pytest.LogCaptureFixture):
    """Without other checkpoints to go on from, so that it can only be that of its leaving."""
    name = f"told-{uuid4().hex[:8]}"
    struck = strike(root, name, "epoch-0002", "ray::RayTrainWorker", signal.SIGTERM)
    run = train(root, name, num_workers=undisturbed.settings.num_workers, checkpoint_steps=1000)
    assert struck()
    assert "workers left; going on from epoch-000" in caplog.text
    assert_same(run, undisturbed)


# Other workers


def interrupt(root: str, name: str, wanted: str) -> None:
    """As Ctrl-C does, as soon as a checkpoint is there."""

    def wait() -> None:
        while not reached(root, name, wanted):
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def assert_close(root: str, name: str, other: Run) -> None:
    found, expected = np.array(losses(find_run(root, name))), np.array(losses(other))
    np.testing.assert_array_equal(found[:, :2], expected[:, :2])
    # Sums in another order round differently, and every step makes more of it; another photo would make 0.1 at once.
    np.testing.assert_allclose(found[:20, 2], expected[:20, 2], rtol=1e-3)
    np.testing.assert_allclose(found[20:, 2], expected[20:, 2], rtol=2e-2)


def test_workers_may_change_from_one_to_two_and_back(root: str, undisturbed: Run):
    """And compute their shares in pieces, while the undisturbed run does not."""
    name, pieces = f"changed-{uuid4().hex[:8]}", {**TRAIN["unfrozen"], "micro_batch_size": 3}
    for num_workers, until in ((1, "epoch-0002-00000008"), (2, "epoch-0005-00000008")):
        interrupt(root, name, until)
        with pytest.raises(SystemExit):  # as Ray Train ends a job that is interrupted
            train(root, name, num_workers=num_workers, unfrozen=pieces)
    train(root, name, num_workers=1, unfrozen=pieces)
    assert_close(root, name, undisturbed)


# Other machines


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of two CPUs, one of which can be lost; for each test, as Ray Train is slow to see new ones."""
    cluster = Cluster(tmp_path, dashboard=True)
    cluster.add_node()
    yield cluster
    cluster.stop()


def start_training(
    cluster: Cluster, folder: Path, root: str, name: str, num_workers: str, *, epochs: int = EPOCHS, **changes: Any
) -> Job:
    config_file = folder / "train.yml"
    settings = {**TRAIN, "unfrozen": {**TRAIN["unfrozen"], "epochs": epochs}, "name": name, **changes}
    config_file.write_text(yaml.safe_dump({"root": root, "train": settings}))
    return start("train.py", config_file, cluster.environment, "--num_workers", num_workers)


def wait_until(reached: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.005)


def test_training_goes_on_with_fewer_workers_when_a_node_is_lost(
    cluster: Cluster, root: str, undisturbed: Run, tmp_path: Path
):
    name = f"elastic-{uuid4().hex[:8]}"
    job = start_training(cluster, tmp_path, root, name, "[1, 2]")
    wait_until(lambda: reached(root, name, "epoch-0002-00000008"), job)
    cluster.lose_node()
    job.end()
    assert "workers were lost" in job.log.read_text()
    assert_close(root, name, undisturbed)


def test_a_node_that_will_be_taken_away_is_left_in_time(cluster: Cluster, root: str, tmp_path: Path):
    """Without other checkpoints and with very many epochs' time: what it goes on from is what leaving saved."""
    name = f"drained-{uuid4().hex[:8]}"
    cluster.environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    cluster.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # of workers on the node that is taken away
    job = start_training(cluster, tmp_path, root, name, "[1, 2]", epochs=40, checkpoint_steps=1000)
    wait_until(lambda: reached(root, name, "epoch-0002"), job)
    assert cluster.node is not None
    assert titled(below(cluster.node.pid), "ray::RayTrainWorker")
    cluster.node.terminate()  # as when a pod is ended: Ray drains the node
    job.end()
    assert "workers left; going on from epoch" in job.log.read_text()
    assert [row["epoch"] for row in find_run(root, name).metrics()] == list(range(1, 41))


# Storage


def another_clusters_traces() -> str:
    """A folder for Ray in which a killed cluster has left its address."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    return str(folder)


def test_training_outlives_an_outage_of_its_storage(
    ray_cluster: str,
    photos_folder: Path,
    bucket: str,
    proxy: Proxy,
    tmp_path: Path,
):
    root, name = f"s3://{bucket}/root", "outage"
    labels = str(photos_folder / "labels.csv")
    ingest_photos(root, IngestSettings(photos=str(photos_folder / "photos"), labels=labels))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["RAY_TMPDIR"] = another_clusters_traces()
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
    assert "Traceback" not in job.log.read_text()
    losses(find_run(root, name))
    shutil.rmtree(environment["RAY_TMPDIR"])
