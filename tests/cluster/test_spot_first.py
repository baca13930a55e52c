"""The head's node provider: other zones are tried, only training nodes launched on demand, and failed setups paused."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray.autoscaler import sdk
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter

from tests.helpers.aws import Account, Request, make_account, make_provider, write_head_config
from tests.helpers.clusters import Cluster

NO_SPOT_CAPACITY = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
)
MISTAKES = ("UnauthorizedOperation", "InvalidParameterValue", "VcpuLimitExceeded")
REQUESTED = {"resources": {"GPU": 4}, "label_selector": {"carclass-work": "train"}}
REQUEST_NODE = f"""
import os
from ray.autoscaler.v2.sdk import request_cluster_resources

request_cluster_resources(os.environ["RAY_ADDRESS"], [{REQUESTED}])
"""

FIND_STARTING = """
import ray
from carclass.cluster import telemetry

ray.init(log_to_driver=False)
print([telemetry.hourly_price(node) for node in telemetry.starting_nodes()])
"""


class Head(NamedTuple):
    """The head of a cluster with its node provider."""

    account: Account
    reader: FileConfigReader
    provider: Any

    def launch(self, kind: str) -> list[LaunchNodeError]:
        """Launch a node as the autoscaler does and return the errors."""
        adapter = NodeProviderAdapter(self.provider, self.reader)
        self.account.recorder.requests.clear()
        adapter.launch({kind: 1}, "a request")
        adapter._main_executor.shutdown()
        adapter._node_launcher_executors.shutdown()
        return adapter.poll_errors()

    def launches(self) -> list[tuple[str, Request]]:
        """Return the (market, request) pairs since the last launch."""
        launches = [each for each in self.account.recorder.requests if each["Action"] == "RunInstances"]
        return [(each.get("InstanceMarketOptions.MarketType", "on demand"), each) for each in launches]

    def markets(self) -> list[str]:
        """Return the requested markets in order, without repetitions."""
        return [market for market, _ in groupby(market for market, _ in self.launches())]


@pytest.fixture(scope="module")
def up(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        account.prepare("--subnet", account.other).check_returncode()
        reader = write_head_config(account, sdk.create_or_update_cluster(account.file))
        yield Head(account, reader, make_provider(reader.get_cached_autoscaling_config()))
        sdk.teardown_cluster(account.file)


@pytest.fixture
def head(up: Head) -> Iterator[Head]:
    """Yield a head without workers; then restore spot capacity, and forget failed setups."""
    yield up
    up.provider.failed.clear()
    up.account.recorder.no_spot = up.account.recorder.full_subnet = None
    up.provider.terminate_nodes(up.provider.non_terminated_nodes({"ray-node-type": "worker"}))


@pytest.mark.slow
@pytest.mark.parametrize("code", NO_SPOT_CAPACITY)
def test_a_training_node_without_spot_capacity_is_launched_on_demand(head: Head, code: str):
    head.account.recorder.no_spot = code
    assert head.launch("train") == []
    assert head.markets() == ["spot", "on demand"]


def test_the_on_demand_node_has_the_same_configuration(head: Head):
    head.account.recorder.no_spot = NO_SPOT_CAPACITY[0]
    head.launch("train")
    (_, refused), *_, (_, given) = head.launches()
    differs = ("InstanceMarketOptions", "ClientToken")
    same = [{key: request[key] for key in request if not key.startswith(differs)} for request in (refused, given)]
    assert same[0] == same[1]


def test_a_node_is_requested_in_every_zone_before_on_demand(head: Head):
    head.account.recorder.no_spot = NO_SPOT_CAPACITY[0]
    head.launch("train")
    places = [(market, request["NetworkInterface.1.SubnetId"]) for market, request in head.launches()]
    subnets = (head.account.subnet, head.account.other)
    assert [place for place, _ in groupby(places)] == [
        ("spot", subnets[0]),
        ("spot", subnets[1]),
        ("on demand", subnets[0]),
    ]


def test_a_zone_without_capacity_is_left_for_the_next(head: Head):
    head.account.recorder.full_subnet = head.account.subnet
    assert head.launch("mask") == []
    *_, (market, launched) = head.launches()
    assert (market, launched["NetworkInterface.1.SubnetId"]) == ("spot", head.account.other)


@pytest.mark.parametrize("kind", ["mask", "read"])
def test_other_nodes_wait_for_spot_capacity(head: Head, kind: str):
    head.account.recorder.no_spot = NO_SPOT_CAPACITY[0]
    (error,) = head.launch(kind)
    assert (head.markets(), error.__cause__.category) == (["spot"], NO_SPOT_CAPACITY[0])


@pytest.mark.parametrize("code", MISTAKES)
def test_other_errors_are_not_retried_on_demand(head: Head, code: str):
    head.account.recorder.no_spot = code
    (error,) = head.launch("train")
    assert (head.markets(), error.__cause__.category) == (["spot"], code)


@pytest.mark.slow
def test_with_spot_capacity_nothing_is_launched_on_demand(head: Head):
    assert head.launch("train") == []
    assert [market for market, _ in head.launches()] == ["spot"]


def fail_setups(head: Head, count: int) -> list[str]:
    """Launch nodes for reading, mark them as Ray does when their setup has failed three times, and return their ids."""
    for _ in range(count):
        assert head.launch("read") == []
    nodes = head.provider.non_terminated_nodes({"ray-user-node-type": "read"})
    for node in nodes * 3:
        head.provider.set_node_tags(node, {"ray-node-status": "update-failed"})
    return list(nodes)


def test_a_type_whose_last_two_nodes_could_not_be_set_up_pauses(head: Head):
    fail_setups(head, 2)
    (error,) = head.launch("read")
    assert "the setup of the last 2 nodes of type read failed" in str(error.__cause__)
    assert head.launches() == []
    assert head.launch("mask") == []


def test_one_node_of_the_type_is_launched_after_each_pause(head: Head):
    fail_setups(head, 2)
    head.provider.pauses["read"] = time.monotonic()
    assert head.launch("read") == []
    assert len(head.launch("read")) == 1


def test_setups_that_fail_once_or_between_successes_do_not_pause_a_type(head: Head):
    (node,) = fail_setups(head, 1)
    assert head.launch("read") == []
    fail_setups(head, 1)
    head.provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    assert head.launch("read") == []


class RayHead(Cluster):
    """A cluster whose head has an autoscaler; `ray up` sets these variables too."""

    def __init__(self, folder: Path, config: str, instance: str) -> None:
        self.config, self.instance = config, instance
        super().__init__(folder)

    def _start(self, name: str, *options: str) -> subprocess.Popen:
        self.environment |= {"RAY_CLOUD_INSTANCE_ID": self.instance, "RAY_NODE_TYPE_NAME": "head"}
        self.environment |= {"RAY_enable_autoscaler_v2": "1"}
        return super()._start(name, f"--autoscaling-config={self.config}", *options)


@pytest.mark.slow  # 20 s
def test_rays_autoscaler_gets_one_node_on_demand_and_sets_it_up(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", None)  # Ray's sockets need a short path
    (instance,) = head.provider.non_terminated_nodes({"ray-node-type": "head"})
    head.account.recorder.no_spot = NO_SPOT_CAPACITY[0]
    head.account.recorder.requests.clear()
    cluster = RayHead(tmp_path, str(head.account.home / "ray_bootstrap_config.yaml"), instance)
    try:
        subprocess.run([sys.executable, "-c", REQUEST_NODE], env=cluster.environment, check=True)
        deadline = time.monotonic() + 120
        while not head.account.commands("ray start --address"):
            assert time.monotonic() < deadline, logs(cluster)
            time.sleep(0.1)
        command = [sys.executable, "-c", FIND_STARTING]
        prices = subprocess.run(command, env=cluster.environment, check=True, capture_output=True, text=True).stdout
    finally:
        cluster.stop()
    assert prices == "[5.672]\n", "of the node that has not joined"
    markets = [market for market, _ in head.launches()]
    assert (head.markets(), markets.count("on demand")) == (["spot", "on demand"], 1)


def logs(cluster: Cluster) -> str:
    """Return the autoscaler's logs."""
    return "\n".join(file.read_text() for file in Path(cluster.environment["RAY_TMPDIR"]).rglob("monitor.*"))
