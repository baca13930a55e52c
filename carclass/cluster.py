"""Joining a Ray cluster, asking it what it has, and streaming datasets through it."""

import logging
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from carclass import dataset, storage
from carclass.errors import UserError

log = logging.getLogger(__name__)
BLOCK_ROWS = 64
TASK_CPUS = 0.5
"""CPUs reserved by a reading or writing task and by an actor on a CPU: actors never hold all of a machine, which
would leave none for the tasks that feed them."""


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names (every submitted job has it), else starts one on this machine."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        _keep_token_private()
        # Idle workers stay for the next step: starting one costs seconds of imports.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
        # That a local cluster asks for its token is what we want, and no warning.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Jobs report progress themselves; what Ray has to say goes to its session's folder all the same.
    context = ray.init(
        address=address, logging_level=logging.WARNING, logging_config=ray.LoggingConfig(log_level="WARNING")
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = ray.cluster_resources()
    size = (found.get("CPU", 0), found.get("GPU", 0), len(ray.nodes()))
    log.info("Ray: %d CPUs, %d GPUs, %d node(s), dashboard %s", *size, context.dashboard_url or "off")


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


def gpus(wanted: bool | None, count: int, key: str) -> bool:
    """Whether to use GPUs; UserError when they are asked for and the cluster has fewer than count."""
    there = int(ray.cluster_resources().get("GPU", 0))
    if wanted is None:
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


def stream(
    source: dataset.Dataset,
    columns: Sequence[str],
    *,
    split: str | None = None,
    keys: ray.ObjectRef | None = None,
    block_rows: int = BLOCK_ROWS,
) -> ray.data.Dataset:
    """A dataset's rows through Ray Data, in blocks small enough to keep every process busy.

    split: only its rows; keys: a set in the object store, of the rows wanted; block_rows: rows that a process gets
    at a time. Parts are read by our own storage, as pyarrow's file systems lose their retries on the way to another
    process.
    """
    parts = ray.data.from_items([{"uri": uri} for uri in source.part_uris], override_num_blocks=len(source.part_uris))
    read = partial(read_part, columns=list(columns), split=split, keys=keys)
    rows = parts.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=TASK_CPUS)
    return rows.repartition(target_num_rows_per_block=block_rows)


def limit_read_ahead(rows: ray.data.Dataset, num_bytes: int) -> None:
    """Lets a pipeline hold so much in flight, however much memory there is.

    Without it, photos are read until the object store is full, and small blocks of them lie in the driver's own
    memory, which then grows with the number of photos.
    """
    rows.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=num_bytes
    )


def read_part(batch: pa.Table, columns: list[str], split: str | None, keys: Any) -> pa.Table:
    """The wanted rows of one part; batch: its uri."""
    filesystem, path = storage.locate(batch["uri"][0].as_py())
    filters = None if split is None else pc.field("split") == split
    if keys is not None:
        wanted = ray.get(keys)
        there = pq.read_table(path, columns=["key"], filesystem=filesystem)["key"].to_pylist()
        chosen = pc.field("key").isin([key for key in there if key in wanted])
        filters = chosen if filters is None else filters & chosen
    return pq.read_table(path, columns=columns, filesystem=filesystem, filters=filters).replace_schema_metadata()
