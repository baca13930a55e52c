"""Pretrained weights: named ones and files, verified by sha256 before they are opened.

Downloads and pickles of unknown sha256 are trusted on first use: the publisher's prefix in the file name is checked,
and the sha256 is recorded and required from then on.
"""

import hashlib
import http.client
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from carclass import storage
from carclass.errors import UserError
from carclass.models.download import failure_text, fetch
from carclass.models.weights_place import missing_weights

UNPICKLE_SECONDS = 300
"""Time limit for reading a pickle; the largest of the zoo takes seconds."""


class WeightsFile(NamedTuple):
    """Location and sha256 of a weights file."""

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

PUBLISHED_PREFIX = re.compile(r"(?:model_final_([0-9a-f]{6})\.pkl|-(?=\d*[a-f])([0-9a-f]{8})\.pth)$")
"""Start of a file's md5 in the names of Detectron2's model zoo, and of its sha256 in those of torch hub. Eight digits
without a letter are a date."""

# Raised by the readers for damaged bytes and for pickles that would run code.
_READ_ERRORS = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


def load_weights(
    uri: str, sha256: str | None, *, sample: str, key: str, cache: str | None = None
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict of a weights file, in the file's dtypes, and the file's sha256.

    uri: a name in NAMED_WEIGHTS, `sample` for the file named by the argument `sample` in carclass.sample, or the URI
    of a .safetensors, .pth, .pt or .pkl file; of a Detectron2 training checkpoint, `model` is read. key: the setting,
    for error messages. cache: a folder or s3:// prefix, where the unknown sha256 of a download or pickle is recorded.
    Raise UserError if the file is missing or damaged, or has another hash.
    """
    uri, sha256 = _resolve(uri, sha256, sample)
    record = _record_uri(uri, cache) if sha256 is None and cache is not None and _is_pinned(uri) else None
    data, actual = _read_verified(uri, sha256, key, record)
    try:
        tensors = _parse(uri, data, key)
    except _READ_ERRORS as error:
        raise UserError(
            f"`{key}`: {uri} is damaged, or is not a plain state dict. Save its state dict as .safetensors."
        ) from error
    if (name := first_not_finite(tensors)) is not None:
        raise UserError(f"`{key}`: {uri} has values that are not finite (first: {name}). Choose other weights.")
    if record is not None and not storage.create(record, f"{actual}  {uri}\n".encode()):
        _check_sha256(actual, _recorded_sha256(record, key), uri, key, record)  # by another job meanwhile
    return tensors, actual


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity; None if there is none."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def _is_finite(tensor: torch.Tensor) -> bool:
    # The sum is several times faster, and not finite if a value is not; that of finite values may overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def cache_weights(uri: str, sha256: str | None, *, sample: str, cache: str, key: str) -> WeightsFile:
    """Return a verified weights file that every node can open: `sample`, or a file on storage.

    Downloads and .pkl files are converted once to `<cache>/<sha256>.safetensors`, and again if that file is missing
    or damaged. cache: a folder or s3:// prefix; other parameters and errors as in load_weights.
    """
    resolved, expected = _resolve(uri, sha256, sample)
    if not _is_pinned(resolved):
        return WeightsFile("sample" if uri == "sample" else resolved, _read_verified(resolved, expected, key)[1])
    expected = expected or _recorded_sha256(_record_uri(resolved, cache), key)
    cached = storage.join(cache, f"{expected}.safetensors")
    if expected is None or (digest := _verified_digest(cached)) is None:
        tensors, expected = load_weights(resolved, sha256, sample=sample, key=key, cache=cache)
        data = save_safetensors({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
        cached, digest = storage.join(cache, f"{expected}.safetensors"), storage.sha256(data)
        storage.write_bytes(cached, data)
        storage.write_bytes(f"{cached}.sha256", f"{digest}  {expected}.safetensors\n".encode())
    return WeightsFile(cached, digest)


def converted_from(uri: str) -> str | None:
    """Return the sha256 of the file that a file in the cache was converted from, which is its name; None for others."""
    name = uri.rsplit("/", 1)[-1].removesuffix(".safetensors")
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _verified_digest(uri: str) -> str | None:
    """Return the sha256 of a file if it equals the one in `<uri>.sha256`; None if either is missing or they differ."""
    if not (storage.exists(uri) and storage.exists(f"{uri}.sha256")):
        return None
    digest = storage.sha256(storage.read_bytes(uri))
    return digest if storage.read_bytes(f"{uri}.sha256").split()[:1] == [digest.encode()] else None


def _resolve(uri: str, sha256: str | None, sample: str) -> tuple[str, str | None]:
    """Return the URI and the expected sha256 of a name or URI."""
    if uri == "sample":
        folder = resources.files("carclass.sample")
        return str(folder / sample), sha256 or (folder / f"{sample}.sha256").read_text().split()[0]
    if uri in NAMED_WEIGHTS:
        return NAMED_WEIGHTS[uri].uri, sha256 or NAMED_WEIGHTS[uri].sha256
    return uri, sha256


def _is_pinned(uri: str) -> bool:
    """Return True for downloads and pickles, which are opened with the sha256 of their first use only."""
    return uri.startswith("http") or uri.endswith(".pkl")


def _record_uri(uri: str, cache: str) -> str:
    """Return the URI of the record of a file's sha256."""
    return storage.join(cache, "first_use", f"{storage.sha256(uri.encode())[:16]}.sha256")


def _recorded_sha256(record: str, key: str) -> str | None:
    """Return the sha256 in a record; None if there is no record. Raise UserError if it is damaged."""
    try:
        text = storage.read_bytes(record).decode(errors="replace")
    except FileNotFoundError:
        return None
    if (match := re.match(r"([0-9a-f]{64}) ", text)) is None:
        raise UserError(f"`{key}`: {record}, the record of the weights' sha256, is damaged. Delete it.")
    return match[1]


def _read_verified(uri: str, sha256: str | None, key: str, record: str | None = None) -> tuple[bytes, str]:
    """Return a file's bytes and sha256; raise UserError if another is given, recorded or published."""
    expected = sha256 or (record and _recorded_sha256(record, key)) or None
    data = _read(uri, expected, key)
    actual = storage.sha256(data)
    _check_sha256(actual, expected, uri, key, record)
    if expected is None and _is_pinned(uri):
        _check_published(uri, data, actual, key)
    return data, actual


def _check_sha256(actual: str, expected: str | None, uri: str, key: str, record: str | None) -> None:
    """Raise UserError if a file has another sha256. record: of the expected one, None if it is a setting."""
    if expected in (None, actual):
        return
    if record is None:
        raise UserError(f"`{key}`: {uri} has sha256 {actual}, expected {expected}. The file was changed or damaged.")
    raise UserError(
        f"`{key}`: {uri} has sha256 {actual}, but had {expected} at its first use, recorded in {record}. The file was "
        f"changed or damaged. Restore it, or set `{key}_sha256` to the new hash if you trust it."
    )


def _check_published(uri: str, data: bytes, sha256: str, key: str) -> None:
    """Raise UserError if the start of the hash in a file's name is not that of its bytes."""
    match = PUBLISHED_PREFIX.search(uri)
    if match is None:
        return
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    for kind, actual, prefix in (("md5", md5, match[1]), ("sha256", sha256, match[2])):
        if prefix is not None and not actual.startswith(prefix):
            raise UserError(
                f"`{key}`: {uri} has the {kind} {actual}, which by its name begins with {prefix}. The file was changed "
                f"or damaged: fetch it again, or set `{key}_sha256` to {sha256} if you trust it."
            )


def _read(uri: str, sha256: str | None, key: str) -> bytes:
    """Return a file's bytes; keep downloads in the user's cache directory, named by their hash."""
    try:
        return _download(uri, sha256) if uri.startswith("http") else storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise missing_weights(uri, key) from error
    except (OSError, http.client.HTTPException) as error:
        if uri.startswith("http"):
            raise UserError(f"`{key}`: {uri} cannot be read {failure_text(error, key)}") from error
        raise UserError(f"`{key}`: {uri} cannot be read ({error}). Give the URI of a file you have.") from error


def _download(uri: str, sha256: str | None) -> bytes:
    """Return the bytes of a download from the cache; fetch them if they are missing or damaged there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "carclass"
    if sha256 is not None and (folder / sha256).exists():
        data = (folder / sha256).read_bytes()
        if storage.sha256(data) == sha256:
            return data
    data = fetch(uri)
    actual = storage.sha256(data)
    if sha256 in (None, actual):  # other bytes are rejected by the caller; a retry downloads them again
        storage.write_bytes(str(folder / actual), data)
    return data


def _parse(uri: str, data: bytes, key: str) -> dict[str, torch.Tensor]:
    """Return the state dict in a file's bytes, by the extension of its URI."""
    if uri.endswith(".safetensors"):
        return dict(load_safetensors(data))
    if uri.endswith(".pkl"):
        return dict(load_safetensors(_unpickle(uri, data, key)))
    if uri.endswith((".pth", ".pt")):
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state = state.get("model", state) if isinstance(state, dict) else {}
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return dict(state)
        raise TypeError("not a dict of tensors")
    raise UserError(f"`{key}`: {uri} must end in .safetensors, .pth, .pt or .pkl.")


def _unpickle(uri: str, data: bytes, key: str) -> bytes:
    """Convert a pickled dict of arrays, the zoo's format, to safetensors in a sandboxed subprocess."""
    command = [sys.executable, "-I", str(resources.files("carclass.models") / "unpickle.py")]
    try:
        done = subprocess.run(command, input=data, capture_output=True, env={}, timeout=UNPICKLE_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"`{key}`: {uri} was not read within {UNPICKLE_SECONDS} s. Save its state dict as .safetensors."
        ) from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(
            f"`{key}`: {uri} is damaged, or is not a plain dict of arrays ({lines[-1]}). "
            "Save its state dict as .safetensors."
        )
    return done.stdout
