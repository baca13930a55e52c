"""Jobs submitted to a Ray cluster with token authentication, and followed to their end."""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from carclass.runs.environment import code_version
from tests.helpers.clusters import RAY, Job, free_port, kill, wait_for
from tests.helpers.tunnel import Tunnel
from tests.helpers.wheels import unpack_wheel

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # 130 s


class Head(NamedTuple):
    """URL and token of a running head node."""

    url: str
    token: str


def environment(token: str | None, home: Path) -> dict[str, str]:
    """Return an environment without other clusters' addresses and tokens."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    tokens = {} if token is None else {"RAY_AUTH_TOKEN": token}
    # A job's `python` is taken from the head's PATH.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environ, "PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token", **tokens}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """Start a head on loopback with a token."""
    with running_head(secrets.token_hex(32), tmp_path_factory.mktemp("head")) as started:
        yield started


@contextmanager
def running_head(token: str, home: Path) -> Iterator[Head]:
    """Run a head on free ports of loopback. home: an empty folder."""
    port, gcs = free_port(), free_port()
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
    """Wait until the job API answers."""
    deadline = time.monotonic() + 120
    while status(f"{url}/api/jobs/", token) != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def status(url: str, token: str | None) -> int:
    """Return the HTTP status of a request, 0 without an answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


SUBMIT = REPO / "jobs" / "submit.py"


def submit(
    url: str,
    token: str | None,
    home: Path,
    *job: str,
    cwd: Path = REPO,
    site: Path | None = None,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """Run jobs/submit.py with options, or `carclass submit` of the package in the folder `site`."""
    env = environment(token, home) | ({} if site is None else {"PYTHONPATH": str(site)})
    program = [SUBMIT] if site is None else ["-m", "carclass", "submit"]
    command = [sys.executable, *program, "--address", url, *options, "--", *job]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def submitted(head: Head, photos_folder: Path, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Submit an ingest job with the token; return the process and the job's root."""
    root = tmp_path_factory.mktemp("submitted")
    config_file = "jobs/experiments/sample.yml"
    options = ["--photos", f"{photos_folder}/photos", "--labels", f"{photos_folder}/labels.csv", "--root", str(root)]
    job = ["python", "jobs/ingest.py", "--config", config_file, *options]
    return submit(head.url, head.token, tmp_path_factory.mktemp("with-token"), *job), root


def test_a_submitted_job_succeeds(submitted):
    done, _ = submitted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCEEDED" in done.stderr


def test_a_submitted_job_publishes_its_dataset(submitted):
    _, root = submitted
    assert (root / "datasets" / "v1" / "manifest.json").exists()


@pytest.fixture(scope="module")
def follow(head: Head, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that submits Python code with the token."""

    def follow(code: str, url: str = head.url) -> subprocess.CompletedProcess:
        return submit(url, head.token, tmp_path_factory.mktemp("home"), "python", "-c", code)

    return follow


@pytest.mark.parametrize("job", [("python", "jobs/mask.py"), ("carclass", "mask")], ids=["script", "command"])
def test_a_user_mistake_fails_the_job_with_its_own_exit_status(head: Head, tmp_path: Path, job: tuple[str, str]):
    config_file = REPO / "build" / "mistake.yml"
    config_file.parent.mkdir(exist_ok=True)
    config_file.write_text("root: /results\nmask: {batch: 1}\n")
    done = submit(head.url, head.token, tmp_path, *job, "--config", "build/mistake.yml")
    config_file.unlink()
    assert done.returncode == 2
    assert "`mask.batch` is not a setting" in done.stdout


def test_the_exit_status_is_the_jobs(follow):
    assert follow("raise SystemExit(7)").returncode == 7


def test_a_submitted_job_has_the_code_version_of_the_checkout(follow):
    code = "from carclass.runs.environment import code_version; print('code version', code_version())"
    assert f"code version {code_version()}\n" in follow(code).stdout


def test_variables_that_configs_name_and_given_ones_travel(head: Head, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CARS196", "s3://bucket/cars")
    monkeypatch.setenv("UNRELATED", "secret")
    code = "import os; print([os.environ.get(name) for name in ('CARS196', 'ONE', 'TWO', 'UNRELATED')])"
    options = ("--env", "ONE=1", "--env", "TWO=a=b c")
    done = submit(head.url, head.token, tmp_path, "python", "-c", code, options=options)
    assert "['s3://bucket/cars', '1', 'a=b c', None]" in done.stdout
    assert "variables of the job: CARS196, ONE, TWO" in done.stderr


@pytest.mark.parametrize("text", ["ONE", "=1", "a b=1"])
def test_a_variable_that_is_not_name_and_value_is_refused(tmp_path: Path, text: str):
    done = submit("http://127.0.0.1:1", None, tmp_path, "python", options=("--env", text))
    assert (done.returncode, done.stderr.startswith(f"error: `--env {text}` is not NAME=VALUE")) == (2, True)


def test_only_code_and_named_files_are_uploaded(head: Head, tmp_path: Path):
    config_file = REPO / "build" / "named.yml"
    config_file.parent.mkdir(exist_ok=True)
    config_file.write_text("root: /here")
    code = "import sys, pathlib; print(sorted(map(str, pathlib.Path().iterdir())), open(sys.argv[1]).read())"
    done = submit(head.url, head.token, tmp_path, "python", "-c", code, "build/named.yml")
    config_file.unlink()
    assert "['build', 'carclass', 'jobs'] root: /here" in done.stdout


def test_an_installed_package_submits_its_code_and_a_config_of_the_working_directory(head: Head, tmp_path: Path):
    (tmp_path / "mine.yml").write_text("root: /results\nmask: {batch: 1}\n")
    site = unpack_wheel(tmp_path)
    job = ("carclass", "mask", "--config", "mine.yml")
    done = submit(head.url, head.token, tmp_path, *job, cwd=tmp_path, site=site)
    assert done.returncode == 2
    assert "error: mine.yml: `mask.batch` is not a setting" in done.stdout


def test_a_config_named_by_an_absolute_path_is_refused(head: Head, tmp_path: Path):
    (tmp_path / "mine.yml").write_text("root: here")
    job = ("carclass", "train", "--config", str(tmp_path / "mine.yml"))
    done = submit(head.url, head.token, tmp_path, *job, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("by its path in the working directory. Write mine.yml.\n")


def test_a_config_outside_the_checkout_is_refused(head: Head, tmp_path: Path):
    (tmp_path / "mine.yml").write_text("root: here")
    done = submit(head.url, head.token, tmp_path, "python", "jobs/train.py", "--config", str(tmp_path / "mine.yml"))
    assert done.returncode == 2
    assert "would not be uploaded. Move it there" in done.stderr


COUNT = """
import pathlib, time
for i in range(20):
    print("line", i, flush=True)
    pathlib.Path({started!r}).touch()
    time.sleep(0.25)
raise SystemExit(3)
"""


def cut_once_started(tunnel: Tunnel, started: Path) -> None:
    """Close the tunnel's connections a second after a file appears."""
    while not started.exists():
        time.sleep(0.05)
    time.sleep(1)  # in the middle of the log
    tunnel.cut()


def test_a_lost_connection_loses_no_line_and_no_exit_status(head: Head, follow, tmp_path: Path):
    host, port = head.url.removeprefix("http://").split(":")
    with Tunnel(0, None, (host, int(port))) as tunnel:
        threading.Thread(target=tunnel.serve_forever, daemon=True).start()
        started = tmp_path / "started"
        threading.Thread(target=cut_once_started, args=(tunnel, started), daemon=True).start()
        done = follow(COUNT.format(started=str(started)), tunnel.url)
        tunnel.shutdown()
    assert done.returncode == 3
    assert "lost the connection" in done.stderr
    assert [line for line in done.stdout.splitlines() if line[:4] == "line"] == [f"line {i}" for i in range(20)]


WAIT = """
import pathlib, time
pathlib.Path({started!r}).open("a").write("x")
while not pathlib.Path({end!r}).exists():
    time.sleep(0.1)
"""


def test_a_job_that_a_new_head_does_not_know_is_an_error_at_once(head: Head, follow, tmp_path: Path):
    """It costs another head: 20 s."""
    host, port = head.url.removeprefix("http://").split(":")
    (tmp_path / "new").mkdir()
    with running_head(head.token, tmp_path / "new") as new, Tunnel(0, None, (host, int(port))) as tunnel:
        threading.Thread(target=tunnel.serve_forever, daemon=True).start()
        new_host, new_port = new.url.removeprefix("http://").split(":")

        def replace_head() -> None:
            while not (tmp_path / "started").exists():
                time.sleep(0.05)
            tunnel.target = (new_host, int(new_port))
            tunnel.cut()

        threading.Thread(target=replace_head, daemon=True).start()
        done = follow(WAIT.format(started=str(tmp_path / "started"), end=str(tmp_path / "end")), tunnel.url)
        tunnel.shutdown()
    (tmp_path / "end").touch()
    assert done.returncode == 2
    assert "its head was started anew, and the job is lost" in done.stderr


def start_submit(head: Head, home: Path, *job: str, options: Sequence[str] = ()) -> Job:
    """Submit a job in the background."""
    home.mkdir()
    log = home / "submit.log"
    command = [sys.executable, SUBMIT, "--address", head.url, *options, "--", *job]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment(head.token, home), cwd=REPO, stdout=out, stderr=out)
    return Job(process, log)


def test_the_same_command_follows_the_running_job(head: Head, tmp_path: Path):
    marker = tmp_path / "started"
    job = ("python", "-c", WAIT.format(started=str(marker), end=str(tmp_path / "end")))
    first = start_submit(head, tmp_path / "first", *job)
    wait_for(marker.exists, *first)
    again = start_submit(head, tmp_path / "again", *job)
    wait_for(lambda: "already running" in again.log.read_text(), *again)
    (tmp_path / "end").touch()
    first.end()
    again.end()
    assert marker.read_text() == "x"


@pytest.mark.parametrize("changed", ["variable", "file"])
def test_the_same_command_with_other_inputs_is_another_job(head: Head, tmp_path: Path, changed: str):
    config, end = REPO / "build" / "inputs.yml", tmp_path / "end"
    config.parent.mkdir(exist_ok=True)
    config.write_text("root: /here")
    code = "import os, sys, pathlib, time; print('got', os.environ['ONE'], open(sys.argv[1]).read(), flush=True)\n"
    code += WAIT.format(started=str(tmp_path / "started"), end=str(end))
    job = ("python", "-c", code, "build/inputs.yml")
    first = start_submit(head, tmp_path / "first", *job, options=("--env", "ONE=1"))
    wait_for((tmp_path / "started").exists, *first)
    if changed == "file":
        config.write_text("root: /there")
    other = start_submit(
        head, tmp_path / "other", *job, options=("--env", "ONE=2" if changed == "variable" else "ONE=1")
    )
    expected = "got 2 root: /here" if changed == "variable" else "got 1 root: /there"
    wait_for(lambda: expected in other.log.read_text(), *other)
    end.touch()
    first.end()
    other.end()
    config.unlink()
    assert "but with other files or variables; this is another job" in other.log.read_text()


INTERRUPTED = """
import runpy, sys
from ray.job_submission import JobSubmissionClient
submit = JobSubmissionClient.submit_job
def interrupted(*args, **options):
    submit(*args, **options)
    raise KeyboardInterrupt
JobSubmissionClient.submit_job = interrupted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_while_a_job_is_submitted_tells_its_id(head: Head, tmp_path: Path):
    command = [sys.executable, "-c", INTERRUPTED, str(SUBMIT), "--address", head.url, "--", "python", "-c", "pass"]
    done = subprocess.run(command, env=environment(head.token, tmp_path), cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 130
    assert re.search(
        r"the job may have been submitted.*`ray job stop --address \S+ carclass-[\w-]+` stops it", done.stderr
    )


def test_a_failed_job_is_not_followed_by_its_log_again(follow):
    done = follow("print('the cause'); raise SystemExit(3)")
    assert (done.stdout + done.stderr).count("the cause\n") == 1
    assert "ended: FAILED Job entrypoint command failed with exit code 3" in done.stderr


def test_a_missing_token_file_is_named(head: Head, tmp_path: Path):
    env = environment(None, tmp_path) | {"RAY_AUTH_TOKEN_PATH": "/nosuch/token"}
    command = [sys.executable, SUBMIT, "--address", head.url, "--", "python", "-c", "pass"]
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, "RAY_AUTH_TOKEN_PATH is /nosuch/token, which is no file" in done.stderr) == (2, True)


def test_the_command_that_ctrl_c_prints_stops_the_job(head: Head, tmp_path: Path):
    marker = tmp_path / "started"
    job = start_submit(
        head, tmp_path / "first", "python", "-c", WAIT.format(started=str(marker), end=str(tmp_path / "end"))
    )
    wait_for(marker.exists, *job)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=60) == 130
    (command,) = re.findall(r"`(ray job stop [^`]+)`", job.log.read_text())
    arguments = shlex.split(command)[1:]
    done = subprocess.run([RAY, *arguments], env=environment(head.token, tmp_path), capture_output=True, check=False)
    (tmp_path / "end").touch()
    assert done.returncode == 0, done.stderr


def test_a_submission_without_the_token_is_refused(head: Head, tmp_path: Path):
    done = submit(head.url, None, tmp_path, "python", "-c", "print('hello')")
    assert done.returncode == 2
    assert "token" in done.stderr


def test_a_missing_cluster_is_reported(tmp_path: Path):
    done = submit(f"http://127.0.0.1:{free_port()}", "0" * 64, tmp_path, "python", "-c", "print('hello')")
    assert done.returncode == 2
    assert re.search(r"no cluster answers at \S+ \(Connection refused\)", done.stderr)


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "wrong"])
def test_the_job_api_refuses_requests_without_the_token(head: Head, token: str | None):
    assert status(f"{head.url}/api/jobs/", token) in (401, 403)
