"""Turns AWS' notice that a spot instance will be taken away, two minutes ahead, into a drain of its Ray node.

  python watch_spot.py HEAD_IP:6379

Runs beside `ray start` on every worker until the notice comes; an instance on demand never gets one. A drained node
takes no new work, and training on it saves and goes on elsewhere. Rebalance recommendations are not acted upon: many
of them are followed by no interruption, or by one hours later.
"""

import http.client
import json
import os
import sys
import time
import urllib.request
from datetime import datetime

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
POLL_SECONDS = 5
"""As often as AWS advises."""
TIMEOUT_SECONDS = 2
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    """Waits for the notice, then asks Ray until it drains the node."""
    while (deadline := interruption()) is None:
        time.sleep(POLL_SECONDS)
    while not drain(sys.argv[1], deadline):
        time.sleep(1)
    print(f"drained: this instance will be taken away at {datetime.fromtimestamp(deadline).astimezone()}", flush=True)


def interruption() -> float | None:
    """When the instance will be taken away, in seconds since the epoch; None while no notice can be had."""
    try:
        return datetime.fromisoformat(json.loads(metadata("spot/instance-action"))["time"]).timestamp()
    except (OSError, ValueError, KeyError):  # 404 is the usual answer; anything else is asked again as well
        return None


def metadata(path: str) -> str:
    """An item of the instance's metadata (IMDSv2); OSError when it isn't there or the service doesn't answer."""
    token = ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    return ask("GET", f"meta-data/{path}", {"X-aws-ec2-metadata-token": token})


def ask(method: str, path: str, headers: dict[str, str]) -> str:
    """The answer's text; OSError when there is none."""
    request = urllib.request.Request(f"{METADATA}/latest/{path}", headers=headers, method=method)  # noqa: S310 - http
    try:
        with DIRECTLY.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())
    except http.client.HTTPException as error:
        raise OSError(f"{request.full_url}: {error!r}") from error


def drain(address: str, deadline: float) -> bool:
    """Asks Ray at an address to drain this instance's node, which the autoscaler named after it; whether Ray agreed."""
    import ray  # not before it's needed: it takes 60 MB
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    try:
        client, instance = GcsClient(address=address), metadata("instance-id")
        known = client.get_all_node_info().values()
        nodes = [node.node_id.hex() for node in known if node.instance_id == instance and node.state == node.ALIVE]
        wanted = DRAIN_NODE_REASON_PREEMPTION, "AWS takes this spot instance away", int(deadline * 1000)
        return any(client.drain_node(node, *wanted)[0] for node in nodes)
    except (OSError, ray.exceptions.RayError) as error:
        print(f"not drained yet: {error}", flush=True)
        return False


if __name__ == "__main__":
    main()
