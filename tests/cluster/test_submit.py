"""A job submitted to a Ray cluster with token authentication, as on AWS."""

import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.clusters import RAY, free_port, kill

REPO = Path(__file__).parents[2]


class Head(NamedTuple):
    """A running head node and how to talk to it."""

    url: str
    token: str


def environment(token: str | None, home: Path) -> dict[str, str]:
    """Without the address of any other cluster, and without any token but this one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    given = {} if token is None else {"RAY_AUTH_TOKEN": token}
    # A job's `python` is the one on the head's PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token", **given}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """`ray start --head` on loopback with a token, on ports of its own."""
    token, port, gcs = secrets.token_hex(32), free_port(), free_port()
    home = tmp_path_factory.mktemp("head")
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    log = (home / "head.log").open("w")
    process = subprocess.Popen(
        command, env=environment(token, home), start_new_session=True, stdout=log, stderr=subprocess.STDOUT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, token, process, home / "head.log")
        yield Head(url, token)
    finally:
        kill(process)


def wait_until_up(url: str, token: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while status(f"{url}/api/jobs/", token) != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def status(url: str, token: str | None) -> int:
    """The HTTP status of a request; 0 when nobody answers."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def submit(head: Head, token: str | None, home: Path, *job: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--address", head.url, "--working-dir", str(REPO), "--", *job]
    return subprocess.run(command, env=environment(token, home), capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def submitted(head: Head, photos_folder: Path, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """An ingest job with the token, and its root."""
    root = tmp_path_factory.mktemp("submitted")
    config_file = "jobs/experiments/sample.yml"
    places = ["--photos", f"{photos_folder}/photos", "--labels", f"{photos_folder}/labels.csv", "--root", str(root)]
    job = ["python", "jobs/ingest.py", "--config", config_file, *places]
    return submit(head, head.token, tmp_path_factory.mktemp("with-token"), *job), root


def test_a_submitted_job_succeeds(submitted):
    done, _ = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout


def test_a_submitted_job_publishes_its_dataset(submitted):
    _, root = submitted
    assert (root / "datasets" / "v1" / "manifest.json").exists()


def test_a_user_mistake_fails_the_job(head: Head, tmp_path: Path):
    done = submit(head, head.token, tmp_path, "python", "jobs/ingest.py", "--config", "no-such-file.yml")
    assert done.returncode != 0
    assert "config file no-such-file.yml" in done.stdout + done.stderr


def test_a_submission_without_the_token_is_refused(head: Head, tmp_path: Path):
    assert submit(head, None, tmp_path, "python", "-c", "print('hello')").returncode != 0


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "wrong"])
def test_the_job_api_answers_nobody_without_the_token(head: Head, token: str | None):
    assert status(f"{head.url}/api/jobs/", token) in (401, 403)
