"""Ray's node provider for AWS, which takes a node on demand where there is no spot one.

  python spot_first.py ~/ray_bootstrap_config.yaml
  PYTHONPATH=/opt/carclass/bin ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml

Ray 2.60 asks for a spot node that AWS refused again every few seconds, and for nothing else. The first line makes the
autoscaler use this provider; it is for the head alone, as `ray up` and its like launch no workers. The node types that
are worth their full price are those of `provider.on_demand_fallback`. Each node is asked for as spot first.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

NO_SPOT = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
)
"""EC2's error codes for: none now. Any other is a mistake, which has to be seen."""
logger = logging.getLogger(__name__)


def main() -> None:
    """Names this provider in the config that `ray up` brought to the head."""
    file = Path(sys.argv[1])
    config = json.loads(file.read_text())
    config["provider"] |= {"type": "external", "module": f"{Path(__file__).stem}.{SpotFirst.__name__}"}
    file.write_text(json.dumps(config))


class SpotFirst(AWSNodeProvider):
    """Ray's, with a fallback."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Launches up to count nodes and returns them by id; NodeLaunchException when AWS gives none."""
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as refused:
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            if refused.category not in NO_SPOT or kind not in self.provider_config["on_demand_fallback"]:
                raise
            logger.warning("%s: %s of spot, so on demand", kind, refused.category)
        on_demand = {key: value for key, value in node_config.items() if key != "InstanceMarketOptions"}
        return super().create_node(on_demand, tags, count)


if __name__ == "__main__":
    main()
