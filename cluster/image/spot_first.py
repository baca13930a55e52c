"""Node provider for AWS with fallback to other zones, from spot to on-demand nodes, and a pause after failed setups.

  python spot_first.py ~/ray_bootstrap_config.yaml
  PYTHONPATH=/opt/carclass/bin ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml

Ray 2.60 retries a refused spot request every few seconds and has no fallback, and it replaces a node whose setup fails,
as for an image that cannot be pulled, without end. The first command configures the head's autoscaler to use this
provider; `ray up` itself launches no workers. A node that the zone of one subnet has no capacity for, or does not
offer, is requested in the next of `provider.subnets`; then, if its type is in `provider.on_demand_fallback`, on demand.
A type whose last two nodes could not be set up pauses.
"""

import copy
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    STATUS_UP_TO_DATE,
    STATUS_UPDATE_FAILED,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

NO_CAPACITY = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
)
"""EC2's error codes for a zone or a market without capacity. All others are raised: they are configuration errors."""
MAX_FAILED_NODES, PAUSE_S = 2, 600.0
"""Nodes of a type in a row whose setup may fail, and seconds until each further one is launched."""
logger = logging.getLogger(__name__)


def main() -> None:
    """Set this provider in the config that `ray up` copied to the head."""
    file = Path(sys.argv[1])
    config = json.loads(file.read_text())
    config["provider"] |= {"type": "external", "module": f"{Path(__file__).stem}.{SpotFirst.__name__}"}
    file.write_text(json.dumps(config))


class SpotFirst(AWSNodeProvider):
    """Ray's AWS provider with other zones and on-demand nodes to fall back on, and pauses after failed setups."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.failed: dict[str, set[str]] = {}
        """Node type → the nodes whose setup has failed since the last one that succeeded."""
        self.pauses: dict[str, float] = {}
        """Node type → the time until which none is launched."""

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Set tags; count the failed setups of the node's type."""
        super().set_node_tags(node_id, tags)
        status = tags.get(TAG_RAY_NODE_STATUS)
        if status in (STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED):
            node_type = self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE]
            if status == STATUS_UP_TO_DATE:
                self.failed.pop(node_type, None)
            else:
                self.failed.setdefault(node_type, set()).add(node_id)
                self.pauses[node_type] = time.monotonic() + PAUSE_S

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Launch up to `count` nodes and return them by id. Raise NodeLaunchException if none is launched."""
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        self._check_failures(node_type)
        *others, last = self._fallbacks(node_config, node_type)
        for title, config in others:
            try:
                return super().create_node(config, tags, count)
            except NodeLaunchException as error:
                if error.category not in NO_CAPACITY:
                    raise
                logger.warning("%s: no capacity (%s) for %s, trying the next", node_type, error.category, title)
        return super().create_node(last[1], tags, count)

    def _check_failures(self, node_type: str) -> None:
        """Raise NodeLaunchException if a type pauses; begin the next pause otherwise, if its last nodes failed."""
        now, failed = time.monotonic(), len(self.failed.get(node_type, ()))
        if failed < MAX_FAILED_NODES:
            return
        if (rest := self.pauses[node_type] - now) > 0:
            reason = (
                f"the setup of the last {failed} nodes of type {node_type} failed, as for an image that cannot be "
                f"pulled: see monitor.err beside monitor.log. The next one is launched in {rest / 60:.0f} min"
            )
            raise NodeLaunchException("SetupFailed", reason, None)
        self.pauses[node_type] = now + PAUSE_S  # for all but this one

    def _fallbacks(self, node_config: dict[str, Any], node_type: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the node's configurations in the order of preference, each with a title."""
        markets = [("spot" if "InstanceMarketOptions" in node_config else "on demand", node_config)]
        if node_type in self.provider_config["on_demand_fallback"]:
            on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
            markets.append(("on demand", on_demand))
        fallbacks = []
        for market, config in markets:
            for subnet in self.provider_config["subnets"]:
                placed = copy.deepcopy(config)
                placed["NetworkInterfaces"][0]["SubnetId"] = subnet
                fallbacks.append((f"{market} in {subnet}", placed))
        return fallbacks


if __name__ == "__main__":
    main()
