"""Spot watcher: drains the Ray node when AWS announces the interruption of a spot instance, two minutes ahead.

  python watch_spot.py HEAD_IP:6379

Runs beside `ray start` on every worker; on-demand instances never get a notice. A drained node accepts no new work, and
training checkpoints and resumes elsewhere. Rebalance recommendations are ignored: many are followed by no interruption,
or by one hours later.
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
"""The interval that AWS recommends."""
TIMEOUT_SECONDS = 2
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without proxies


def main() -> None:
    """Wait for the notice, then request the drain until Ray accepts it."""
    while (deadline := interruption_time()) is None:
        time.sleep(POLL_SECONDS)
    while not drain(sys.argv[1], deadline):
        time.sleep(1)
    print(f"drained: this instance will be interrupted at {datetime.fromtimestamp(deadline).astimezone()}", flush=True)


def interruption_time() -> float | None:
    """Return the time of the interruption in seconds since the epoch, None without a notice."""
    try:
        return datetime.fromisoformat(json.loads(metadata("spot/instance-action"))["time"]).timestamp()
    except (OSError, ValueError, KeyError):  # usually 404; other errors are retried as well
        return None


def metadata(path: str) -> str:
    """Return an item of the instance's metadata (IMDSv2). Raise OSError if it or the service is missing."""
    token = request_text("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    return request_text("GET", f"meta-data/{path}", {"X-aws-ec2-metadata-token": token})


def request_text(method: str, path: str, headers: dict[str, str]) -> str:
    """Return the response of the metadata service. Raise OSError without one."""
    request = urllib.request.Request(f"{METADATA}/latest/{path}", headers=headers, method=method)  # noqa: S310 - http
    try:
        with OPENER.open(request, timeout=TIMEOUT_SECONDS) as response:
            return str(response.read().decode())
    except http.client.HTTPException as error:
        raise OSError(f"{request.full_url}: {error!r}") from error


def drain(address: str, deadline: float) -> bool:
    """Request the drain of this instance's node from the GCS at an address; return True if it is accepted."""
    import ray  # late: it takes 60 MB
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    try:
        client, instance = GcsClient(address=address), metadata("instance-id")
        infos = client.get_all_node_info().values()
        nodes = [info.node_id.hex() for info in infos if info.instance_id == instance and info.state == info.ALIVE]
        reason = DRAIN_NODE_REASON_PREEMPTION, "interruption of the spot instance", int(deadline * 1000)
        return any(client.drain_node(node, *reason)[0] for node in nodes)
    except (OSError, ray.exceptions.RayError) as error:
        print(f"not drained yet: {error}", flush=True)
        return False


if __name__ == "__main__":
    main()
