"""Node provider for AWS with fallback from spot to on-demand nodes.

  python spot_first.py ~/ray_bootstrap_config.yaml
  PYTHONPATH=/opt/carclass/bin ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml

Ray 2.60 retries a refused spot request every few seconds and has no fallback. The first command configures the head's
autoscaler to use this provider; `ray up` itself launches no workers. Node types in `provider.on_demand_fallback` are
requested on demand after a refused spot request.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

NO_SPOT_CAPACITY = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
)
"""EC2's error codes for missing spot capacity. All others are raised: they are configuration errors."""
logger = logging.getLogger(__name__)


def main() -> None:
    """Set this provider in the config that `ray up` copied to the head."""
    file = Path(sys.argv[1])
    config = json.loads(file.read_text())
    config["provider"] |= {"type": "external", "module": f"{Path(__file__).stem}.{SpotFirst.__name__}"}
    file.write_text(json.dumps(config))


class SpotFirst(AWSNodeProvider):
    """Ray's AWS provider with an on-demand fallback."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Launch up to `count` nodes and return them by id. Raise NodeLaunchException if AWS launches none."""
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            node_type = tags[TAG_RAY_USER_NODE_TYPE]
            if error.category not in NO_SPOT_CAPACITY or node_type not in self.provider_config["on_demand_fallback"]:
                raise
            logger.warning("%s: no spot capacity (%s), launching on demand", node_type, error.category)
        on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
        return super().create_node(on_demand, tags, count)


if __name__ == "__main__":
    main()
