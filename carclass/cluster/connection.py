"""Connection to a Ray cluster: join the one that RAY_ADDRESS names, or start one on this machine."""

import logging
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import ray
import ray.data

from carclass.cluster import telemetry
from carclass.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
DASHBOARD = 8265
"""Ray's usual port for it."""


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names (every submitted job has it), else starts one on this machine."""
    if ray.is_initialized():
        return
    address, port = os.environ.get("RAY_ADDRESS", "local"), None
    if address == "local":
        _keep_token_private()
        # Idle workers stay for the next step: starting one costs seconds of imports.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # That a local cluster asks for its token is what we want, and no warning.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        port = free_port(DASHBOARD)
        # Ray Train's helpers ask there after their run, and else whichever cluster was started last on this machine.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    # Jobs report progress themselves; what Ray has to say goes to its session's folder all the same.
    quiet = ray.LoggingConfig(log_level="WARNING")
    context = ray.init(address=address, dashboard_port=port, logging_level=logging.WARNING, logging_config=quiet)
    telemetry.watch_nodes()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.cluster_resources()
    size = (found.get("CPU", 0), found.get("GPU", 0), len(ray.nodes()))
    log.info("Ray: %d CPUs, %d GPUs, %d node(s), dashboard %s", *size, context.dashboard_url or "off")


def free_port(first: int) -> int:
    """The first port of this machine, from `first` on, that nothing listens on."""
    for port in range(first, first + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise UserError(f"no port from {first} to {first + 999} is free for Ray's dashboard. End what holds them.")


def _keep_token_private() -> None:
    """Makes the token of a local cluster readable by its owner alone: Ray would let everyone read it."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)
