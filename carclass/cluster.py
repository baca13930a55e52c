"""Joining a Ray cluster, asking it what it has, and streaming datasets through it."""

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from carclass import dataset
from carclass.errors import UserError

log = logging.getLogger(__name__)
BLOCK_ROWS = 64
DASHBOARD = 8265
"""Ray's usual port for it."""
PLACE = pa.schema([("part", pa.string()), ("position", pa.int64())])
TASK_CPUS = 0.25
"""CPUs reserved by a reading or writing task and by an actor on a CPU: so little that, next to an actor for every CPU
and Ray's own repartitioning, which takes a whole one, there is always room for writing. Else what is done would wait in
memory, and in ever greater numbers, until nothing is left to do."""


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
        port = _free_port(DASHBOARD)
        # Ray Train's helpers ask there after their run, and else whichever cluster was started last on this machine.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    # Jobs report progress themselves; what Ray has to say goes to its session's folder all the same.
    quiet = ray.LoggingConfig(log_level="WARNING")
    context = ray.init(address=address, dashboard_port=port, logging_level=logging.WARNING, logging_config=quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.cluster_resources()
    size = (found.get("CPU", 0), found.get("GPU", 0), len(ray.nodes()))
    log.info("Ray: %d CPUs, %d GPUs, %d node(s), dashboard %s", *size, context.dashboard_url or "off")


def _free_port(first: int) -> int:
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


def nodes() -> set[str]:
    """The machines that are there, by their ids."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def gpus(wanted: bool | None, count: int, key: str) -> bool:
    """Whether to use GPUs; UserError when they are asked for and the cluster has fewer than count."""
    there = int(ray.cluster_resources().get("GPU", 0))
    if wanted is None:
        if 0 < there < count:
            log.warning(
                "`%s`: %d GPU(s) for %d processes: none is used; start %d to use them", key, there, count, there
            )
        return there >= count
    if wanted and there < count:
        raise UserError(
            f"`{key}` asks for {count} GPU(s), the cluster has {there}. "
            f"Add GPU nodes, lower the number of processes, or leave `{key}` out to use CPUs."
        )
    return wanted


def check_cpus(count: float, key: str) -> None:
    """UserError when the cluster has fewer CPUs than a job needs at once: Ray would wait for ever."""
    there = ray.cluster_resources().get("CPU", 0)
    if there < count:
        raise UserError(f"`{key}` needs {count:g} CPUs at once, the cluster has {there:g}. Lower it or add nodes.")


def cpus_each(count: int) -> int:
    """CPUs that each of `count` processes can have when all run at once, none spanning two nodes; at least 1."""
    nodes = [int(resources.get("CPU", 0)) for resources in _nodes()]
    return next((cpus for cpus in range(max(nodes), 1, -1) if sum(there // cpus for there in nodes) >= count), 1)


def room(resource: str, each: float) -> int:
    """How many processes with so much of a resource (`CPU`, `GPU`) fit at once, none spanning two nodes."""
    return sum(int(resources.get(resource, 0) / each + 1e-9) for resources in _nodes())


def object_store() -> int:
    """Bytes that the largest node has for objects."""
    return int(max(resources.get("object_store_memory", 0) for resources in _nodes()))


def memory(use_gpu: bool) -> int | None:
    """Bytes of one GPU, or of all nodes together; None where every GPU stays taken for a minute."""
    if not use_gpu:
        return int(sum(resources.get("memory", 0) for resources in _nodes()))
    address = ray.get_runtime_context().gcs_address
    if address not in _known_gpus and (found := _ask_gpu()) is not None:
        _known_gpus[address] = found
    return _known_gpus.get(address)


_known_gpus: dict[str, int] = {}
"""Memory of a GPU by cluster: runs that share GPUs leave none free to ask."""


def _ask_gpu() -> int | None:
    asked = ray.remote(num_gpus=1, num_cpus=0)(_gpu_memory).remote()
    ready, _ = ray.wait([asked], timeout=60)
    if not ready:
        ray.cancel(asked)
        return None
    return int(ray.get(asked))


def _gpu_memory() -> int:
    import torch  # here: only this one process needs it

    return int(torch.cuda.get_device_properties(0).total_memory)


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def stream(source: dataset.Dataset, columns: Sequence[str], split: str | None = None) -> ray.data.Dataset:
    """A dataset's rows (or one split's) through Ray Data, in blocks small enough to keep every process busy.

    Parts are read by our own storage, as pyarrow's file systems lose their retries on the way to another process.
    """
    read = partial(read_part, columns=list(columns), split=split)
    rows = _parts(source).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=BLOCK_ROWS)


def read_part(batch: pa.Table, columns: list[str], split: str | None) -> pa.Table:
    """The rows of one part; batch: its uri."""
    filters = None if split is None else pc.field("split") == split
    return dataset.read_part(batch["part"][0].as_py(), columns, filters).replace_schema_metadata()


def stream_places(source: dataset.Dataset, keys: ray.ObjectRef, block_rows: int) -> ray.data.Dataset:
    """Where the rows of some keys are (`part`, `position`), in blocks of block_rows, for slow work on large rows.

    Whoever works on a row fetches it by `dataset.take`: what waits in a queue is small, however many photos wait, and
    nothing is read long before its time. keys: a set in the object store.
    """
    find = partial(find_places, keys=keys)
    places = _parts(source).map_batches(find, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return places.repartition(target_num_rows_per_block=block_rows)


def find_places(batch: pa.Table, keys: ray.ObjectRef) -> pa.Table:
    """The wanted rows' places in one part; batch: its uri."""
    part, wanted = batch["part"][0].as_py(), ray.get(keys)
    positions = [i for i, key in enumerate(dataset.read_part(part, ["key"])["key"].to_pylist()) if key in wanted]
    return pa.table([[part] * len(positions), positions], schema=PLACE)


def _parts(source: dataset.Dataset) -> ray.data.Dataset:
    parts = source.part_uris
    return ray.data.from_items([{"part": uri} for uri in parts], override_num_blocks=max(1, len(parts)))
