"""Check that local folders are the same on all hosts of a cluster."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carclass import storage
from carclass.errors import UserError

HEAD_BYTES = 2**20
"""Bytes of a file that are compared."""


def check_shared(folders: Mapping[str, str]) -> None:
    """Raise UserError if a local folder or file is not the same on all nodes of the cluster.

    folders: setting → URI. A file of each is compared; in the root, a file written for this purpose.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for setting, uri in folders.items():
        path = storage.local_path(uri)
        if path is None or len(nodes) < 2:
            continue
        with _sample_file(path, is_root=setting == "root") as file:
            if file is None:
                continue
            expected = head_digest(file)
            for node in nodes:
                if _digest_on(node["NodeID"], file) != expected:
                    raise UserError(
                        f"`{setting}`: {uri} is not the same on node {node['NodeManagerHostname']} of the cluster as "
                        "here. Use an s3:// prefix, or a network folder that all nodes mount at this path."
                    )


@contextmanager
def _sample_file(path: str, *, is_root: bool) -> Iterator[str | None]:
    """Yield the path of a file in a folder, None if it has none."""
    if not is_root:
        yield path if os.path.isfile(path) else _first_file(path)
        return
    probe = os.path.join(path, f".probe-{uuid4().hex}")
    storage.write_bytes(probe, probe.encode())
    try:
        yield probe
    finally:
        storage.delete(probe)


def _first_file(folder: str) -> str | None:
    return next((os.path.join(path, files[0]) for path, _, files in os.walk(folder) if files), None)


def _digest_on(node_id: str, file: str) -> str | None:
    strategy: Any = NodeAffinitySchedulingStrategy(node_id, soft=True)  # a node lost meanwhile needs no check
    task: Any = ray.remote(num_cpus=0, scheduling_strategy=strategy)(head_digest)
    digest: str | None = ray.get(task.remote(file))
    return digest


def head_digest(file: str) -> str | None:
    """Return the sha256 of the beginning of a file, None if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return storage.sha256(opened.read(HEAD_BYTES))
    except OSError:
        return None
