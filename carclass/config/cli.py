"""The jobs' command line: --config FILE, and every setting of the job's section as --key value."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic_core import PydanticUndefined

from carclass.config import yaml_file
from carclass.config.schema import Config
from carclass.config.section import CommandLineText, S, Section, section_type, validate
from carclass.errors import UserError


def list_settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, str, str]]:
    """(dotted key, default, type, explanation) of every setting in a section, depth first."""
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None and get_origin(field.annotation) is not dict:
            yield from list_settings(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.default is PydanticUndefined else field.default
        explanation = " ".join((field.description or _inherited(section, name)).split())
        yield f"{prefix}{name}", default, _type_name(field.annotation), explanation


def _inherited(section: type[Section], name: str) -> str:
    """What the parent section says of a setting whose default alone was changed."""
    parents = [parent for parent in section.__mro__[1:] if issubclass(parent, Section)]
    said = (parent.model_fields[name].description for parent in parents if name in parent.model_fields)
    return next((text for text in said if text), "")


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is dict:
        return "mapping"
    if hasattr(annotation, "__args__"):
        options = [str(option) if isinstance(option, str) else _type_name(option) for option in annotation.__args__]
        return "|".join(option for option in options if option != "NoneType")
    return getattr(annotation, "__name__", str(annotation))


def parse_job(doc: str, section: str | None, argv: list[str] | None = None) -> Config:
    """The settings of one job.

    section: the section whose settings are `--key value` (besides --root); None takes every section's, with
    dotted keys. UserError when the file lacks the section or a value is wrong.
    """
    kind = Config if section is None else section_type(Config.model_fields[section].annotation)
    assert kind is not None
    options = [*([] if section is None else [s for s in list_settings(Config) if s[0] == "root"]), *list_settings(kind)]
    path, given = _arguments(doc, options, {}, argv, required=section is not None)
    overrides = {key if key == "root" or section is None else f"{section}.{key}": given[key] for key in given}
    config = load_config(path, overrides, Config)
    if section is not None and getattr(config, section) is None:
        raise UserError(f"{path} has no `{section}:` section, which this job reads. Add one, or choose another file.")
    return config


def parse_own_file(
    doc: str, kind: type[S], flags: dict[str, str], argv: list[str] | None = None
) -> tuple[Path, S, set[str]]:
    """(path, settings, flags given) of a job whose file is of a kind of its own. flags: name → explanation."""
    path, given = _arguments(doc, list(list_settings(kind)), flags, argv, required=True)
    overrides = {key: value for key, value in given.items() if key not in flags}
    return path, load_config(path, overrides, kind), {*given} & {*flags}


def _arguments(
    doc: str, options: list[tuple[str, Any, str, str]], flags: dict[str, str], argv: list[str] | None, *, required: bool
) -> tuple[Path, dict[str, Any]]:
    """The file and what else was given. options: as `settings` has them."""
    parser = argparse.ArgumentParser(
        # The list of all settings belongs to --help: an error shall stay one paragraph.
        usage="%(prog)s --config FILE [--key value ...]" if required else "%(prog)s [--config FILE] [--key value ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=required, help="YAML file, see jobs/experiments/")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_const", const=True, help=text)
    for key, default, type_name, explanation in options:
        text = f"{explanation} [{default}]" if default is not None else explanation
        parser.add_argument(f"--{key}", metavar=type_name.upper().replace("|", " | "), help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    path = Path(given.pop("config") or sample_config())
    return path, {key: value for key, value in given.items() if value is not None}


def sample_config() -> Path:
    """The embedded sample's config file."""
    return Path(__file__).parent.parent / "jobs" / "experiments" / "sample.yml"


def load_config(path: Path, overrides: dict[str, str], kind: type[S]) -> S:
    """A config file with dotted keys replaced; `null`, [lists] and {mappings} are read as YAML."""
    values = yaml_file.read(path)
    for key, text in overrides.items():
        yaml_file.set_key(values, key, _value(text))
    return validate(values, kind, source=path, base=Path(os.path.abspath(path)).parent)


def _value(text: str) -> Any:
    """What a value typed by the user stands for. Numbers are left to the setting's type: a name may look like one."""
    if text != "null" and text[:1] not in ("[", "{"):
        return CommandLineText(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return CommandLineText(text)


def main(job: Callable[[], None]) -> None:
    """Runs a job; a user's mistake becomes one paragraph on stderr and exit status 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("carclass")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # Ray gives the root logger a handler of its own: what we say would appear twice
    try:
        job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
