"""Joining a Ray cluster, asking it what it has, and streaming datasets through it."""

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from carclass import dataset, telemetry
from carclass.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
BLOCK_ROWS = 64
DASHBOARD = 8265
"""Ray's usual port for it."""
PLACE = pa.schema([("part", pa.string()), ("position", pa.int64())])
TASK_CPUS = 0.25
"""CPUs reserved by a reading or writing task and by an actor on a CPU: so little that, next to an actor for every CPU
and Ray's own repartitioning, which takes a whole one, there is always room for writing. Else what is done would wait in
memory, and in ever greater numbers, until nothing is left to do."""


TASKS_PER_CPU = 2
"""One is at work and one is on its way; a cluster that grows by what waits sees that something does."""


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


def run_tasks(function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """Results of function(item), in no order, each by a task on a CPU of its own.

    Items are taken only as tasks end, so that nothing waits in memory, however many there are. A task whose process or
    node is lost is begun again.
    """
    task: Any = ray.remote(num_cpus=1, max_retries=-1)(_call)
    running: list[ray.ObjectRef] = []
    for item in items:
        if len(running) >= TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0))):
            (done,), running = ray.wait(running)
            yield ray.get(done)
        running.append(task.remote(function, item))
    while running:
        (done,), running = ray.wait(running)
        yield ray.get(done)


def _call(function: Callable[[Any], T], item: Any) -> T:
    return function(item)


def stream(source: dataset.Dataset, columns: Sequence[str], split: str | None = None) -> ray.data.Dataset:
    """A dataset's rows (or one split's) through Ray Data, in blocks small enough to keep every process busy.

    Parts are read by our own storage, as pyarrow's file systems lose their retries on the way to another process.
    """
    read = partial(read_part, columns=list(columns), split=split)
    parts = _by_part([{"part": uri} for uri in source.part_uris])
    rows = parts.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=BLOCK_ROWS)


def read_part(batch: pa.Table, columns: list[str], split: str | None) -> pa.Table:
    """The rows of one part; batch: its uri."""
    filters = None if split is None else pc.field("split") == split
    return dataset.read_part(batch["part"][0].as_py(), columns, filters).replace_schema_metadata()


def stream_places(places: Iterable[tuple[str, list[int]]], block_rows: int) -> ray.data.Dataset:
    """Places of rows (`part`, `position`) in blocks of block_rows, for slow work on large rows.

    Whoever works on a row fetches it by `dataset.take`: what waits in a queue is small, however many photos wait, and
    nothing is read long before its time. places: of each part, its URI and positions in it.
    """
    parts = _by_part([{"part": part, "positions": positions} for part, positions in places])
    spread = parts.map_batches(spread_places, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return spread.repartition(target_num_rows_per_block=block_rows)


def spread_places(batch: pa.Table) -> pa.Table:
    """A row for each place in one part; batch: its `part` and `positions`."""
    (part,), (positions,) = (batch[name].to_pylist() for name in ("part", "positions"))
    return pa.table([[part] * len(positions), positions], schema=PLACE)


def _by_part(items: list[dict[str, Any]]) -> ray.data.Dataset:
    """What is said of each part, in a block of its own."""
    return ray.data.from_items(items, override_num_blocks=max(1, len(items)))
