"""Files and variables that a submitted command needs from this machine: configs, small files named in them.

A path that would be missing on the cluster is refused before anything is uploaded.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from carclass import storage
from carclass.config import installation, yaml_file
from carclass.config.budget import Budget
from carclass.config.schema import Config
from carclass.config.search import Search
from carclass.config.section import EPOCH_OF_RUN, NAMED_PARENTS, list_path_keys
from carclass.errors import Problems, UserError

log = logging.getLogger(__name__)
CONFIG_SUFFIXES = (".yml", ".yaml")
MAX_FILE_BYTES = 20_000_000
"""Limit of a named file, so that photos and weights are not uploaded by accident."""
PATH_KEYS = {key for kind in (Config, Search, Budget) for key in list_path_keys(kind)}
"""Dotted keys of settings that are paths or URIs."""
PATH_OPTIONS = {*PATH_KEYS, *(key.partition(".")[2] for key in PATH_KEYS)} - {""}
TUNED = "train"
"""The only section of an experiment file that jobs/tune.py reads."""
JOB = re.compile(r"(?:.*/)?(\w+)\.py|(\w+)")
OPTION = re.compile(r"--([\w.-]+)(?:=(.*))?", re.DOTALL)


def find_files(command: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the files of a folder that a command and its config files name, by their paths relative to it.

    Raise UserError, with all problems, for paths that would be missing on the cluster, and for large files.
    """
    files, options, problems = _Files(folder.resolve()), dict(_options(command)), Problems()
    for key, word in options.items():
        places = (Path(word), installation.JOBS.parent / word)
        if key == "config" and _is_relative(word) and not any(place.is_file() for place in places):
            problems.add(f"config file {word or '(none)'} does not exist in {Path.cwd()}. Correct --config.")
        if key in PATH_OPTIONS and _is_local(word) and _is_relative(word) and not Path(word).is_file():
            problems.add(_missing_text(f"`--{key}`", word))
    for word in (*(word for word in command if not word.startswith("--")), *options.values()):
        if Path(word).is_file():
            problems.passes(files.add_named, Path(word))
    job = _job_name(command)
    files.configs += _included_configs(job, options)
    while files.configs:
        problems.passes(_add_paths, files, files.configs.pop(), job, options, problems)
    problems.raise_all()
    return files.found


def find_variables(files: Iterable[Path]) -> dict[str, str]:
    """Return the variables of this process, with their values, that config files name: those uploaded and in jobs/."""
    configs = [path for path in (*installation.JOBS.rglob("*"), *files) if path.suffix in CONFIG_SUFFIXES]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in configs]
    found = {match[1].partition(":-")[0] for text in texts for match in yaml_file.VARIABLE.finditer(text)}
    return {name: os.environ[name] for name in sorted(found) if os.environ.get(name)}


def digest_inputs(files: Mapping[str, Path], variables: Mapping[str, str]) -> str:
    """Return the sha256 of files, by their paths, and of variables."""
    contents = {path: storage.sha256(source.read_bytes()) for path, source in files.items()}
    return storage.sha256(json.dumps([contents, dict(variables)], sort_keys=True, allow_nan=False).encode())


class _Files:
    """Files to upload, and config files among them or in the uploaded code whose paths are not checked yet."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.configs = folder, list[Path]()
        self.found: dict[str, Path] = {}

    def add_named(self, path: Path) -> None:
        """Add a file that the command names. Raise UserError for a config file that would be missing."""
        full, is_config = path.resolve(), path.suffix in CONFIG_SUFFIXES
        if not full.is_relative_to(self.folder):
            if is_config:
                raise UserError(f"{path} is outside {self.folder} and would not be uploaded. Move it there.")
            return  # it may be on a shared file system; else the job reports that it is missing
        if path.is_absolute() and is_config:
            raise UserError(
                f"{path} is uploaded by its path in the working directory. Write {full.relative_to(self.folder)}."
            )
        self.add(full)

    def add(self, full: Path, has_paths: bool = True) -> None:
        """Add a file, unless it is part of the code. Raise UserError if it is large.

        has_paths: whether its paths are to be checked, if it is a config file.
        """
        if (size := full.stat().st_size) > MAX_FILE_BYTES:
            raise UserError(f"{full} has {size:,} bytes: only code and configs are uploaded. Put it on S3.")
        if has_paths and full.suffix in CONFIG_SUFFIXES:
            self.configs.append(full)
        if full.is_relative_to(self.folder):
            self.found[str(full.relative_to(self.folder))] = full

    def is_within(self, full: Path) -> bool:
        """Return True for a file of the folder or of the code that is uploaded."""
        return full.is_relative_to(self.folder) or full.is_relative_to(installation.JOBS)


def _add_paths(files: _Files, config: Path, job: str, options: dict[str, str], problems: Problems) -> None:
    """Add the files that a config file names; collect the paths that would be missing on the cluster.

    options: those of the command, which override. A root is added: it overrides that of an experiment file named here.
    """
    values = yaml_file.read(config)
    sections = {TUNED} if job == "tune" else {job} if job in Config.model_fields else None
    for key, value in _paths(values, ""):
        is_read = sections is None or "." not in key or key.partition(".")[0] in sections
        if not is_read or not _is_local(value) or key in options or key.partition(".")[2] in options:
            continue
        full = installation.resolve_path(Path(value).expanduser(), config.parent)
        found = [Path(each) for each in glob.glob(str(full))] if key == "experiments" else [full]
        if not _is_relative(value):
            if key == "root":
                log.warning(
                    "submit: `root` is %s: results stay on the nodes that write them, and are lost with those, unless "
                    "it is a folder that all nodes share. Otherwise give an s3:// URI",
                    full,
                )
            elif full.exists():
                log.warning("submit: `%s` is %s: the nodes of the cluster need it at the same path", key, full)
        elif key != "root" and all(each.is_file() and files.is_within(each) for each in found):
            for each in found:  # the roots of experiments are ignored
                problems.passes(files.add, each, key == "experiment")
        else:
            problems.add(_missing_text(f"`{key}` in {config.name}", value))
    if "root" in values:
        options.setdefault("root", str(values["root"]))


def _paths(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of a config file that are paths or URIs: dotted key and value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        elif isinstance(value, str) and f"{prefix}{name}" in PATH_KEYS:
            yield f"{prefix}{name}", value


def _is_local(value: str) -> bool:
    return not ("://" in value or value in NAMED_PARENTS or EPOCH_OF_RUN.fullmatch(value))


def _is_relative(value: str) -> bool:
    return not Path(value).expanduser().is_absolute()


def _missing_text(place: str, value: str) -> str:
    return (
        f"{place} is {value}, a path on this machine, which the cluster does not have. Put it on S3 and give its "
        "s3:// URI, or an absolute path that all nodes share."
    )


def _options(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command with their values, "" for one without a value."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if match := OPTION.fullmatch(word):
            value = match[2] if match[2] is not None else following
            yield match[1], "" if value.startswith("--") else value


def _job_name(command: Sequence[str]) -> str:
    """Return the name of the job in a command, such as "train"; "" if there is none."""
    words = [match[1] or match[2] for word in command if (match := JOB.fullmatch(word))]
    return next((word for word in words if word not in ("python", "carclass")), "")


def _included_configs(job: str, options: Mapping[str, str]) -> list[Path]:
    """Return the config file of the code that a job reads by name or by default."""
    experiments = installation.JOBS / "experiments"
    if job == "pipeline" and "config" not in options:
        return [experiments / "sample.yml"]
    budget = experiments / "budgets" / f"{options.get('budget', 'full')}.yml"
    return [budget] if job == "lineage" and budget.is_file() else []
