"""The index of a checkpoint: names by epoch, and a readable file with the state and the sha256 of each other file.

It is apart from the checkpoints themselves, as a listing of runs needs no PyTorch.
"""

from typing import Any

from carclass import storage
from carclass.data import formats

INDEX, WEIGHTS = "checkpoint.json", "weights.safetensors"


def checkpoint_name(epoch: int, samples: int = 0) -> str:
    """Return the name of a checkpoint after `epoch` epochs and `samples` samples of the next. Names sort by age."""
    return f"epoch-{epoch:04d}" + (f"-{samples:08d}" if samples else "")


def decode_index(uri: str, data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state and the hashes in the index of the checkpoint at `uri`."""
    index = formats.decode(data, "checkpoint", storage.join(uri, INDEX))
    return {key: value for key, value in index.items() if key not in ("format", "sha256")}, index["sha256"]


def recorded_sha256(uri: str) -> str | None:
    """Return the sha256 that a checkpoint records of its weights, without reading them; None if it doesn't exist."""
    try:
        sha256: str | None = formats.read(storage.join(uri, INDEX), "checkpoint")["sha256"].get(WEIGHTS)
    except FileNotFoundError:
        return None
    return sha256
