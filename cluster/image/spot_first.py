"""Node provider for AWS with fallback to other zones, and from spot to on-demand nodes.

  python spot_first.py ~/ray_bootstrap_config.yaml
  PYTHONPATH=/opt/carclass/bin ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml

Ray 2.60 retries a refused spot request every few seconds and has no fallback. The first command configures the head's
autoscaler to use this provider; `ray up` itself launches no workers. A node that the zone of one subnet has no capacity
for, or does not offer, is requested in the next of `provider.subnets`; then, if its type is in
`provider.on_demand_fallback`, on demand.
"""

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

NO_CAPACITY = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
)
"""EC2's error codes for a zone or a market without capacity. All others are raised: they are configuration errors."""
logger = logging.getLogger(__name__)


def main() -> None:
    """Set this provider in the config that `ray up` copied to the head."""
    file = Path(sys.argv[1])
    config = json.loads(file.read_text())
    config["provider"] |= {"type": "external", "module": f"{Path(__file__).stem}.{SpotFirst.__name__}"}
    file.write_text(json.dumps(config))


class SpotFirst(AWSNodeProvider):
    """Ray's AWS provider with other zones and on-demand nodes to fall back on."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Launch up to `count` nodes and return them by id. Raise NodeLaunchException if AWS launches none."""
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        *others, last = self._fallbacks(node_config, node_type)
        for title, config in others:
            try:
                return super().create_node(config, tags, count)
            except NodeLaunchException as error:
                if error.category not in NO_CAPACITY:
                    raise
                logger.warning("%s: no capacity (%s) for %s, trying the next", node_type, error.category, title)
        return super().create_node(last[1], tags, count)

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
