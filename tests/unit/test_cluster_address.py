"""Addresses of Ray clusters: a job does not wait for one that is gone, misspelt or of another kind."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import ray
from ray._private import services
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from carclass.cluster import address, job_submission
from carclass.cluster.address import cluster_address
from carclass.cluster.job_submission import Submission
from carclass.config.schema import IngestSettings, TrainSettings
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.training.train import train_run

LOOPBACK = "127.0.0.1"


@pytest.fixture(autouse=True)
def no_ray_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that Ray reads; loopback stays loopback, where the servers of these tests listen."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(services, "get_node_ip_address", lambda: LOOPBACK)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is restored where a test sets it


@pytest.fixture
def silent() -> Iterator[int]:
    """Port of a server that accepts connections and never answers."""
    with socket.create_server((LOOPBACK, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web() -> Iterator[int]:
    """Port of a web server that is no dashboard."""
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    """The answer of a head node."""

    version, code = ray.__version__, None

    def CheckAlive(self, request: object, context: grpc.ServicerContext) -> gcs_service_pb2.CheckAliveReply:  # noqa: N802
        if self.code is not None:
            context.abort(self.code, "wrong token")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)


@pytest.fixture
def head() -> Iterator[tuple[Head, str]]:
    """A server that answers as a head node does, and its address."""
    server, servicer = grpc.server(futures.ThreadPoolExecutor(1)), Head()
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    yield servicer, f"{LOOPBACK}:{port}"
    server.stop(None)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("given", [None, "", "local"])
def test_without_an_address_ray_is_started_locally(monkeypatch: pytest.MonkeyPatch, given: str | None):
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert cluster_address() == "local"


def test_a_cluster_that_answers_is_joined(monkeypatch: pytest.MonkeyPatch, head: tuple[Head, str]):
    monkeypatch.setenv("RAY_ADDRESS", head[1])
    assert cluster_address() == head[1]


@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
def test_a_cluster_that_has_ended_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, host: str):
    monkeypatch.setenv("RAY_ADDRESS", given := f"{host}:{closed_port()}")
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is {given}, but no Ray cluster answers .* or unset RAY_ADDRESS"):
        cluster_address()
    assert time.monotonic() - started < 5


def test_an_unknown_host_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(UserError, match=r"no Ray cluster answers at no-such-host.invalid:6379"):
        cluster_address()


def test_a_host_that_never_answers_is_an_error_after_the_probe(monkeypatch: pytest.MonkeyPatch, silent: int):
    monkeypatch.setattr(address, "PROBE_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", f"{LOOPBACK}:{silent}")
    with pytest.raises(UserError, match=r"no Ray cluster answers"):
        cluster_address()


def test_the_port_of_a_web_server_is_an_error(monkeypatch: pytest.MonkeyPatch, web: int):
    monkeypatch.setenv("RAY_ADDRESS", f"{LOOPBACK}:{web}")
    with pytest.raises(UserError, match=r"no Ray cluster answers"):
        cluster_address()


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ("ray://127.0.0.1:10001", r"Ray Client \(ray://\) is not supported"),
        ("http://127.0.0.1:8265", "a URL: a job joins the cluster by host:port"),
        ("127.0.0.1", "neither host:port, `auto` nor `local`"),
        ("127.0.0.1:", "neither host:port"),
        (":6379", "neither host:port"),
        ("127.0.0.1:port", "neither host:port"),
        ("127.0.0.1:66666", "neither host:port"),
        ("Auto", "neither host:port"),
        ("head 6379", "neither host:port"),
    ],
)
def test_another_kind_of_address_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch, given: str, cause: str):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is {given}, .*{cause}.* unset RAY_ADDRESS .*jobs/submit.py"):
        cluster_address()


@pytest.mark.parametrize(("running", "cause"), [([], "none runs"), (["10.0.0.1:1", "10.0.0.1:2"], "several run")])
def test_auto_without_one_cluster_on_the_machine_is_an_error(
    monkeypatch: pytest.MonkeyPatch, running: list[str], cause: str
):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set(running))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    if running:
        monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda *_, **__: None)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is auto, the cluster on this machine, but {cause}"):
        cluster_address()


def test_a_cluster_of_another_version_is_an_error(monkeypatch: pytest.MonkeyPatch, head: tuple[Head, str]):
    head[0].version = "2.9.0"
    monkeypatch.setenv("RAY_ADDRESS", head[1])
    with pytest.raises(UserError, match=rf"a cluster of Ray 2.9.0, and this environment has Ray {ray.__version__}"):
        cluster_address()


def test_a_cluster_that_refuses_the_token_is_an_error(monkeypatch: pytest.MonkeyPatch, head: tuple[Head, str]):
    head[0].code = grpc.StatusCode.UNAUTHENTICATED
    monkeypatch.setenv("RAY_ADDRESS", head[1])
    with pytest.raises(
        UserError, match=rf"{head[1]} refuses the token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"
    ):
        cluster_address()


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("RAY_AUTH_TOKEN_PATH", "asks for a token, and RAY_AUTH_TOKEN_PATH is {file}, which is no file"),
        ("HOME", "refuses the token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"),
    ],
)
def test_a_missing_token_is_an_error(tmp_path: Path, head: tuple[Head, str], variable: str, message: str):
    """In a process of its own, as Ray reads its token once."""
    token = {"RAY_ADDRESS": head[1], "RAY_AUTH_MODE": "token", variable: f"{tmp_path}/none"}
    code = "from carclass.cluster.address import cluster_address; cluster_address()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **token}, capture_output=True, text=True)
    assert message.format(file=f"{tmp_path}/none") in done.stderr.splitlines()[-1]


def ingest(root: str) -> None:
    ingest_photos(root, IngestSettings(photos="sample"))


def train(root: str) -> None:
    train_run(root, TrainSettings(name="one", parent="s3://bucket/large.safetensors"))


@pytest.mark.parametrize("job", [ingest, train])
def test_the_cluster_is_checked_before_photos_are_listed_and_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Callable[[str], None]
):
    monkeypatch.setenv("RAY_ADDRESS", f"{LOOPBACK}:{closed_port()}")
    with pytest.raises(UserError, match=r"RAY_ADDRESS is .*, but no Ray cluster answers"):
        job(str(tmp_path))
    assert [*tmp_path.rglob("*.jpg")] == []


# Dashboards, to which jobs are submitted


def test_a_dashboard_that_never_answers_is_an_error_after_the_probe(monkeypatch: pytest.MonkeyPatch, silent: int):
    monkeypatch.setattr(job_submission, "PROBE_S", 0.5)
    with pytest.raises(UserError, match=rf"no cluster answers at http://{LOOPBACK}:{silent}"):
        job_submission.connect(f"http://{LOOPBACK}:{silent}")


def test_a_web_server_that_is_no_dashboard_is_an_error(web: int):
    with pytest.raises(UserError, match=r"no cluster answers at"):
        job_submission.connect(f"http://{LOOPBACK}:{web}")


class DashboardThatHangs(http.server.BaseHTTPRequestHandler):
    """A server that tells Ray's version, and does not answer any other request."""

    def do_GET(self) -> None:
        if self.path == "/api/version":
            body = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": ""}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
        else:
            time.sleep(3)


def test_a_dashboard_that_stops_answering_is_an_error_after_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_submission, "REQUEST_S", 0.5)
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), DashboardThatHangs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, begun = f"http://{LOOPBACK}:{server.server_port}", time.monotonic()
        with pytest.raises(UserError, match=r"no cluster answers at .*timed out"):
            job_submission.submit_and_follow(url, Submission(["python", "-c", ""], {}, {}, "digest"))
        assert time.monotonic() - begun < 2.5
        server.shutdown()


@pytest.mark.parametrize("given", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", "http://"])
def test_a_dashboard_is_given_by_its_url(given: str):
    with pytest.raises(UserError, match=r"give the URL of the cluster's dashboard, such as http://127.0.0.1:8265"):
        job_submission.connect(given)


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_given_is_preferred_to_a_stale_one_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, web: int, name: str
):
    monkeypatch.setenv(name, "http://no-such-host.invalid:8265")
    with pytest.raises(UserError, match=r"no cluster answers") as caught:
        job_submission.connect(url := f"http://{LOOPBACK}:{web}")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == url
    assert "no-such-host" not in str(caught.value.__cause__)
