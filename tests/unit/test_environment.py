"""Code version, libraries and device of a run, as lineage.json has them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from carclass.cluster import job_submission
from carclass.cluster.job_submission import Submission
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.runs.environment import CODE_VERSION, code_version, record_environment
from carclass.runs.run import Run, begin_run, copy_stage

REPO = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    settings = TrainSettings(name="first", parent="sample")
    return begin_run(Run(str(tmp_path), settings), dataset.Dataset("", {}), "0" * 64)


def test_a_run_records_its_start_and_code(run: Run):
    lineage = run.lineage()
    assert lineage["started"][:2] == "20"
    assert lineage["code"] == code_version() != "unknown"


def test_a_stage_records_device_and_libraries(run: Run):
    record_environment(run.uri, "frozen", CPU, "fp32")
    (environment,) = run.lineage()["environments"]
    assert environment == {
        "stage": "frozen",
        "device": "CPU",
        "precision": "fp32",
        "code": code_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ray": metadata.version("ray"),
    }


def test_a_resumed_stage_is_recorded_once_unless_its_environment_differs(run: Run, monkeypatch: pytest.MonkeyPatch):
    for _ in range(2):
        record_environment(run.uri, "frozen", CPU, "fp32")
    monkeypatch.setattr(torch, "__version__", "9.9")
    record_environment(run.uri, "frozen", CPU, "fp32")
    record_environment(run.uri, "unfrozen", CPU, "fp32")
    assert [(each["stage"], each["torch"] == "9.9") for each in run.lineage()["environments"]] == [
        ("frozen", False),
        ("frozen", True),
        ("unfrozen", True),
    ]


def test_a_copied_stage_has_the_environment_it_was_trained_in(run: Run, tmp_path: Path):
    other = Run(str(tmp_path / "other"), run.settings)
    begin_run(other, dataset.Dataset("", {}), "0" * 64)
    record_environment(run.uri, "frozen", CPU, "fp32")
    for suffix in (".safetensors", ".json"):
        path = Path(run.model_uri("frozen") + suffix)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    copy_stage(other, run, "frozen")
    assert other.lineage()["environments"] == run.lineage()["environments"]


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package, outside of any checkout."""
    shutil.copytree(REPO / "carclass", tmp_path / "copy" / "carclass", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def version_in(folder: Path, **variables: str) -> str:
    code = "from carclass.runs.environment import code_version; print(code_version())"
    environment = {**os.environ, **variables, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


def test_a_copy_of_the_code_has_the_version_it_was_submitted_with(copied_package: Path):
    assert version_in(copied_package, **{CODE_VERSION: "0123456789ab+"}) == "0123456789ab+"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_project_around_the_package_is_not_taken_for_its_version(copied_package: Path):
    options = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init", "-q"], [*options, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=copied_package.parent, check=True)
    assert version_in(copied_package, **{CODE_VERSION: "0123456789ab"}) == "0123456789ab"


class RecordingClient:
    """Client of Ray's job API that records a submission."""

    def list_jobs(self) -> Iterator[Any]:
        return iter(())

    def submit_job(self, **options: Any) -> str:
        self.options = options
        return "id"


def test_a_submitted_job_gets_the_code_version(tmp_path: Path):
    client: Any = RecordingClient()
    submission = Submission(["python", "x.py"], {}, {CODE_VERSION: "0123456789ab"}, "digest")
    job_submission._submit(client, "id", submission)
    assert client.options["runtime_env"]["env_vars"] == {CODE_VERSION: "0123456789ab"}
