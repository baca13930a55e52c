"""Command line of the jobs: --config FILE, and every setting of the job's section as --key VALUE."""

import argparse
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from carclass.config import yaml_file
from carclass.config.installation import MissingPackageReport, find_config
from carclass.config.schema import Config
from carclass.config.section import (
    CommandLineText,
    S,
    Section,
    Setting,
    list_settings,
    optional_sections,
    removed_settings,
    section_type,
    validate,
)
from carclass.config.stderr_filter import filter_stderr
from carclass.errors import (
    FullDiskReport,
    UserError,
    exit_on_closed_output,
    find_close_names,
    find_user_error,
    suggest_names,
)
from carclass.formatting import terminal_text, value_text

Flags = Mapping[str, dict[str, Any]]
"""Options of a job that are not settings: name → keyword arguments of `add_argument`."""
SCRIPT = re.compile(r"(?<![\w./-])(?:python )?jobs/(\w+)\.py")
"""A job as texts name it."""


class JobParser(argparse.ArgumentParser):
    """Argument parser of a job: mistakes are UserErrors, unknown options are compared with the known ones.

    usage: shown instead of the list of all options. removed: former options and their explanations.
    """

    def __init__(self, doc: str, usage: str | None = None, removed: Mapping[str, str] | None = None) -> None:
        self.removed, self.arguments, self.has_list = removed or {}, list[str](), False
        super().__init__(
            usage=usage,
            description=name_commands(doc),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the parsed arguments, by default those of the process. Raise UserError for unknown options."""
        arguments = self.arguments = list(sys.argv[1:] if argv is None else argv)
        lists = {option[2:] for action in self._actions if action.default == [] for option in action.option_strings}
        known = {option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"}
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        names = [argument[2:].split("=")[0] for argument in options if argument.startswith("--")]
        for name in names:
            if name not in known:
                if name in self.removed:
                    raise UserError(f"`--{name}` {self.removed[name]}")
                hint = suggest_names(name, sorted(known), "--") or f"see `{self.prog} --help`"
                raise UserError(f"`--{name}` is not an option of {self.prog}; {hint}")
            if names.count(name) > 1 and name not in lists:
                raise UserError(f"`--{name}` is given {names.count(name)} times. Give it once.")
        # Arguments of any number between options; not with subcommands, nor after `--`, where all are arguments.
        self.has_list = any(action.nargs == "*" and not action.option_strings for action in self._actions)
        mixed = self.has_list and "--" not in arguments
        return self.parse_intermixed_args(arguments) if mixed else self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, which cli.main reports with exit status 2."""
        raise UserError(f"{message}; {self._suggest_option() or f'see `{self.prog} --help`'}")

    def _suggest_option(self) -> str:
        """Return the spelling of the first argument that was probably meant for an option, or "" if none was."""
        known = [option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--"]
        for before, value in zip(["", *self.arguments], self.arguments, strict=False):
            key, sign, text = value.partition("=")
            if value.startswith("-") or (before.startswith("--") and "=" not in before):
                continue
            if value.endswith((".yml", ".yaml")) and "config" in known and "--config" not in self.arguments:
                return f"did you mean `--config {value}`?"
            names = [key] if key in known else find_close_names(key, known)
            if sign and names:
                return f"did you mean {' or '.join(f'`--{name} {text}`' for name in names)}?"
            if "run" in known and "--run" not in self.arguments and not sign and not self.has_list:
                return f"did you mean `--run {value}`?"
        return ""


UPDATE: Flags = {
    "update": {
        "action": "store_true",
        "help": "publish a new version of a dataset whose photos or labels have changed; only new photos are processed",
    }
}


def parse_job(doc: str, section: str | None, argv: list[str] | None = None, *, default: Path | None = None) -> Config:
    """Return the settings of one job.

    doc: text of --help. section: section whose settings are options (besides --root); None: all sections, with dotted
    keys. default: config file used without --config. Raise UserError if the section is missing or a value is wrong.
    """
    return parse_job_with_flags(doc, section, {}, argv, default=default)[0]


def parse_job_with_flags(
    doc: str,
    section: str | None,
    flags: Flags,
    argv: list[str] | None = None,
    *,
    default: Path | None = None,
    listed: str | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Return the settings of one job, as `parse_job` does, and the parsed arguments with its flags.

    listed: setting whose values may be given without its name. The first one becomes the setting, and all are in the
    arguments as `listed`.
    """
    kind = Config if section is None else section_type(Config.model_fields[section].annotation)
    assert kind is not None
    shared = [] if section is None else [setting for setting in list_settings(Config) if setting.key == "root"]
    path, overrides, args = _parse(doc, kind, [*shared, *list_settings(kind)], flags, argv, default, listed)
    prefix = "" if section is None else f"{section}."
    keys = {key: key if key == "root" else f"{prefix}{key}" for key in overrides}
    options = {keys[key]: f"--{key}" for key in overrides}
    if listed is not None and args.listed:
        options[keys[listed]] = listed.upper()
    config = load_config(path, {keys[key]: text for key, text in overrides.items()}, Config, options)
    if section is not None and getattr(config, section) is None:
        if listed is not None:
            raise UserError(
                f"no {listed} are given. Name them on the command line, or in {path} by a `{section}:` section."
            )
        raise UserError(f"{path} has no `{section}:` section, which this job reads. Add one, or choose another file.")
    return config, args


def parse_file(
    doc: str, kind: type[S], flags: Flags, argv: list[str] | None = None
) -> tuple[Path, S, argparse.Namespace]:
    """Return the config file, its settings and the parsed arguments of a job with its own kind of file."""
    path, overrides, args = _parse(doc, kind, list(list_settings(kind)), flags, argv, default=None)
    return path, load_config(path, overrides, kind), args


def _parse(
    doc: str,
    kind: type[Section],
    settings: list[Setting],
    flags: Flags,
    argv: list[str] | None,
    default: Path | None,
    listed: str | None = None,
) -> tuple[Path, dict[str, str], argparse.Namespace]:
    """Return the config file, the settings given on the command line as text, and all parsed arguments."""
    file = "--config FILE" if default is None else "[--config FILE]"
    names = "" if listed is None else f"[{listed.upper()} ...] "
    parser = JobParser(doc, f"%(prog)s {names}{file} [--key VALUE ...]", removed_settings(kind))
    parser.add_argument("--config", metavar="FILE", required=default is None, help="YAML file with the settings")
    if listed is not None:
        parser.add_argument("listed", nargs="*", metavar=listed.upper(), help=f"as --{listed}, or several")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    sections = _add_settings(parser, kind, settings)
    args = parser.parse(argv)
    if args.config == "":
        raise UserError("`--config` is empty; give a YAML file")
    if listed is not None and args.listed:
        if getattr(args, listed) is not None:
            raise UserError(f"`--{listed}` is given, and {args.listed[0]} without it. Leave one of them out.")
        setattr(args, listed, args.listed[0])
    path = find_config(args.config) if default is None or args.config else default
    values = {key: getattr(args, key) for key in (*sections, *(setting.key for setting in settings))}
    given = {key: text for key, text in values.items() if text is not None}
    if both := [key for key in given if any(key.startswith(f"{name}.") for name in sections if name in given)]:
        raise UserError(f"`--{both[0]}` has no effect, as its section is null on the command line too. Leave one out.")
    return path, given, args


def _add_settings(parser: JobParser, kind: type[Section], settings: list[Setting]) -> dict[str, str]:
    """Add an option per setting, and one per section that may be null; return the latter."""
    for setting in settings:
        metavar = setting.type_name.upper().replace("|", " | ")
        shown = "" if setting.default is None else f" [{default_text(setting.default)}]"
        parser.add_argument(
            f"--{setting.key}", metavar=metavar, help=f"{setting.explanation}{shown}".replace("%", "%%")
        )
    sections = optional_sections(kind)
    for key, explanation in sections.items():
        parser.add_argument(f"--{key}", type=_null_or_text, choices=["null"], help=explanation)
    return sections


def default_text(value: Any) -> str:
    """Return a default as it is written in YAML."""
    if isinstance(value, dict | tuple | list):
        plain = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False).strip()
    return value_text(value)


def load_config(path: Path, overrides: dict[str, str], kind: type[S], options: Mapping[str, str] | None = None) -> S:
    """Return the settings of a config file. overrides: dotted key → text; null, [lists], {mappings} are YAML.

    options: dotted key → option that gave it, for messages; by default `--key`.
    """
    values = yaml_file.read(path)
    for key, text in overrides.items():
        yaml_file.set_key(values, key, parse_value(text))
    given = {key: f"--{key}" for key in overrides} if options is None else options
    return validate(values, kind, source=path, base=Path(os.path.abspath(path)).parent, options=given)


def _null_or_text(text: str) -> str:
    """Return the spellings of null in YAML as "null"; `~` is a folder on the command line."""
    return "null" if text in ("Null", "NULL") else text


def parse_value(text: str) -> Any:
    """Return a value from the command line. Numbers stay text: the setting's type decides, a name may look like one."""
    if (text := _null_or_text(text)) != "null" and text[:1] not in ("[", "{"):
        return CommandLineText(text)
    try:
        return yaml_file.parse(text, "command line")
    except yaml_file.MalformedError:
        return CommandLineText(text)


def name_commands(text: str) -> str:
    """Return a text that names jobs as they were started: `carclass train` instead of `python jobs/train.py`.

    The command is named by its path, as `.venv/bin/carclass`, where PATH does not lead to it.
    """
    if not sys.argv[0].startswith("carclass "):
        return text
    return SCRIPT.sub(lambda match: f"{_program()} {match[1]}", text)


def _program() -> str:
    command, here = Path(sys.executable).with_name("carclass"), Path.cwd()
    if shutil.which("carclass") is not None or not command.exists():
        return "carclass"
    return str(command.relative_to(here) if command.is_relative_to(here) else command)


class LineFormatter(logging.Formatter):
    """Formatter of log lines for a terminal: names of photos may contain its control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with control characters escaped."""
        return terminal_text(name_commands(super().format(record)))


def main(job: Callable[[], None]) -> None:
    """Run a job; report a UserError as one paragraph on stderr and exit with status 2, on Ctrl-C with 130."""
    filter_stderr()
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("carclass")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray adds a handler to the root logger: lines would appear twice
    try:
        with exit_on_closed_output(), FullDiskReport(), MissingPackageReport():
            job()
    except UserError as error:
        cause = find_user_error(error)  # the text of a task's error has its traceback
        print(f"error: {terminal_text(name_commands(str(cause)))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
