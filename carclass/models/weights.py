"""Weights as data: named ones and files, checked by sha256 before they are opened."""

import io
import os
import pickle
import subprocess
import sys
import urllib.request
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from carclass import storage
from carclass.errors import UserError

UNPICKLE_SECONDS = 300
"""Time limit of reading a pickle: the largest of the zoo takes seconds."""


class WeightsFile(NamedTuple):
    """Where weights are and what their bytes must hash to."""

    uri: str
    sha256: str


NAMED_WEIGHTS = {
    # torchvision's IMAGENET1K_V1: better features for a linear probe than V2.
    "imagenet": WeightsFile(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    "imagenet-v2": WeightsFile(
        "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    ),
}

# What the readers raise on bytes that are damaged, or that would run code.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


def load(uri: str, sha256: str | None, *, sample: str, key: str) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by name, in the file's own dtype, and the file's sha256.

    uri: a name from NAMED, `sample` (the package's file called `sample`), or the URI of a .safetensors, .pth
    or .pkl file; key: the setting that says so, for errors. Of a training checkpoint of Detectron2, its `model` is
    taken. UserError when the file isn't there, its hash is another, or it would have to be trusted without one.
    """
    uri, sha256 = _resolve(uri, sha256, sample)
    data, found = _verified(uri, sha256, key)
    try:
        return _tensors(uri, data, key), found
    except _UNREADABLE as error:
        raise UserError(
            f"`{key}`: {uri} is damaged, or holds more than tensors by name. Save its state dict as .safetensors."
        ) from error


def fetch(uri: str, sha256: str | None, *, sample: str, cache: str, key: str) -> WeightsFile:
    """The same weights as data that every machine can open: `sample`, or a file on storage, with its sha256.

    What comes from the web or is a .pkl is kept as `<cache>/<its sha256>.safetensors`, made if it isn't there or
    isn't what was written. Parameters and errors are those of load; cache: a folder or s3:// prefix.
    """
    resolved, known = _resolve(uri, sha256, sample)
    if not _needs_trust(resolved):
        return WeightsFile("sample" if uri == "sample" else resolved, _verified(resolved, known, key)[1])
    _check_trust(resolved, known, key)
    place = storage.join(cache, f"{known}.safetensors")
    if (digest := _cached(place)) is None:
        tensors, _ = load(resolved, known, sample=sample, key=key)
        data = save_safetensors({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
        digest = storage.sha256(data)
        storage.write_bytes(place, data)
        storage.write_bytes(f"{place}.sha256", f"{digest}  {known}.safetensors\n".encode())
    return WeightsFile(place, digest)


def _cached(place: str) -> str | None:
    """The sha256 of a file that lies beside its own one, unless either is missing or they differ."""
    if not (storage.exists(place) and storage.exists(f"{place}.sha256")):
        return None
    digest = storage.sha256(storage.read_bytes(place))
    return digest if storage.read_bytes(f"{place}.sha256").split()[:1] == [digest.encode()] else None


def _resolve(uri: str, sha256: str | None, sample: str) -> tuple[str, str | None]:
    """Where a name's file is, with the hash that is known of it."""
    if uri == "sample":
        folder = resources.files("carclass.sample")
        return str(folder / sample), (folder / f"{sample}.sha256").read_text().split()[0]
    if uri in NAMED_WEIGHTS:
        return NAMED_WEIGHTS[uri].uri, sha256 or NAMED_WEIGHTS[uri].sha256
    return uri, sha256


def _needs_trust(uri: str) -> bool:
    return uri.startswith("http") or uri.endswith(".pkl")


def _check_trust(uri: str, sha256: str | None, key: str) -> None:
    if sha256 is None and _needs_trust(uri):
        raise UserError(
            f"`{key}`: {uri} is opened only with a known sha256. Download it, check it, and set `{key}_sha256`."
        )


def _verified(uri: str, sha256: str | None, key: str) -> tuple[bytes, str]:
    """A file's bytes and their sha256, which is the expected one if one is."""
    _check_trust(uri, sha256, key)
    data = _read(uri, sha256, key)
    found = storage.sha256(data)
    if sha256 not in (None, found):
        raise UserError(f"`{key}`: {uri} has sha256 {found}, expected {sha256}. The file was changed or damaged.")
    return data, found


def _read(uri: str, sha256: str | None, key: str) -> bytes:
    """A file's bytes; what comes from the web is kept in the user's cache under its hash."""
    try:
        if not uri.startswith("http"):
            return storage.read_bytes(uri)
        cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "carclass" / f"{sha256}"
        if not cached.exists():
            with urllib.request.urlopen(uri, timeout=60) as answer:  # noqa: S310 - https by NAMED or by the user's own word
                data = bytes(answer.read())
            if storage.sha256(data) != sha256:
                return data  # refused by the caller; kept, it would be refused for ever
            storage.write_bytes(str(cached), data)
        return cached.read_bytes()
    except OSError as error:
        raise UserError(f"`{key}`: {uri} cannot be read ({error}). Give the URI of a file you have.") from error


def _tensors(uri: str, data: bytes, key: str) -> dict[str, torch.Tensor]:
    if uri.endswith(".safetensors"):
        return dict(load_safetensors(data))
    if uri.endswith(".pkl"):
        return dict(load_safetensors(_unpickle(uri, data, key)))
    if uri.endswith((".pth", ".pt")):
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state = state.get("model", state) if isinstance(state, dict) else {}
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return dict(state)
        raise TypeError("no tensors by name")
    raise UserError(f"`{key}`: {uri} is none of .safetensors, .pth, .pt or .pkl.")


def _unpickle(uri: str, data: bytes, key: str) -> bytes:
    """The arrays of a pickle, as the zoo writes them, in safetensors: read by a process without powers."""
    command = [sys.executable, "-I", str(resources.files("carclass.models") / "unpickle.py")]
    try:
        done = subprocess.run(command, input=data, capture_output=True, env={}, timeout=UNPICKLE_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UserError(f"`{key}`: {uri} took more than {UNPICKLE_SECONDS} s to read and was given up.") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise UserError(
            f"`{key}`: {uri} is damaged, or holds more than arrays by name ({lines[-1]}). "
            "Save its state dict as .safetensors."
        )
    return done.stdout
