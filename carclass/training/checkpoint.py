"""Checkpoints: tensors as safetensors, everything else as readable JSON, each file with its sha256.

<stage>/epoch-0003/            what three epochs led to, to be used
    weights.safetensors        the average's, where weights are averaged
    checkpoint.json            written last
<stage>/epoch-0003-00000512/   and 512 samples into the fourth, to go on from; besides these two files
    optimizer.safetensors      its moments, and the weights that were averaged
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn

from carclass import storage
from carclass.errors import UserError
from carclass.progress import say
from carclass.runs.saved_model import copy_to_host, serialise

INDEX, WEIGHTS, OPTIMIZER = "checkpoint.json", "weights.safetensors", "optimizer.safetensors"
AVERAGED = "averaged."
"""Before the names of weights that were averaged, which no moment's name begins with."""


class DamagedError(UserError):
    """A checkpoint whose files are not what they were when they were written."""


class TrainedParts(NamedTuple):
    """What a stage changes."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None  # of the module's weights over the steps, a module of the same kind

    @property
    def best(self) -> nn.Module:
        """The module to validate and to use."""
        return self.module if self.average is None else self.average


class Snapshot(NamedTuple):
    """A copy of all that a checkpoint holds, which later steps don't change."""

    name: str
    tensors: dict[str, dict[str, Tensor]]  # by file
    state: dict[str, Any]


def checkpoint_name(epoch: int, samples: int = 0) -> str:
    """The name of a checkpoint; names sort by age. epoch: those completed; samples: of the next one."""
    return f"epoch-{epoch:04d}" + (f"-{samples:08d}" if samples else "")


def is_resumable(name: str) -> bool:
    """Whether a checkpoint of that name is one to go on from, rather than an epoch's result."""
    return name.count("-") > 1


def take_snapshot(name: str, trained: TrainedParts, state: dict[str, Any]) -> Snapshot:
    """Copies to memory of the host what a checkpoint of that name holds."""
    weights = copy_to_host(trained.best.state_dict())
    if not is_resumable(name):
        return Snapshot(name, {WEIGHTS: weights}, state)
    moving = _optimizer_tensors(trained.optimizer)
    if trained.average is not None:
        moving |= {
            f"{AVERAGED}{name}": tensor
            for name, tensor in copy_to_host(dict(trained.module.named_parameters())).items()
        }
    return Snapshot(name, {WEIGHTS: weights, OPTIMIZER: moving}, state)


def write_checkpoint(uri: str, snapshot: Snapshot) -> None:
    """Writes a checkpoint below a stage's folder."""
    folder, hashes = storage.join(uri, snapshot.name), {"state": _state_hash(snapshot.state)}
    for name, tensors in snapshot.tensors.items():
        pieces = serialise(tensors)
        hashes[name] = storage.sha256(*pieces)
        storage.write_bytes(storage.join(folder, name), *pieces)
    storage.write_bytes(
        storage.join(folder, INDEX), json.dumps({**snapshot.state, "sha256": hashes}, indent=1).encode()
    )


def names(uri: str) -> list[str]:
    """The checkpoints below a stage's folder, oldest first."""
    paths = [path.split("/") for path in storage.list_files(uri)]
    return sorted(path[0] for path in paths if path[1:] == [INDEX])


def resumable_names(uri: str) -> list[str]:
    """Those of them that hold all that training needs to go on, oldest first."""
    return [name for name in names(uri) if is_resumable(name)]


def verify(uri: str) -> dict[str, bytes]:
    """A checkpoint's files by name; DamagedError unless each is what its hash says."""
    tensors = (WEIGHTS, OPTIMIZER) if is_resumable(uri.rsplit("/", 1)[-1]) else (WEIGHTS,)
    try:
        files = {name: storage.read_bytes(storage.join(uri, name)) for name in (INDEX, *tensors)}
        state = json.loads(files[INDEX])
        hashes = state.pop("sha256")
        found = {"state": _state_hash(state), **{name: storage.sha256(files[name]) for name in tensors}}
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {uri} is damaged: a file is missing ({error})") from error
    except (KeyError, ValueError) as error:
        raise DamagedError(f"checkpoint {uri} is damaged: {INDEX} cannot be read ({error})") from error
    wrong = [name for name in found if found[name] != hashes.get(name)]
    if wrong:
        raise DamagedError(f"checkpoint {uri} is damaged: the sha256 of {wrong[0]} is not the one in {INDEX}")
    return files


def restore_checkpoint(uri: str, trained: TrainedParts) -> dict[str, Any]:
    """Puts a checkpoint back and returns its state; DamagedError, before anything is changed, when it isn't sound."""
    files = verify(uri)
    weights, moving = load(files[WEIGHTS]), load(files[OPTIMIZER])
    trained.best.load_state_dict(weights)
    averaged = {name.removeprefix(AVERAGED): moving.pop(name) for name in [*moving] if name.startswith(AVERAGED)}
    trained.module.load_state_dict(weights | averaged)
    _load_optimizer(trained.optimizer, moving)
    return _state(files)


def newest_valid(uri: str) -> str | None:
    """The newest to go on from, None where there is none. Damaged ones after it are removed, with a warning.

    UserError when none is sound; they are then left as they are.
    """
    damaged: list[str] = []
    for name in reversed(resumable_names(uri)):
        try:
            verify(storage.join(uri, name))
        except DamagedError as error:
            say(f"warning: {error}; going back to the checkpoint before it")
            damaged.append(name)
            continue
        remove(uri, damaged)
        return name
    if damaged:
        raise _none_valid(uri)
    return None


def restore_best(uri: str, module: nn.Module) -> dict[str, Any]:
    """Puts back the weights of the epoch with the best val accuracy, of equal ones the earliest, and returns its state.

    If it is damaged, the next best that is there, with a warning. UserError when none is sound.
    """
    scores = {}
    for name in names(uri):
        if not is_resumable(name):
            scores[name] = json.loads(storage.read_bytes(storage.join(uri, name, INDEX)))["val_accuracies"][-1]
    for name in sorted(scores, key=lambda name: (-scores[name], name)):
        try:
            files = verify(storage.join(uri, name))
        except DamagedError as error:
            say(f"warning: {error}; taking the next best epoch")
            continue
        module.load_state_dict(load(files[WEIGHTS]))
        return _state(files)
    raise _none_valid(uri)


def read_weights(uri: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, sha256 of its file) of a checkpoint; DamagedError when it isn't sound."""
    data = verify(uri)[WEIGHTS]
    return load(data), storage.sha256(data)


def recorded_sha256(uri: str) -> str | None:
    """What a checkpoint says of its weights, which aren't read; None where it isn't."""
    try:
        return str(json.loads(storage.read_bytes(storage.join(uri, INDEX)))["sha256"][WEIGHTS])
    except FileNotFoundError:
        return None


def prune(uri: str, kept: Iterable[str]) -> None:
    """Removes all checkpoints but some, and what killed runs left unfinished."""
    found = {path.split("/")[0] for path in storage.list_files(uri) if path.startswith("epoch-")}
    remove(uri, found - {*kept})


def remove(uri: str, found: Iterable[str]) -> None:
    """Deletes checkpoints; one that is half deleted is none."""
    for name in sorted(found):
        folder = storage.join(uri, name)
        if storage.exists(storage.join(folder, INDEX)):
            storage.delete(storage.join(folder, INDEX))
        storage.delete_folder(folder)


def _state(files: dict[str, bytes]) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(files[INDEX])
    del state["sha256"]
    return state


def _state_hash(state: dict[str, Any]) -> str:
    return storage.sha256(json.dumps(state, sort_keys=True).encode())


def _none_valid(uri: str) -> UserError:
    return UserError(
        f"no checkpoint in {uri} is sound. Bring one back from a backup, or delete this folder to train the stage anew."
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts, named `<parameter number>.<moment>`; the settings are in the run's config."""
    states = optimizer.state_dict()["state"]
    return copy_to_host({f"{i}.{name}": torch.as_tensor(value) for i, s in states.items() for name, value in s.items()})


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        like = parameters[int(number)]
        # In the parameter's memory format, as it was: in another one the arithmetic is slower and rounds differently.
        fits = value.shape == like.shape
        state.setdefault(int(number), {})[name] = torch.empty_like(like).copy_(value) if fits else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
