"""A published network: safetensors with a JSON description, verified by sha256."""

import json
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from carclass import storage
from carclass.errors import UserError

DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""What checkpoints hold, in the words of safetensors: weights and moments, and counters of BatchNorm."""


def serialise(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file in pieces, the tensors being views of their memory.

    The library's `save` copies everything, which takes longer than hashing and writing it.
    """
    header, pieces, end = {}, [], 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [end, end + data.nbytes],
        }
        pieces.append(data.data)
        end += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def publish_model(uri: str, net: nn.Module, facts: dict[str, Any]) -> None:
    """Writes the whole network as <uri>.safetensors and, last, what is needed to use it as <uri>.json."""
    pieces = serialise(copy_to_host(net.state_dict()))
    storage.write_bytes(f"{uri}.safetensors", *pieces)
    described = json.dumps({**facts, "sha256": storage.sha256(*pieces)}, indent=1, ensure_ascii=False)
    storage.write_bytes(f"{uri}.json", described.encode())


def read_model(uri: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, facts) of a published network; UserError when it isn't there or was changed."""
    try:
        facts = json.loads(storage.read_bytes(f"{uri}.json"))
        data = storage.read_bytes(f"{uri}.safetensors")
    except FileNotFoundError as error:
        raise UserError(
            f"no model at {uri}.safetensors: the run has not finished this stage. Run jobs/train.py."
        ) from error
    if storage.sha256(data) != facts["sha256"]:
        raise UserError(f"{uri}.safetensors is damaged: its sha256 is not the one in {uri}.json. Train the run again.")
    return load(data), facts


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Tensors in channels_last are stored in the order of their dimensions.
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
