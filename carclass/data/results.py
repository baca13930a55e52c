"""Places of results, as given to the functions that load them in Python."""

import os
from typing import NamedTuple

from carclass.errors import UserError


class ResultPlace(NamedTuple):
    """A result's folder, `<root>/<folder>/<name>`."""

    root: str
    folder: str
    name: str


def split_place(uri: str | os.PathLike[str]) -> ResultPlace:
    """Return the parts of a result's URI; a local path is made absolute."""
    text = os.fspath(uri).rstrip("/")
    return ResultPlace(*(text if "://" in text else os.path.abspath(text)).rsplit("/", 2))


def find_place(uri: str | os.PathLike[str], folder: str, kind: str) -> ResultPlace:
    """Return the parts of the URI of a result in its own folder. Raise UserError if it is in another one."""
    place = split_place(uri)
    if place.folder != folder:
        raise UserError(f"{os.fspath(uri)} is not a {kind}. Give the folder <root>/{folder}/<name>.")
    return place
