"""The node provider of the head: where AWS has no spot node, training gets one on demand, and nothing else does."""

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

from tests.helpers.aws import Place, Request, account, on_head, provider_of
from tests.helpers.clusters import Cluster

NO_SPOT = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
)
MISTAKES = ("UnauthorizedOperation", "InvalidParameterValue", "VcpuLimitExceeded")
WANTED = {"resources": {"GPU": 4}, "label_selector": {"carclass-work": "train"}}
WANT = f"""
import os
from ray.autoscaler.v2.sdk import request_cluster_resources

request_cluster_resources(os.environ["RAY_ADDRESS"], [{WANTED}])
"""


class Head(NamedTuple):
    """The head's side of a cluster."""

    place: Place
    reader: FileConfigReader
    provider: Any

    def launch(self, kind: str) -> list[LaunchNodeError]:
        """What goes wrong when the autoscaler launches a node."""
        adapter = NodeProviderAdapter(self.provider, self.reader)
        self.place.recorder.kept.clear()
        adapter.launch({kind: 1}, "a request")
        adapter._main_executor.shutdown()
        adapter._node_launcher_executors.shutdown()
        return adapter.poll_errors()

    def asked(self) -> list[tuple[str, Request]]:
        """The requests for nodes since the last launch began, each with the market that it names."""
        launches = [each for each in self.place.recorder.kept if each["Action"] == "RunInstances"]
        return [(each.get("InstanceMarketOptions.MarketType", "on demand"), each) for each in launches]

    def markets(self) -> list[str]:
        """The markets that were asked, in order; where one was asked several times in a row, once."""
        return [market for market, _ in groupby(market for market, _ in self.asked())]


@pytest.fixture(scope="module")
def up(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with account(tmp_path_factory.mktemp("home")) as place:
        place.prepare().check_returncode()
        reader = on_head(place, sdk.create_or_update_cluster(place.file, no_config_cache=True))
        yield Head(place, reader, provider_of(reader.get_cached_autoscaling_config()))
        sdk.teardown_cluster(place.file)


@pytest.fixture
def head(up: Head) -> Iterator[Head]:
    """A head that has no workers yet; afterwards AWS has spot nodes again."""
    yield up
    up.place.recorder.no_spot = None
    up.provider.terminate_nodes(up.provider.non_terminated_nodes({"ray-node-type": "worker"}))


@pytest.mark.parametrize("code", NO_SPOT)
def test_a_training_node_that_spot_has_not_is_launched_on_demand(head: Head, code: str):
    head.place.recorder.no_spot = code
    assert head.launch("train") == []
    assert head.markets() == ["spot", "on demand"]


def test_what_is_asked_for_on_demand_is_the_same_node(head: Head):
    head.place.recorder.no_spot = NO_SPOT[0]
    head.launch("train")
    (_, refused), *_, (_, given) = head.asked()
    differs = ("InstanceMarketOptions", "ClientToken")
    same = [{key: request[key] for key in request if not key.startswith(differs)} for request in (refused, given)]
    assert same[0] == same[1]


@pytest.mark.parametrize("kind", ["mask", "read"])
def test_other_nodes_wait_for_spot(head: Head, kind: str):
    head.place.recorder.no_spot = NO_SPOT[0]
    (error,) = head.launch(kind)
    assert (head.markets(), error.__cause__.category) == (["spot"], NO_SPOT[0])


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_not_repeated_on_demand(head: Head, code: str):
    head.place.recorder.no_spot = code
    (error,) = head.launch("train")
    assert (head.markets(), error.__cause__.category) == (["spot"], code)


def test_where_there_is_spot_nothing_is_asked_for_on_demand(head: Head):
    assert head.launch("train") == []
    assert [market for market, _ in head.asked()] == ["spot"]


class RayHead(Cluster):
    """A cluster whose head launches nodes as it's told; `ray up` sets these variables too."""

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
    monkeypatch.setattr(tempfile, "tempdir", None)  # Ray's sockets want a short path
    (instance,) = head.provider.non_terminated_nodes({"ray-node-type": "head"})
    head.place.recorder.no_spot = NO_SPOT[0]
    head.place.recorder.kept.clear()
    cluster = RayHead(tmp_path, str(head.place.home / "ray_bootstrap_config.yaml"), instance)
    try:
        subprocess.run([sys.executable, "-c", WANT], env=cluster.environment, check=True)
        deadline = time.monotonic() + 120
        while not head.place.told("ray start --address"):
            assert time.monotonic() < deadline, logs(cluster)
            time.sleep(0.1)
    finally:
        cluster.stop()
    markets = [market for market, _ in head.asked()]
    assert (head.markets(), markets.count("on demand")) == (["spot", "on demand"], 1)


def logs(cluster: Cluster) -> str:
    """What the autoscaler said."""
    return "\n".join(file.read_text() for file in Path(cluster.environment["RAY_TMPDIR"]).rglob("monitor.*"))
