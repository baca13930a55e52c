"""Networks of timm through all jobs, with published weights from a mirror of the hub."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save

from carclass import storage
from carclass.models.timm_classifier import pretrained_config
from carclass.training import checkpoint
from tests.helpers.weights_server import WeightsServer, serve_weights

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # 200 s: ten jobs, each with a start of its own
JOBS = Path(__file__).parents[2] / "jobs"
NAMES = ["timm:convnext_atto", "timm:resnet18", "timm:vit_tiny_patch16_224"]


@pytest.fixture(scope="module")
def mirror() -> Iterator[WeightsServer]:
    """Serve random weights of all three networks, with their classifiers."""
    with serve_weights() as server:
        for name in NAMES:
            torch.manual_seed(3)
            state = timm.create_model(name.removeprefix("timm:")).state_dict()
            server.files[f"/{pretrained_config(name).hf_hub_id}/resolve/main/model.safetensors"] = save(state)
        yield server


class Project:
    """A folder with a config file, and its jobs."""

    def __init__(self, folder: Path, photos: Path, mirror: WeightsServer) -> None:
        self.folder, self.root = folder, folder / "results"
        self.env = {**os.environ, "HF_ENDPOINT": mirror.address, "XDG_CACHE_HOME": str(folder / "cache")}
        self.env.pop("RAY_ADDRESS", None)
        settings = {
            "root": str(self.root),
            "ingest": {"photos": str(photos / "photos"), "labels": str(photos / "labels.csv")},
            "train": {
                "name": "first",
                "dataset": "v1",
                "model": {"architecture": NAMES[0], "image_size": 64},
                "frozen": {"epochs": 3, "views": 2},
                "unfrozen": {"epochs": 6, "batch_size": 16},
                "checkpoint_seconds": 0,
            },
        }
        self.write("my.yml", settings)

    def write(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(content))

    def start(self, job: str, *options: str, config: str = "my.yml") -> subprocess.Popen:
        command = [sys.executable, str(JOBS / f"{job}.py"), "--config", str(self.folder / config), *options]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.env, start_new_session=True, **pipes)

    def run(self, job: str, *options: str, config: str = "my.yml") -> str:
        started = self.start(job, *options, config=config)
        output, _ = started.communicate(timeout=400)
        assert started.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, photos_folder: Path, mirror: WeightsServer) -> Project:
    """Run the pipeline."""
    made = Project(tmp_path_factory.mktemp("timm"), photos_folder, mirror)
    made.run("pipeline")
    return made


def test_the_backbone_is_the_published_one(project: Project, mirror: WeightsServer):
    (record,) = (project.root / "weights" / "first_use").iterdir()
    path = f"/{pretrained_config(NAMES[0]).hf_hub_id}/resolve/main/model.safetensors"
    assert record.read_text().split() == [storage.sha256(mirror.files[path]), f"{mirror.address}{path}"]
    assert [request for request, _ in mirror.requests].count(path) == 1  # the other steps read the cached file


def test_a_killed_run_ends_with_the_same_weights(project: Project):
    job = project.start("train", "--name", "killed")
    stage = project.root / "experiments" / "killed" / "unfrozen"
    deadline = time.monotonic() + 300
    while checkpoint.resumable_names(str(stage))[-1:] < ["epoch-0002"]:
        assert time.monotonic() < deadline, "no checkpoint before the deadline"
        assert job.poll() is None, "the job ended before it was killed"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    project.run("train", "--name", "killed")
    one, other = (project.root / "experiments" / run / "unfrozen/best.safetensors" for run in ("first", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_new_photos_get_a_class(project: Project, photos_folder: Path):
    folder = project.folder / "new"
    folder.mkdir()
    for path in sorted((photos_folder / "photos").iterdir())[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    project.run("predict", str(folder))
    table = project.root / "experiments/first/predictions/predictions/predictions.csv"
    with table.open() as file:
        assert all(row["label"] for row in csv.DictReader(file))


def test_timm_loads_the_exported_weights(project: Project):
    project.run("export")
    state = storage.read_bytes(str(project.root / "experiments/first/export/model.safetensors"))
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    classes = len(json.loads(header["__metadata__"]["classes"]))
    net = timm.create_model(NAMES[0].removeprefix("timm:"), num_classes=classes)
    assert {name: [*value.shape] for name, value in net.state_dict().items()} == {
        name: entry["shape"] for name, entry in header.items() if name != "__metadata__"
    }


def test_one_sweep_compares_three_networks(project: Project):
    space = {"train.model.architecture": {"choices": NAMES}}
    search = {"name": "backbones", "experiment": "my.yml", "fixed": {"train.unfrozen": None}, "space": space}
    project.write("search.yml", {**search, "num_trials": 2, "num_seeds": 1, "scheduler": "none"})
    project.run("tune", config="search.yml")
    trials = json.loads((project.root / "sweeps/backbones/trials.json").read_text())["trials"]
    assert {trial["values"]["train.model.architecture"] for trial in trials if trial["state"] == "complete"} == {*NAMES}
