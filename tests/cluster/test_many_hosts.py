"""The whole chain on four hosts, submitted from a fifth, with S3 on a sixth: one is cut off and two are killed,
whose successors are one of them, started again, and a spare.

The head does no work and its dashboard is on loopback, as in cluster/aws.yaml; the fifth host reaches it by a tunnel.
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

from carclass import storage
from carclass.data import dataset
from carclass.sample.generate import write_sample
from tests.helpers.chain import RUN, UNFROZEN_EPOCHS, chain_settings
from tests.helpers.clusters import RAY, SYSTEM, Job, wait_for
from tests.helpers.hosts import Host, Network, missing
from tests.helpers.tunnel import Tunnel

REPO = Path(__file__).parents[2]
BUCKET = "cars"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]  # 400 s


class Site:
    """A network with a cluster, a host to submit from, one with S3, and what they know of each other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.network = folder, Network(folder / "hosts")
        self.head, self.client, self.store = (self.network.add(name) for name in ("head", "client", "store"))
        self.workers = [self.network.add(f"worker{number}") for number in (1, 2, 3)]
        self.spare = self.network.add("spare")
        self.outside = self.network.add_outside("outside")
        known = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))}
        self.environment = {
            **known,
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
        """S3 on its host; returns a way there for this process."""
        server = [sys.executable, "-m", "moto.server", "-H", self.store.address, "-p", "5000"]
        started = self.store.start(server, self.environment)
        way = Tunnel(0, self.store.space, (self.store.address, 5000))
        threading.Thread(target=way.serve_forever, daemon=True).start()
        wait_for(lambda: "Running on" in started.log.read_text(), *started)
        return way

    def start_cluster(self) -> None:
        """The head and three workers, and a tunnel from the client's port 8265 to the head's."""
        options = ["--head", "--port=6379", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        self._start_node(self.head, *options, f"--system-config={json.dumps({**SYSTEM, **of_aws()})}")
        for worker in self.workers:
            self.start_worker(worker)
        tunnel = [sys.executable, "-m", "tests.helpers.tunnel", "8265", self.head.space, "127.0.0.1", "8265"]
        self.client.start(tunnel, self.environment)

    def start_worker(self, host: Host) -> None:
        """A node with two CPUs."""
        self._start_node(host, f"--address={self.head.address}:6379", "--num-cpus=2")

    def _start_node(self, host: Host, *options: str) -> None:
        common = ["--block", f"--node-ip-address={host.address}", "--object-store-memory=300000000"]
        started = host.start([RAY, "start", *options, *common], self.environment)
        wait_for(lambda: "Ray runtime started" in started.log.read_text(), *started)

    def submit(self, *command: str) -> Job:
        """A job, as a person sends it."""
        return self.client.start([sys.executable, REPO / "jobs" / "submit.py", "--", *command], self.environment)


def of_aws() -> dict[str, int]:
    """What cluster/aws.yaml sets of Ray's own settings."""
    command = yaml.safe_load((REPO / "cluster" / "aws.yaml").read_text())["head_start_ray_commands"][-1]
    (found,) = (word for word in shlex.split(command) if word.startswith("--system-config="))
    return dict(json.loads(found.split("=", 1)[1]))


def put_photos(folder: Path) -> None:
    """The drawn photos, in a bucket."""
    write_sample(folder, train_per_class=12, test_per_class=4)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, str(path.relative_to(folder)))


def num_parts(root: str) -> int:
    """Files that masking has written."""
    return len(storage.list_files(f"s3://{BUCKET}/{root}/datasets/v2/parts"))


def num_epochs(root: str) -> int:
    """Epochs that the unfrozen stage has behind it."""
    uri = f"s3://{BUCKET}/{root}/experiments/{RUN}/metrics.jsonl"
    return storage.read_bytes(uri).count(b'"unfrozen"') if storage.exists(uri) else 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Seven hosts with a cluster, a spare and S3, and one outside; this process speaks to that S3."""
    site = Site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as environment:
        try:
            way = site.start_store()
            for name, value in site.environment.items():
                if name.startswith("AWS_"):
                    environment.setenv(name, value)
            environment.setenv("AWS_ENDPOINT_URL", way.url)
            storage._s3.cache_clear()
            put_photos(site.folder / "sample")
            site.start_cluster()
            yield site
        finally:
            site.network.close()
    storage._s3.cache_clear()


@pytest.fixture(scope="module")
def many(site: Site) -> tuple[int, str]:
    """The chain on the cluster while hosts are lost: its exit status and what it said."""
    first, second, third = site.workers
    config_file = REPO / "build" / "many-hosts.yml"  # within the checkout, as it has to travel
    config_file.parent.mkdir(exist_ok=True)
    config_file.write_text(yaml.safe_dump(chain_settings(f"s3://{BUCKET}/many", f"s3://{BUCKET}")))
    job = site.submit("python", "jobs/pipeline.py", "--config", "build/many-hosts.yml")
    wait_for(lambda: num_parts("many") >= 2, *job, seconds=400)
    first.unplug()
    wait_for(lambda: num_parts("many") >= 4, *job, seconds=400)
    second.kill()
    assert not storage.exists(f"s3://{BUCKET}/many/datasets/v2/manifest.json"), "lost after masking, not during it"
    site.start_worker(second)  # as the autoscaler does
    wait_for(lambda: num_epochs("many") >= 1, *job, seconds=400)
    site.start_worker(site.spare)  # before the loss: with the CPUs of one host alone each worker would have but one
    wait_for(lambda: num_epochs("many") >= 2, *job, seconds=400)
    third.kill()
    assert num_epochs("many") < UNFROZEN_EPOCHS, "lost after training, not during it"
    return job.process.wait(timeout=400), job.log.read_text()


ALONE = """
ray start --head --num-cpus=4 --port=6379 --node-ip-address=127.0.0.1 --dashboard-port=8266 > /dev/null
exec python "$@"
"""
"""Four CPUs, so that a training worker has two, as on a host of the cluster: sums depend on it."""


@pytest.fixture(scope="module")
def alone(site: Site, many: tuple[int, str]) -> None:
    """The same chain on one host by itself, which nothing happens to."""
    config_file, environment = REPO / "build" / "many-hosts.yml", {**site.environment, "RAY_ADDRESS": "127.0.0.1:6379"}
    job = [REPO / "jobs" / "pipeline.py", "--config", config_file, "--root", f"s3://{BUCKET}/alone"]
    status, said = site.client.run(["sh", "-c", ALONE, "sh", *job], environment)
    assert status == 0, said[-5000:]


def test_a_job_ends_well_though_hosts_are_cut_off_and_killed(many):
    status, said = many
    assert status == 0, said[-5000:]


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_its_datasets_are_those_of_a_single_host(many, alone, contents, name):
    ours, theirs = (contents(dataset.load_dataset(f"s3://{BUCKET}/{root}", name)) for root in ("many", "alone"))
    assert ours == theirs


@pytest.mark.parametrize("stage", ["frozen", "unfrozen"])
def test_its_weights_are_those_of_a_single_host_to_the_bit(many, alone, stage):
    uris = [f"s3://{BUCKET}/{root}/experiments/{RUN}/{stage}/best.safetensors" for root in ("many", "alone")]
    ours, theirs = (load(storage.read_bytes(uri)) for uri in uris)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def ask(host: Host, address: str, port: int, environment: dict[str, str], token: str = "") -> str:
    """What a host gets from a port: an HTTP status, or `nothing`."""
    done = host.run([sys.executable, "-c", ASK, f"http://{address}:{port}/api/jobs/", token], environment)
    return done[1].split()[-1]


ASK = """
import sys, urllib.error, urllib.request
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
try:
    print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("nothing")
"""


def test_the_job_api_answers_who_has_the_tunnel_and_the_token(site):
    assert ask(site.client, "127.0.0.1", 8265, site.environment, site.token) == "200"


@pytest.mark.parametrize(("token", "status"), [("", "401"), ("0" * 64, "403")], ids=["none", "wrong"])
def test_the_job_api_refuses_who_has_the_tunnel_alone(site, token, status):
    assert ask(site.client, "127.0.0.1", 8265, site.environment, token) == status


def test_the_job_api_is_out_of_reach_even_for_the_clusters_other_hosts(site):
    assert ask(site.workers[1], site.head.address, 8265, site.environment, site.token) == "nothing"


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 6379), timeout=3)"


@pytest.mark.parametrize(("forwards", "reached"), [(False, False), (True, True)], ids=["router shut", "router open"])
def test_the_head_is_out_of_reach_from_outside_as_long_as_the_router_is_shut(site, forwards, reached):
    site.network.forward(forwards)
    status, _ = site.outside.run([sys.executable, "-c", CONNECT, site.head.address], site.environment)
    site.network.forward(False)
    assert (status == 0) == reached
