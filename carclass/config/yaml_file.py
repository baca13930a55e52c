"""Reader of config files: YAML with `${NAME}` and `${NAME:-default}` from the environment."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from carclass.errors import UserError


def read(path: str | Path) -> dict[str, Any]:
    """Return the file's keys and values, with `${NAME}` replaced. Raise UserError if it is not a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}. Give an existing file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text ({error}). Check that it is the right file.") from error
    try:
        values = yaml.safe_load(re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: _environment(m, path), text))
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} holds no settings. See docs/configuration.md.")
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, creating missing sections."""
    *steps, last = key.split(".")
    for step in steps:
        if not isinstance(values.get(step), dict):
            values[step] = {}
        values = values[step]
    values[last] = value


def _environment(match: re.Match[str], path: str | Path) -> str:
    name, default = match.groups()
    value = os.environ.get(name)
    if default is not None and not value:  # as in the shell, `:-` replaces an empty value too
        value = default
    if value is None:
        raise UserError(f"config file {path} uses ${{{name}}}, which is not set. Run `export {name}=…` first.")
    return value
