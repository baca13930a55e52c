"""Weights as data: named ones and files, checked by sha256 before they are opened."""

import io
import os
import pickle
import urllib.request
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from carclass import storage
from carclass.errors import UserError

ZOO = "https://dl.fbaipublicfiles.com/detectron2/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600"


class Source(NamedTuple):
    """Where named weights are and what their bytes must hash to."""

    uri: str
    sha256: str | None


NAMED = {
    # torchvision's IMAGENET1K_V1: better features for a linear probe than V2.
    "imagenet": Source(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    "imagenet-v2": Source(
        "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
        "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    ),
    # Detectron2 publishes no sha256 of it, so the user pins the one of the copy they trust.
    "zoo": Source(f"{ZOO}/model_final_f10217.pkl", None),
}

# What the readers raise on bytes that are damaged, or that would run code.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


def load(uri: str, sha256: str | None, *, sample: str, key: str) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by name, in the file's own dtype, and the file's sha256.

    uri: a name from NAMED, `sample` (the package's file called `sample`), or the URI of a .safetensors, .pth
    or .pkl file; key: the setting that says so, for errors. UserError when the file isn't there, its hash is
    another, or it would have to be trusted without one.
    """
    if uri == "sample":
        folder = resources.files("carclass.sample")
        uri, sha256 = str(folder / sample), (folder / f"{sample}.sha256").read_text().split()[0]
    name, uri, sha256 = (
        uri,
        NAMED[uri].uri if uri in NAMED else uri,
        sha256 or getattr(NAMED.get(uri), "sha256", None),
    )
    if sha256 is None and (uri.startswith("http") or uri.endswith(".pkl")):
        raise UserError(
            f"`{key}`: {name} is opened only with a known sha256. Download {uri}, check it, and set `{key}_sha256`."
        )
    data = _read(uri, sha256, key)
    found = storage.sha256(data)
    if sha256 not in (None, found):
        raise UserError(f"`{key}`: {uri} has sha256 {found}, expected {sha256}. The file was changed or damaged.")
    try:
        return _tensors(uri, data, key), found
    except _UNREADABLE as error:
        raise UserError(
            f"`{key}`: {uri} is damaged, or holds more than tensors by name. Save its state dict as .safetensors."
        ) from error


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
        # The zoo's own format: a pickle of arrays, opened only because its hash was pinned above.
        arrays = pickle.loads(data, encoding="latin1")["model"]  # noqa: S301
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    if uri.endswith((".pth", ".pt")):
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    raise UserError(f"`{key}`: {uri} is none of .safetensors, .pth, .pt or .pkl.")
