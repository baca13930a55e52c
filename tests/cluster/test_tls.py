"""Ports of Ray's nodes: TLS with the certificates of cluster/image/certificates.py, and the token for HTTP."""

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.image import certificates
from tests.helpers.clusters import RAY, Cluster, descendants, find_by_title

SCRIPT = Path(certificates.__file__)
NAME = "*.carclass.svc.cluster.local"
JOB = """
import ray
ray.init()

@ray.remote(num_cpus=2)  # all of a node
class Worker:
    def work(self, data):
        return ray.get_runtime_context().get_node_id(), len(data)

data = ray.put(bytes(20_000_000))  # the second node pulls it from the head's object store
workers = [Worker.remote() for _ in range(2)]
nodes, sizes = zip(*ray.get([worker.work.remote(data) for worker in workers]))
print("nodes", len(set(nodes)), "sizes", set(sizes))
"""


def variables(folder: Path) -> dict[str, str]:
    files = {"SERVER_CERT": "node.crt", "SERVER_KEY": "node.key", "CA_CERT": "ca.crt"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(folder / "node" / file) for name, file in files.items()}


def create_node(folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Create a node's certificate by the authority in the folder, as nodes do."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= variables(folder) | changes
    command = [sys.executable, SCRIPT, "node", folder, NAME]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority and, in `node`, a node's files."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run([sys.executable, SCRIPT, "authority", folder], check=True)
    assert create_node(folder).returncode == 0
    return folder


def test_a_nodes_certificate_is_for_its_address_loopback_and_its_names(folder: Path):
    certificate = certificates.read_certificate(folder / "node" / "node.crt")
    certificate.verify_directly_issued_by(certificates.read_certificate(folder / "ca.crt"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = {str(each) for each in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {certificates.node_address(), "127.0.0.1"}
    assert names.get_values_for_type(x509.DNSName) == ["localhost", NAME]


def test_a_nodes_certificate_cannot_sign_others(folder: Path):
    extensions = certificates.read_certificate(folder / "node" / "node.crt").extensions
    assert x509.BasicConstraints not in {type(each.value) for each in extensions}


def test_only_their_owner_reads_the_files_and_the_node_does_not_get_the_authoritys_key(folder: Path):
    assert sorted(path.name for path in (folder / "node").iterdir()) == ["ca.crt", "node.crt", "node.key"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (folder / "node").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("days", "kept"), [(31, True), (29, False)])
def test_an_authority_is_replaced_a_month_before_its_end(tmp_path: Path, days: int, kept: bool):
    certificates.create_authority(tmp_path, timedelta(days=days))
    before = (tmp_path / "ca.crt").read_bytes()
    certificates.create_authority(tmp_path)
    assert ((tmp_path / "ca.crt").read_bytes() == before) == kept


def test_an_authority_at_its_end_signs_nothing(tmp_path: Path):
    certificates.create_authority(tmp_path, timedelta(days=1))
    done = create_node(tmp_path)
    assert done.returncode == 1
    assert "Create it again." in done.stderr
    assert not (tmp_path / "node").exists()


def test_a_node_without_the_authority_is_refused(tmp_path: Path):
    done = create_node(tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} has no ca.key. Create it with certificates.py authority." in done.stderr


def test_without_tls_a_node_needs_no_authority(tmp_path: Path):
    assert create_node(tmp_path, RAY_USE_TLS="0").returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a head and a second node with a token and TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")  # the head's `python` is the job's
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), dashboard=True, variables=variables(folder))
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow  # 30 s
def test_a_job_uses_both_nodes(cluster: Cluster, tmp_path: Path):
    """The client needs the token only: it speaks with the dashboard."""
    (tmp_path / "job.py").write_text(JOB)
    environ = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_TLS_")}
    command = [RAY, "job", "submit", "--working-dir", tmp_path, "--", "python", "job.py"]
    done = subprocess.run(
        command, env={**environ, "RAY_USE_TLS": "0"}, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes 2 sizes {20000000}" in done.stdout


def is_accepted(channel: grpc.Channel, seconds: float = 5) -> bool:
    """Return True if a connection to Ray's GCS is established."""
    try:
        grpc.channel_ready_future(channel).result(timeout=seconds)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def client(authority: Path, end: datetime) -> tuple[bytes, bytes]:
    """Return a new client's key and certificate."""
    private = ec.generate_private_key(ec.SECP256R1())
    return certificates.pem(private), certificates.sign_node(authority, private, ["127.0.0.1"], [], end)


@pytest.mark.slow
def test_only_clients_with_a_valid_certificate_of_the_authority_are_accepted(
    cluster: Cluster, folder: Path, tmp_path: Path
):
    certificates.create_authority(tmp_path)  # of another cluster
    address, roots = f"127.0.0.1:{cluster.port}", (folder / "ca.crt").read_bytes()
    future, past = (datetime.now(UTC) + timedelta(minutes=minutes) for minutes in (30, -30))
    valid = grpc.ssl_channel_credentials(roots, *client(folder, future))
    assert is_accepted(grpc.secure_channel(address, valid), 60)
    refused = {"expired": client(folder, past), "foreign": client(tmp_path, future), "none": ()}
    for name, pair in refused.items():
        credentials = grpc.ssl_channel_credentials(roots, *pair)
        assert not is_accepted(grpc.secure_channel(address, credentials)), name
    assert not is_accepted(grpc.insecure_channel(address))


@pytest.mark.slow
def test_clients_refuse_a_server_under_a_name_that_its_certificate_lacks(cluster: Cluster, folder: Path):
    own = client(folder, datetime.now(UTC) + timedelta(minutes=30))
    credentials = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes(), *own)
    assert not is_accepted(grpc.secure_channel(f"127.0.0.2:{cluster.port}", credentials))


def http_status(method: str, url: str, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_agent_of_a_node_answers_nothing_but_its_health_without_the_token(cluster: Cluster):
    processes = descendants(cluster.head.pid)
    (raylet,) = (processes[pid] for pid in find_by_title(processes, "raylet"))
    (port,) = set(re.findall(r"--listen-port=(\d+)", raylet))
    agent, token = f"http://127.0.0.1:{port}/api", cluster.environment["RAY_AUTH_TOKEN"]
    jobs = [("POST", f"{agent}/job_agent/jobs/"), ("POST", f"{agent}/job_agent/jobs/x/stop")]
    jobs += [("DELETE", f"{agent}/job_agent/jobs/x"), ("GET", f"{agent}/job_agent/jobs/x/logs")]
    assert {http_status(*job) for job in jobs} == {401}
    assert 401 not in {http_status(*job, token) for job in jobs}
    assert http_status("GET", f"{agent}/healthz") == 200
