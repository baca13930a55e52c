"""A killed training job is resumed when it is run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from carclass.config.schema import IngestSettings
from carclass.ingestion.ingest import ingest_photos
from carclass.training import checkpoint
from tests.helpers.clusters import descendants, find_by_title

EPOCHS = 12
JOBS = Path(__file__).parents[2] / "jobs"


def start(config_file: Path) -> subprocess.Popen:
    command = [sys.executable, str(JOBS / "train.py"), "--config", str(config_file)]
    # In a new session: killing its group also kills Ray's processes, as the loss of a machine does.
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def wait_for_checkpoint(stage: Path, epoch: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not (names := checkpoint.resumable_names(str(stage))) or int(names[-1].split("-")[1]) < epoch:
        assert time.monotonic() < deadline, "no checkpoint before the deadline"
        assert job.poll() is None, "the job ended before it was killed"
        time.sleep(0.05)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
]  # 90 s: a job is started twice, each time with a cluster of its own


@pytest.fixture(scope="module")
def killed_and_resumed(ray_cluster, photos_folder: Path, tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """Return the metrics up to the newest checkpoint at the kill, and at the end of the second run."""
    root = tmp_path_factory.mktemp("resume")
    photos, labels = str(photos_folder / "photos"), str(photos_folder / "labels.csv")
    ingest_photos(str(root), IngestSettings(photos=photos, labels=labels))
    config_file = root / "train.yml"
    train = {
        "name": "killed",
        "dataset": "v1",
        "parent": "sample",
        "model": {"architecture": "resnet26-narrow", "image_size": 64},
        "frozen": None,
        "unfrozen": {"epochs": EPOCHS, "batch_size": 8},
        "checkpoint_seconds": 0,
    }
    config_file.write_text(yaml.safe_dump({"root": str(root), "train": train}))
    metrics = root / "experiments" / "killed" / "metrics.jsonl"
    job = start(config_file)
    wait_for_checkpoint(root / "experiments" / "killed" / "unfrozen", 3, job)
    assert not find_by_title(descendants(job.pid), "ray::RayTrainWorker")  # one worker trains in the job's process
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    newest = checkpoint.resumable_names(str(root / "experiments" / "killed" / "unfrozen"))[-1]
    before = [json.loads(line) for line in metrics.read_text().splitlines()][: int(newest.split("-")[1])]
    assert start(config_file).wait(timeout=400) == 0
    return before, [json.loads(line) for line in metrics.read_text().splitlines()]


def test_the_job_is_killed_between_epochs(killed_and_resumed):
    before, _ = killed_and_resumed
    assert 3 <= len(before) < EPOCHS


def test_every_epoch_has_one_row(killed_and_resumed):
    _, after = killed_and_resumed
    assert [row["epoch"] for row in after] == list(range(1, EPOCHS + 1))


def test_checkpointed_epochs_are_not_repeated(killed_and_resumed):
    before, after = killed_and_resumed
    assert after[: len(before)] == before
