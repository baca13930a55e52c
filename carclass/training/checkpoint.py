"""Checkpoints: tensors as safetensors, everything else as readable JSON, each file with its sha256.

<stage>/epoch-0003/            the result of three epochs
    weights.safetensors        the moving average's, if there is one
    checkpoint.json            state and hashes, written last
<stage>/epoch-0003-00000512/   512 samples later, to resume from: in addition
    optimizer.safetensors      moments, and with a moving average the weights that are trained
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn

from carclass import storage
from carclass.data import formats
from carclass.data.formats import json_text
from carclass.errors import UserError
from carclass.models.classifier import Classifier
from carclass.models.weights import first_not_finite
from carclass.progress import print_line
from carclass.runs.checkpoint_index import INDEX, WEIGHTS, decode_index
from carclass.runs.saved_model import copy_to_host, serialise
from carclass.training.learner import Learner

OPTIMIZER = "optimizer.safetensors"
AVERAGED = "averaged."
"""Prefix of the names of trained weights in the optimizer's file, if there is a moving average."""


class DamagedError(UserError):
    """A checkpoint that has a missing or changed file, or weights that are not finite."""


class Snapshot(NamedTuple):
    """The content of a checkpoint, copied to the host's memory."""

    name: str
    tensors: dict[str, dict[str, Tensor]]  # by file
    state: dict[str, Any]


def is_resumable(name: str) -> bool:
    """Return True if a checkpoint of that name has the optimizer's state; False if it is the result of an epoch."""
    return name.count("-") > 1


def trained_module(net: Classifier, stage: str) -> nn.Module:
    """Return the module in the checkpoints of a stage: the classifier (frozen) or the whole network (unfrozen)."""
    return net.fc if stage == "frozen" else net


def take_snapshot(name: str, learner: Learner, state: dict[str, Any]) -> Snapshot:
    """Copy the content of a checkpoint of that name to the host's memory. state: values for JSON."""
    weights = copy_to_host(learner.eval_module.state_dict())
    if not is_resumable(name):
        return Snapshot(name, {WEIGHTS: weights}, state)
    tensors = _optimizer_tensors(learner.optimizer)
    if learner.ema is not None:
        trained = copy_to_host(dict(learner.module.named_parameters()))
        tensors |= {f"{AVERAGED}{name}": tensor for name, tensor in trained.items()}
    return Snapshot(name, {WEIGHTS: weights, OPTIMIZER: tensors}, state)


def write_checkpoint(uri: str, snapshot: Snapshot) -> None:
    """Write a checkpoint to a stage's folder."""
    folder, state = storage.join(uri, snapshot.name), formats.replace_not_finite(snapshot.state)
    hashes = {"state": _state_hash(state)}
    for name, tensors in snapshot.tensors.items():
        pieces = serialise(tensors)
        hashes[name] = storage.sha256(*pieces)
        storage.write_bytes(storage.join(folder, name), *pieces)
    formats.write(storage.join(folder, INDEX), "checkpoint", {**state, "sha256": hashes})


def names(uri: str) -> list[str]:
    """Return the names of a stage's checkpoints, oldest first."""
    paths = [path.split("/") for path in storage.list_files(uri)]
    return sorted(path[0] for path in paths if path[1:] == [INDEX])


def resumable_names(uri: str) -> list[str]:
    """Return the names of the checkpoints that training can resume from, oldest first."""
    return [name for name in names(uri) if is_resumable(name)]


def verify(uri: str) -> dict[str, bytes]:
    """Return a checkpoint's files by name. Raise DamagedError if one is missing or has another sha256."""
    tensors = (WEIGHTS, OPTIMIZER) if is_resumable(uri.rsplit("/", 1)[-1]) else (WEIGHTS,)
    try:
        files = {name: storage.read_bytes(storage.join(uri, name)) for name in (INDEX, *tensors)}
        state, expected = decode_index(uri, files[INDEX])
        hashes = {"state": _state_hash(state), **{name: storage.sha256(files[name]) for name in tensors}}
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {uri} is damaged: a file is missing ({error})") from error
    except formats.DamagedFileError as error:
        raise DamagedError(f"checkpoint {uri} is damaged: {INDEX} cannot be read ({error})") from error
    damaged = [name for name in hashes if hashes[name] != expected.get(name)]
    if damaged:
        raise DamagedError(f"checkpoint {uri} is damaged: the sha256 of {damaged[0]} is not the one in {INDEX}")
    return files


def restore_checkpoint(uri: str, learner: Learner) -> dict[str, Any]:
    """Load a checkpoint into a learner and return its state. Raise DamagedError before any change if it is damaged."""
    files = verify(uri)
    weights, tensors = _load_finite(uri, files[WEIGHTS]), load(files[OPTIMIZER])
    learner.eval_module.load_state_dict(weights)
    trained = {name.removeprefix(AVERAGED): tensors.pop(name) for name in [*tensors] if name.startswith(AVERAGED)}
    learner.module.load_state_dict(weights | trained)
    _load_optimizer(learner.optimizer, tensors)
    return _state(uri, files)


def newest_valid(uri: str) -> str | None:
    """Return the name of the newest intact checkpoint to resume from; None if there is no checkpoint.

    Remove newer, damaged ones with a warning. If all are damaged, leave them and raise UserError.
    """
    damaged: list[str] = []
    for name in reversed(resumable_names(uri)):
        try:
            _load_finite(storage.join(uri, name), verify(storage.join(uri, name))[WEIGHTS])
        except DamagedError as error:
            print_line(f"warning: {error}; falling back to the previous checkpoint")
            damaged.append(name)
            continue
        remove(uri, damaged)
        return name
    if damaged:
        raise _all_damaged(uri)
    return None


def restore_best(uri: str, module: nn.Module) -> dict[str, Any]:
    """Load the weights of the first epoch with the highest val accuracy and return its state.

    If its checkpoint is damaged, warn and load the next best. Raise UserError if all are damaged.
    """
    scores = {}
    for name in names(uri):
        if not is_resumable(name):
            try:
                index = formats.read(storage.join(uri, name, INDEX), "checkpoint")
            except formats.DamagedFileError as error:
                print_line(f"warning: {error}; using another epoch")
            else:
                scores[name] = index["val_accuracies"][-1]
    for name in sorted(scores, key=lambda name: (-scores[name], name)):
        try:
            files = verify(storage.join(uri, name))
            weights = _load_finite(storage.join(uri, name), files[WEIGHTS])
        except DamagedError as error:
            print_line(f"warning: {error}; using the next best epoch")
            continue
        module.load_state_dict(weights)
        return _state(storage.join(uri, name), files)
    raise _all_damaged(uri)


def restore_last(uri: str, module: nn.Module) -> dict[str, Any]:
    """Load the weights of the last epoch and return its state. Raise DamagedError if they are damaged."""
    last = storage.join(uri, max(name for name in names(uri) if not is_resumable(name)))
    files = verify(last)
    module.load_state_dict(_load_finite(last, files[WEIGHTS]))
    return _state(last, files)


def read_weights(uri: str) -> tuple[dict[str, Tensor], str]:
    """Return a checkpoint's (state dict, sha256 of its file). Raise DamagedError if it is damaged."""
    data = verify(uri)[WEIGHTS]
    return _load_finite(uri, data), storage.sha256(data)


def prune(uri: str, kept: Iterable[str]) -> None:
    """Delete all checkpoints but those named, also incomplete ones of killed runs."""
    existing = {path.split("/")[0] for path in storage.list_files(uri) if path.startswith("epoch-")}
    remove(uri, existing - {*kept})


def remove(uri: str, removed: Iterable[str]) -> None:
    """Delete checkpoints, their index first, so that an interrupted deletion leaves no checkpoint."""
    for name in sorted(removed):
        folder = storage.join(uri, name)
        if storage.exists(storage.join(folder, INDEX)):
            storage.delete(storage.join(folder, INDEX))
        storage.delete_folder(folder)


def _load_finite(uri: str, data: bytes) -> dict[str, Tensor]:
    """Return the weights in a checkpoint's file. Raise DamagedError if any is not finite."""
    weights = load(data)
    if (name := first_not_finite(weights)) is not None:
        raise DamagedError(
            f"checkpoint {uri} has weights that are not finite (first: {name}): training diverged before it. Start a "
            "run of another `train.name` with a lower learning rate or `clip_grad_norm`"
        )
    return weights


def _state(uri: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return the state of a checkpoint; a loss that was not finite is NaN."""
    state, _ = decode_index(uri, files[INDEX])
    steps = [[math.nan if value is None else value for value in step] for step in state.get("steps", [])]
    return {**state, "steps": steps} if steps else state


def _state_hash(state: dict[str, Any]) -> str:
    return storage.sha256(json_text(state, sort_keys=True).encode())


def _all_damaged(uri: str) -> UserError:
    return UserError(
        f"all checkpoints in {uri} are damaged or not finite. Restore one from a backup, or delete this folder to "
        "restart the stage."
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return moments and step counts, named `<parameter index>.<moment>`; settings are in the run's config."""
    states = optimizer.state_dict()["state"]
    return copy_to_host({f"{i}.{name}": torch.as_tensor(value) for i, s in states.items() for name, value in s.items()})


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # Moments in the parameter's memory format: in another one arithmetic is slower and rounds differently.
        is_moment = value.shape == parameter.shape
        state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(value) if is_moment else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
