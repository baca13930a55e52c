"""Check of the places of weights files, before the libraries that open them are loaded."""

import os

from carclass import storage
from carclass.config.section import NAMED_PARENTS
from carclass.errors import UserError, suggest_beside, suggest_names

NAMES = {
    "train.parent": ("pretrained", "imagenet", "imagenet-v2", "sample"),
    "mask.detector.weights": ("zoo", "sample"),
}
"""Names of weights that a setting may have in place of a file."""


def check_weights_place(uri: str, key: str) -> None:
    """Raise UserError if weights are a local file that does not exist. key: the setting, for the message."""
    path = None if uri in NAMED_PARENTS or uri.startswith("http") else storage.local_path(uri)
    if path is not None and not os.path.lexists(path):
        raise missing_weights(uri, key)


def missing_weights(uri: str, key: str) -> UserError:
    """Return the error of a file that does not exist, with a name of weights or of a file like it."""
    path = storage.local_path(uri)
    hint = suggest_names(os.path.basename(uri), NAMES.get(key, ())) or suggest_beside(path)
    run = ", or a run's epoch, such as NAME@best" if key == "train.parent" else ""
    remedy = f"{hint[:1].upper()}{hint[1:]}" if hint else f"Give the URI of a file you have{run}."
    return UserError(f"`{key}`: {uri} cannot be read (no such file). {remedy}")
