"""A published network: safetensors with a JSON description, verified by sha256."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from carclass import storage
from carclass.config.schema import ModelSettings
from carclass.config.section import validate
from carclass.data import formats
from carclass.data.formats import json_text
from carclass.errors import UserError
from carclass.models import architectures
from carclass.models.classifier import Classifier
from carclass.models.weights import first_not_finite
from carclass.runs.run import unfinished_stage

DTYPES = {torch.float32: "F32", torch.int64: "I64"}
"""Names in safetensors of the dtypes in checkpoints: weights and moments, and the counters of BatchNorm."""


def serialise(tensors: dict[str, Tensor]) -> list[bytes | memoryview]:
    """Return a safetensors file in pieces; the tensors' pieces are views of their memory.

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
    text = json_text(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def publish_model(uri: str, net: nn.Module, facts: dict[str, Any]) -> None:
    """Write a network as <uri>.safetensors and then its description as <uri>.json, with the sha256 of the former.

    facts: at least `model` (ModelSettings as a dict), `classes` and `precision`.
    """
    tensors = copy_to_host(net.state_dict())
    assert first_not_finite(tensors) is None, f"{uri}: weights that are not finite are no model"
    pieces = serialise(tensors)
    storage.write_bytes(f"{uri}.safetensors", *pieces)
    formats.write(f"{uri}.json", "model", {**facts, "sha256": storage.sha256(*pieces)})


def read_model(uri: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (state dict, facts) of a published network. Raise UserError if it is missing or damaged."""
    try:
        facts = formats.read(f"{uri}.json", "model")
        data = storage.read_bytes(f"{uri}.safetensors")
    except FileNotFoundError as error:
        raise unfinished_stage(uri) from error
    if storage.sha256(data) != facts["sha256"]:
        raise UserError(
            f"{uri}.safetensors is damaged: its sha256 is not the one in {uri}.json. Delete both files and run "
            "jobs/train.py again with the run's settings: finished epochs are kept."
        )
    tensors = load(data)
    if (name := first_not_finite(tensors)) is not None:
        raise UserError(
            f"{uri}.safetensors has weights that are not finite (first: {name}): its training diverged. Train again "
            "under another `train.name`, with a lower learning rate or `clip_grad_norm`."
        )
    return tensors, facts


def load_network(uri: str) -> tuple[Classifier, dict[str, Any]]:
    """Return (network in eval mode, facts) of a published network. Raise UserError if it is missing or damaged."""
    state, facts = read_model(uri)
    model = validate(facts["model"], ModelSettings, source=f"{uri}.json: `model`", base=Path("/"))
    net = architectures.build(model, len(facts["classes"]))
    net.load_state_dict(state)
    return net.eval(), facts


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, stored in the order of their dimensions (channels_last ones too)."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
