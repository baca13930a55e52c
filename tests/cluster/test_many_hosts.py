"""The pipeline on a cluster of four hosts, submitted from a fifth, with S3 on a sixth.

One host is disconnected and two are killed; one of them and a spare replace them. The head has no CPUs and its
dashboard listens on loopback, as in cluster/aws.yaml; the client reaches it through a tunnel.
"""

import json
import os
import secrets
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import yaml
from safetensors.numpy import load

from carclass import s3 as s3_client
from carclass import storage
from carclass.data import dataset
from carclass.sample.generate import write_sample
from tests.helpers.chain import RUN, UNFROZEN_EPOCHS, chain_settings
from tests.helpers.clusters import RAY, SYSTEM, Job, wait_for
from tests.helpers.hosts import Host, Network, missing_requirement
from tests.helpers.tunnel import Tunnel

REPO = Path(__file__).parents[2]
BUCKET = "cars"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),  # the first test waits for all of it
    pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement())),
]  # 20 s for the cluster
nightly = pytest.mark.nightly  # 450 s: the pipeline with losses, and again on a single host


class Site:
    """A network with a cluster, a client host, an S3 host and their common environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.network = folder, Network(folder / "hosts")
        self.head, self.client, self.store = (self.network.add(name) for name in ("head", "client", "store"))
        self.workers = [self.network.add(f"worker{number}") for number in (1, 2, 3)]
        self.spare = self.network.add("spare")
        self.outside = self.network.add_outside("outside")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        self.environment = {
            **environ,
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": f"http://{self.store.address}:5000",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.token = secrets.token_hex(32)
        for host in (self.head, self.client, *self.workers, self.spare):
            host.give_token(self.token)

    def start_store(self) -> Tunnel:
        """Start S3 on its host and return a tunnel to it for this process."""
        server = [sys.executable, "-m", "moto.server", "-H", self.store.address, "-p", "5000"]
        started = self.store.start(server, self.environment)
        tunnel = Tunnel(0, self.store.space, (self.store.address, 5000))
        threading.Thread(target=tunnel.serve_forever, daemon=True).start()
        wait_for(lambda: "Running on" in started.log.read_text(), *started)
        return tunnel

    def start_cluster(self) -> None:
        """Start the head and three workers, and a tunnel from the client's port 8265 to the head's."""
        options = ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        self._start_node(self.head, *options, f"--system-config={json.dumps({**SYSTEM, **system_config_of_aws()})}")
        for worker in self.workers:
            self.start_worker(worker)
        tunnel = [sys.executable, "-m", "tests.helpers.tunnel", "8265", self.head.space, "127.0.0.1", "8265"]
        self.client.start(tunnel, self.environment)

    def start_worker(self, host: Host) -> None:
        """Start a node with two CPUs."""
        self._start_node(host, f"--address={self.head.address}:6379", "--num-cpus=2")

    def _start_node(self, host: Host, *options: str) -> None:
        common = ["--block", f"--node-ip-address={host.address}", "--object-store-memory=300000000"]
        started = host.start([RAY, "start", *options, *common], self.environment)
        wait_for(lambda: "Ray runtime started" in started.log.read_text(), *started)

    def submit(self, *command: str) -> Job:
        """Submit a job from the client."""
        return self.client.start([sys.executable, REPO / "jobs" / "submit.py", "--", *command], self.environment)


def system_config_of_aws() -> dict[str, int]:
    """Return Ray's system config in cluster/aws.yaml."""
    command = yaml.safe_load((REPO / "cluster" / "aws.yaml").read_text())["head_start_ray_commands"][-1]
    (option,) = (word for word in shlex.split(command) if word.startswith("--system-config="))
    return dict(json.loads(option.split("=", 1)[1]))


def put_photos(folder: Path) -> None:
    """Upload the sample to a bucket."""
    write_sample(folder, train_per_class=12, test_per_class=4)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, str(path.relative_to(folder)))


def num_parts(root: str) -> int:
    """Count the parts written by masking."""
    return len(storage.list_files(f"s3://{BUCKET}/{root}/datasets/v2/parts"))


def num_epochs(root: str) -> int:
    """Count the finished epochs of the unfrozen stage."""
    uri = f"s3://{BUCKET}/{root}/experiments/{RUN}/metrics.jsonl"
    return storage.read_bytes(uri).count(b'"unfrozen"') if storage.exists(uri) else 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Start seven hosts with a cluster, a spare and S3, and one outside; this process uses that S3."""
    site = Site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as environment:
        try:
            tunnel = site.start_store()
            for name, value in site.environment.items():
                if name.startswith("AWS_"):
                    environment.setenv(name, value)
            environment.setenv("AWS_ENDPOINT_URL", tunnel.url)
            s3_client.reset()
            put_photos(site.folder / "sample")
            site.start_cluster()
            yield site
        finally:
            site.network.close()
    s3_client.reset()


@pytest.fixture(scope="module")
def many(site: Site) -> tuple[int, str]:
    """Run the pipeline while hosts are lost; return its exit status and output."""
    first, second, third = site.workers
    config_file = REPO / "build" / "many-hosts.yml"  # within the checkout, so that it is uploaded
    config_file.parent.mkdir(exist_ok=True)
    config_file.write_text(yaml.safe_dump(chain_settings(f"s3://{BUCKET}/many", f"s3://{BUCKET}")))
    job = site.submit("python", "jobs/pipeline.py", "--config", "build/many-hosts.yml")
    wait_for(lambda: num_parts("many") >= 2, *job, seconds=900)
    first.unplug()
    wait_for(lambda: num_parts("many") >= 4, *job, seconds=900)
    second.kill()
    assert not storage.exists(f"s3://{BUCKET}/many/datasets/v2/manifest.json"), "lost after masking, not during it"
    site.start_worker(second)  # as the autoscaler would
    wait_for(lambda: num_epochs("many") >= 1, *job, seconds=900)
    site.start_worker(site.spare)  # before the loss: with the CPUs of one host, each worker would have only one
    wait_for(lambda: num_epochs("many") >= 2, *job, seconds=900)
    third.kill()
    assert num_epochs("many") < UNFROZEN_EPOCHS, "lost after training, not during it"
    return job.process.wait(timeout=900), job.log.read_text()


ALONE = """
ray start --head --num-cpus=4 --port=6379 --node-ip-address=127.0.0.1 --dashboard-port=8266 > /dev/null
exec python "$@"
"""
"""Four CPUs, so that a training worker has two threads as on the cluster: the order of sums depends on it."""


@pytest.fixture(scope="module")
def alone(site: Site, many: tuple[int, str]) -> None:
    """Run the same pipeline on a single host without failures."""
    config_file, environment = REPO / "build" / "many-hosts.yml", {**site.environment, "RAY_ADDRESS": "127.0.0.1:6379"}
    job = [REPO / "jobs" / "pipeline.py", "--config", config_file, "--root", f"s3://{BUCKET}/alone"]
    status, output = site.client.run(["sh", "-c", ALONE, "sh", *job], environment)
    assert status == 0, output[-5000:]


@nightly
def test_a_job_succeeds_although_hosts_are_disconnected_and_killed(many):
    status, output = many
    assert status == 0, output[-5000:]


@nightly
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_datasets_equal_those_of_a_single_host(many, alone, contents, name):
    ours, reference = (contents(dataset.load_dataset(f"s3://{BUCKET}/{root}", name)) for root in ("many", "alone"))
    assert ours == reference


@nightly
@pytest.mark.parametrize("stage", ["frozen", "unfrozen"])
def test_weights_equal_those_of_a_single_host_bit_for_bit(many, alone, stage):
    uris = [f"s3://{BUCKET}/{root}/experiments/{RUN}/{stage}/best.safetensors" for root in ("many", "alone")]
    ours, reference = (load(storage.read_bytes(uri)) for uri in uris)
    assert ours.keys() == reference.keys()
    assert [name for name in ours if not np.array_equal(ours[name], reference[name])] == []


def request_status(host: Host, address: str, port: int, environment: dict[str, str], token: str = "") -> str:
    """Return the HTTP status of a request from a host to the job API, or `nothing`."""
    done = host.run([sys.executable, "-c", REQUEST, f"http://{address}:{port}/api/jobs/", token], environment)
    return done[1].split()[-1]


REQUEST = """
import sys, urllib.error, urllib.request
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
try:
    print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("nothing")
"""


def test_the_job_api_answers_with_tunnel_and_token(site):
    assert request_status(site.client, "127.0.0.1", 8265, site.environment, site.token) == "200"


@pytest.mark.parametrize(("token", "status"), [("", "401"), ("0" * 64, "403")], ids=["none", "wrong"])
def test_the_job_api_refuses_requests_without_the_token(site, token, status):
    assert request_status(site.client, "127.0.0.1", 8265, site.environment, token) == status


def test_the_job_api_is_unreachable_from_the_clusters_other_hosts(site):
    assert request_status(site.workers[1], site.head.address, 8265, site.environment, site.token) == "nothing"


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 6379), timeout=3)"


@pytest.mark.parametrize(("forwards", "reached"), [(False, False), (True, True)], ids=["router closed", "router open"])
def test_the_head_is_unreachable_from_outside_while_the_router_is_closed(site, forwards, reached):
    site.network.forward(forwards)
    status, _ = site.outside.run([sys.executable, "-c", CONNECT, site.head.address], site.environment)
    site.network.forward(False)
    assert (status == 0) == reached
