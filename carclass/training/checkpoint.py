"""Checkpoints: tensors as safetensors, everything else as readable JSON, each file with its sha256."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from carclass import storage
from carclass.errors import UserError

INDEX = "checkpoint.json"


def save_folder(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Writes weights.safetensors, optimizer.safetensors and checkpoint.json with the state and their hashes."""
    save_file(_contiguous(module.state_dict()), folder / "weights.safetensors")
    save_file(_optimizer_tensors(optimizer), folder / "optimizer.safetensors")
    hashes = {path.name: storage.sha256(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}
    (folder / INDEX).write_text(json.dumps({**state, "sha256": hashes}, indent=1))


def load_folder(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint back and returns its state; UserError when a file is not what its hash says."""
    state: dict[str, Any] = json.loads((folder / INDEX).read_text())
    for name, expected in state["sha256"].items():
        if storage.sha256((folder / name).read_bytes()) != expected:
            raise UserError(
                f"{folder / name} is damaged: its sha256 is not the one in {INDEX}. Delete this checkpoint."
            )
    module.load_state_dict(load_file(folder / "weights.safetensors"))
    _load_optimizer(optimizer, load_file(folder / "optimizer.safetensors"))
    return state


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts, named `<parameter number>.<moment>`; the settings are in the run's config."""
    states = optimizer.state_dict()["state"]
    return _contiguous({f"{i}.{name}": torch.as_tensor(value) for i, s in states.items() for name, value in s.items()})


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def publish_model(uri: str, net: nn.Module, facts: dict[str, Any]) -> None:
    """Writes the whole network as <uri>.safetensors and, last, what is needed to use it as <uri>.json."""
    data = save(_contiguous(net.state_dict()))
    storage.write_bytes(f"{uri}.safetensors", data)
    described = json.dumps({**facts, "sha256": storage.sha256(data)}, indent=1, ensure_ascii=False)
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


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
