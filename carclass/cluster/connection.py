"""Connection to a Ray cluster: an existing one, or a local one."""

import fcntl
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import AuthenticationError

from carclass.cluster import telemetry
from carclass.cluster.address import LOCAL, SUBMIT, cluster_address, refused_token
from carclass.cluster.shared_paths import check_shared
from carclass.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
DASHBOARD_PORT = 8265
"""Ray's default port."""
_owns_cluster = False


def connect(folders: Mapping[str, str] | None = None) -> None:
    """Join the cluster at RAY_ADDRESS, which is set for submitted jobs, or start a local one.

    folders: setting → URI of what all nodes must see. Raise UserError if they do not, or if no cluster answers.
    """
    _join()
    check_shared(folders or {})


def has_own_cluster() -> bool:
    """Return True if this process has started the cluster, which then ends with it."""
    return _owns_cluster


def is_local() -> bool:
    """Return True if `connect` would start a cluster on this machine, or has started it: no other machine can help."""
    return _owns_cluster or (not ray.is_initialized() and cluster_address() == LOCAL)


def check_cluster() -> None:
    """Raise UserError if `connect` would find no cluster: before photos are listed and weights are downloaded."""
    if not ray.is_initialized():
        cluster_address()


def _join() -> None:
    global _owns_cluster
    # Otherwise Ray Data drops the error that a batch failed with, and with it the remedy.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs the error that it raises
    # A job ends with its first error; tasks that fail meanwhile would each print a traceback after it.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if ray.is_initialized():
        return
    address = cluster_address()
    if address == LOCAL:
        _create_private_token()
        # Keep idle workers for the next step: starting one takes seconds of imports.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # Silence the warning that a local cluster requires its token: that is intended.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    log.info("Ray: %s", "starting" if address == LOCAL else f"joining the cluster at {address}")
    # Jobs report progress themselves; Ray's messages still go to the logs of its session.
    quiet = ray.LoggingConfig(log_level="WARNING")
    options: dict[str, Any] = {"logging_level": logging.WARNING, "logging_config": quiet}
    try:
        with hold_dashboard_port() if address == LOCAL else nullcontext() as port:
            context = ray.init(address=address, dashboard_port=port, **options)
    except AuthenticationError as error:
        raise refused_token(address) from error
    except (ConnectionError, RuntimeError) as error:
        if address == LOCAL:
            raise
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"joining the Ray cluster at {address} (RAY_ADDRESS) failed ({cause}). A job runs on a machine of "
            f"the cluster. {SUBMIT}."
        ) from error
    _owns_cluster = address == LOCAL
    telemetry.watch_nodes()
    ray.data.DataContext.get_current().enable_progress_bars = False
    available = ray.cluster_resources()
    size = (available.get("CPU", 0), available.get("GPU", 0), len(ray.nodes()))
    log.info("Ray: %d CPUs, %d GPUs, %d node(s), dashboard %s", *size, context.dashboard_url or "off")


@contextmanager
def hold_dashboard_port() -> Iterator[int]:
    """Hold a free port until Ray listens on it: other jobs of this user that start meanwhile wait, and get another."""
    path = os.path.join(tempfile.gettempdir(), f"carclass-{os.getuid()}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = free_port(DASHBOARD_PORT)
        # Ray Train's helper processes query this address, by default that of the cluster started last on this machine.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        yield port
    finally:
        os.close(lock)


def free_port(first: int) -> int:
    """Return the first free port from `first` on. Raise UserError if a thousand are in use."""
    for port in range(first, first + 1000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise UserError(f"no port from {first} to {first + 999} is free. Stop the processes that use them.")


def _create_private_token() -> None:
    """Create the token of a local cluster with mode 0600: Ray would make it readable by all users."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)
