"""Formats of the stored JSON and YAML files: a number in each file, migrations of older ones, refusal of newer ones.

A file without a `format` has format 1: the number was added later. Whoever changes the keys of a kind of file raises
its number in KINDS and adds a migration from the former one. Unknown keys are ignored.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_type_hints

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from carclass import storage
from carclass.config import yaml_file
from carclass.errors import UserError

T = TypeVar("T")
Row = dict[str, Any]
NUMBER = float  # or an integer


class DamagedFileError(UserError):
    """A stored file that is empty, cut, lacks a key, or has a value of another type."""


class Kind(NamedTuple):
    """A kind of stored file."""

    keys: dict[str, Any]
    """Required keys, with dots below other keys, and their types."""
    remedy: str
    """Way out if the file is damaged."""
    format: int = 1
    """Number of the format that is written."""
    migrations: Mapping[int, Callable[[Any], Row]] = {}
    """By format: the content of the file → that of the next format. Without one, the format is read as it is."""
    former_keys: Mapping[int, dict[str, Any]] = {}
    """By format that is read as it is: its required keys, if they are others."""
    sealed_since: int | None = None
    """First format with the sha256 of the other values, as an edited file would change results."""


RUN_REMEDY = "Restore it from a backup, or delete the run's folder and run jobs/train.py again."
SWEEP_REMEDY = "Restore it from a backup, or delete the sweep's folder and run jobs/tune.py again."
PREDICT_REMEDY = "Delete the file and run jobs/predict.py again, which writes it anew."
SEAL = "record_sha256"
COUNTS = dict[str, NonNegativeInt]
MANIFEST_KEYS = {
    **{"settings": dict, "classes": list[str], "kind": str, "parts": list[str], "splits": COUNTS, "reasons": COUNTS},
    **dict.fromkeys(("inputs", "rows", "quarantined"), NonNegativeInt),
}
ADDED_SETTINGS: dict[int, Row] = {
    1: {
        "checkpoint_seconds": 60.0,
        "frozen": {"ema_decay": None, "clip_grad_norm": None, "keep_epochs": []},
        "unfrozen": {
            "ema_decay": None,
            "clip_grad_norm": None,
            "keep_epochs": [],
            "layer_decay": 1.0,
            "appearance": False,
            "micro_batch_size": None,
        },
    },
    2: {"sampling": "uniform", "loggers": ["tensorboard"]},
    3: {"refit": False, "unfrozen": {"blocks": 4}},
    4: {"augmentation": {"crop": None}, "unfrozen": {"train_size": None}},
}
"""Settings that a format of a run's config may lack, at the values that the run was trained with then."""


def _add_settings(number: int) -> Callable[[Any], Row]:
    """Return the migration of a run's settings from a format to the next one."""

    def migrate(values: Any) -> Row:
        if not isinstance(values, dict):
            return {}
        settings = {**values}
        settings.pop("checkpoint_steps", None)
        for key, added in ADDED_SETTINGS[number].items():
            if not isinstance(added, dict):
                settings.setdefault(key, added)
            elif isinstance(settings.get(key), dict):
                settings[key] = {**added, **settings[key]}
        return settings

    return migrate


def _upgrade_train(upgrade: Callable[[Any], Row]) -> Callable[[Any], Row]:
    """Return the migration of a search whose settings of training are migrated by a function."""
    return lambda values: {**values, "train": upgrade(values.get("train"))} if isinstance(values, dict) else {}


def _complete_lineage(values: Any) -> Row:
    return {"code": "unknown", "started": "unknown", "environments": [], **values} if isinstance(values, dict) else {}


def _choose_temperature(values: Any) -> Row:
    """Return a calibration of format 1, whose temperature was used in any case, with one that improves on val."""
    if not isinstance(values, dict):
        return {}
    before, after = (values.get(f"expected_calibration_error_{when}", 0.0) for when in ("before", "after"))
    fitted = values.get("temperature")
    if not all(isinstance(error, int | float) for error in (before, after)):
        return {}
    return {**values, "fitted_temperature": fitted, "temperature": fitted if after <= before else 1.0}


KINDS = {
    "manifest": Kind(
        {**MANIFEST_KEYS, "parts": dict[str, str], "quarantine": dict[str, str], "listing": str},
        "Delete the file and run the same job again: the dataset's finished parts are kept.",
        format=3,  # 2: has the hash of every file and the digest of the inputs; 3: the splits held out from train
        former_keys={1: MANIFEST_KEYS},
    ),
    "draft": Kind({"settings": dict}, "Delete the file and run the same job again."),
    "run_config": Kind(
        {"name": str, "dataset": str, "parent": str, "seed": str},
        RUN_REMEDY,
        format=5,
        migrations={number: _add_settings(number) for number in ADDED_SETTINGS},
    ),
    "lineage": Kind(
        {
            **dict.fromkeys(("parent", "parent_sha256", "dataset", "dataset_digest", "code", "started"), str),
            "environments": list,
        },
        RUN_REMEDY,
        format=2,  # has the start, and the libraries and device of each stage
        migrations={1: _complete_lineage},
    ),
    "metrics": Kind(
        {
            **{"stage": str, "epoch": PositiveInt},
            **dict.fromkeys(
                ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "time"), NUMBER
            ),
        },
        RUN_REMEDY,
    ),
    "steps": Kind({"step": PositiveInt, "loss": NUMBER}, RUN_REMEDY),
    "model": Kind(
        {
            **{"stage": str, "epoch": PositiveInt, "val_accuracy": NUMBER},
            **{"classes": list, "precision": str, "sha256": str},
            **{"model.architecture": str, "model.stride_in_1x1": bool},
            **{"model.image_size": PositiveInt, "model.dropout": NUMBER},
        },
        "Delete the file and run jobs/train.py again: finished epochs are kept.",
        format=2,  # sealed
        sealed_since=2,
    ),
    "run_model": Kind({"stage": str, "sha256": str}, "Delete the file: it is found again from the stages' models."),
    "checkpoint": Kind({"epoch": NonNegativeInt, "val_accuracies": list, "sha256": dict}, RUN_REMEDY),
    "evaluation": Kind(
        {"accuracy": NUMBER, "num_photos": PositiveInt},
        "Run jobs/evaluate.py again.",
        # 2: has the model, the dataset and the split; 3: the coverage by threshold; 4: the digests of dataset and
        # predictions, sealed
        format=4,
        migrations={
            1: lambda values: {"model_sha256": None, **values} if isinstance(values, dict) else {},
            2: lambda values: {"coverage": [], **values},
        },
        sealed_since=4,
    ),
    "divergence": Kind(
        {"epoch": PositiveInt, "step": PositiveInt, "quantity": str},
        "Delete the file: training the stage again writes it anew if it diverges.",
    ),
    "export": Kind({"model_sha256": str, "files": dict}, "Delete the file and run jobs/export.py again.", format=2),
    "budget": Kind({"budget": str}, "Delete the file: the next jobs/lineage.py run writes it again."),
    "summary": Kind({"seconds": NUMBER}, "Run jobs/pipeline.py again.", format=2),  # has the model
    "calibration": Kind(
        {"temperature": PositiveFloat, "model_sha256": str},
        PREDICT_REMEDY,
        # 2: has the temperature that was fitted beside the one to use; 3: coverage by threshold, sealed; 4: the reason
        # why the fitted one is not used
        format=4,
        migrations={1: _choose_temperature, 2: lambda values: {"coverage": [], **values}},
        sealed_since=3,
    ),
    # 2: has all up to the network's input; 3: sealed; 4: has the digest of the dataset
    "preprocessing": Kind({"reading": dict}, PREDICT_REMEDY, format=4, sealed_since=3),
    "predictions": Kind(
        {},
        "Delete the folder, or choose another `predict.name`.",
        format=2,  # without the list of photos, which may grow; 1 is read as it is: its parts have the hash of it
    ),
    "search": Kind(
        {"search": dict, "train.seed": str},
        SWEEP_REMEDY,
        format=5,
        migrations={number: _upgrade_train(_add_settings(number)) for number in ADDED_SETTINGS},
    ),
    "trials": Kind({"trials": list}, SWEEP_REMEDY, format=2, migrations={1: lambda rows: {"trials": rows}}),
}
"""All kinds of stored files."""
TYPES: dict[str, dict[str, Any]] = {
    "manifest": {
        "corrections": str,
        "held_out": dict[str, float],
        "outcomes": COUNTS,
        "source_digest": str,
        "detector_weights": str,
    },
    "steps": {"accuracy": float, "lr": float},
    "model": {"classes": list[str], "run": str},
    "checkpoint": {"val_accuracies": list[float], "sha256": dict[str, str]},
    "export": {"files": dict[str, dict[str, Any]]},
    "trials": {"trials": list[dict[str, Any]]},
}
"""Types of further values, where a file has them, and those inside lists and mappings."""


def read(uri: str, kind: str) -> Row:
    """Return the content of a file. Raise FileNotFoundError if it is missing, and UserError as `decode` does."""
    return decode(storage.read_bytes(uri), kind, uri)


def write(uri: str, kind: str, values: Row) -> None:
    """Write a file with its format; as YAML if its name ends with .yml, else as JSON."""
    content = {"format": KINDS[kind].format, **values}
    if KINDS[kind].sealed_since is not None:
        content[SEAL] = _sealing_sha256(content)
    storage.write_bytes(uri, yaml_file.dump(content) if uri.endswith(".yml") else to_json(content))


def create(uri: str, kind: str, values: Row) -> bool:
    """Write a JSON file with its format unless it exists, and return True if it was written."""
    return storage.create(uri, to_json({"format": KINDS[kind].format, **values}))


def to_json(values: Any) -> bytes:
    """Return a value as an indented JSON file, see json_text."""
    return json_text(values, indent=1, ensure_ascii=False).encode()


def json_text(value: Any, **options: Any) -> str:
    """Return a value as strict JSON. options: of json.dumps. Raise ValueError for numbers that are not finite."""
    return json.dumps(value, allow_nan=False, **options)


def decode(data: bytes, kind: str, uri: str) -> Row:
    """Return the content of a file in the format that is written today, or a former one that is read as it is.

    Raise DamagedFileError if it is no JSON or YAML or lacks a key, and UserError if it has a newer format.
    """
    try:
        content = yaml_file.parse(data.decode(), uri) if uri.endswith(".yml") else _parse_json(data)
    except (ValueError, RecursionError) as error:
        cause = str(error).removeprefix(f"{uri} is ") if data.strip() else "it is empty"
        raise damaged(kind, uri, cause) from error
    return _upgrade(content, kind, uri)


def _parse_json(data: bytes) -> Any:
    """Return the value of strict JSON. Raise ValueError for others, also for NaN, which Python's parser reads."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(data, parse_constant=refuse)


def encode_lines(kind: str, rows: Sequence[Row]) -> bytes:
    """Return rows as lines of strict JSON, each with its format; numbers that are not finite as null."""
    lines = ({"format": KINDS[kind].format, **replace_not_finite(row)} for row in rows)
    return "".join(json_text(line) + "\n" for line in lines).encode()


def decode_lines(data: bytes, kind: str, uri: str) -> list[Row]:
    """Return the rows of a file of lines, null as NaN; former versions wrote NaN.

    A last line that was cut, as by a power loss, is left out.
    """
    *lines, last = data.split(b"\n")
    rows = []
    for number, line in enumerate([*lines, *([last] if last else [])], 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            if number > len(lines) and line.startswith(b"{"):
                break
            raise damaged(kind, uri, f"line {number}: {error}") from error
        row = {key: math.nan if value is None else value for key, value in _as_mapping(content, kind, uri).items()}
        rows.append(_upgrade(row, kind, uri))
        rows[-1].pop("format", None)
    return rows


def build(cls: type[T], values: Row, kind: str, uri: str) -> T:
    """Return a dataclass of those values that are its fields. Raise DamagedFileError if one is missing or wrong."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {name: value for name, value in _as_mapping(values, kind, uri).items() if name in names}
    types = get_type_hints(cls)
    for name, value in given.items():
        _check_type(value, types[name], name, kind, uri)
    try:
        return cls(**given)
    except TypeError as error:
        raise damaged(kind, uri, str(error)) from error


def replace_not_finite(value: Any) -> Any:
    """Return a value of lists and mappings with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_not_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _upgrade(content: Any, kind: str, uri: str) -> Row:
    """Check the format and the keys of a file's content, and migrate an older one."""
    known = KINDS[kind]
    number = content.get("format", 1) if isinstance(content, dict) else 1
    if uri.endswith(".yml") and isinstance(number, str) and number.isdecimal():  # YAML's values are text
        number = int(number)
    if type(number) is not int or number < 1:
        raise damaged(kind, uri, f"`format` is {number!r}")
    if number > known.format:
        raise UserError(
            f"{uri} has format {number} and was written by a newer version of carclass; this version reads formats up "
            f"to {known.format}. Update carclass, or use the version that wrote it."
        )
    is_sealed = known.sealed_since is not None and number >= known.sealed_since
    if is_sealed and content.get(SEAL) != _sealing_sha256(content):
        raise damaged(kind, uri, f"its values are not those that were written, whose sha256 is `{SEAL}`")
    for step in range(number, known.format):
        if step in known.migrations:
            content = {**_as_mapping(known.migrations[step](content), kind, uri), "format": step + 1}
    values = _as_mapping(content, kind, uri)
    for key, type_ in known.former_keys.get(number, known.keys).items():
        value: Any = values
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise damaged(kind, uri, f"`{key}` is missing")
            value = value[name]
        _check_type(value, type_, key, kind, uri)
    for key, type_ in TYPES.get(kind, {}).items():
        if key in values:
            _check_type(values[key], type_, key, kind, uri)
    return values


def _sealing_sha256(content: Row) -> str:
    """Return the sha256 of a file's values without the seal, in any order of the keys."""
    values = {key: value for key, value in content.items() if key != SEAL}
    return storage.sha256(json_text(values, sort_keys=True).encode())


def _check_type(value: Any, type_: Any, key: str, kind: str, uri: str) -> None:
    """Raise DamagedFileError, with the first wrong value, if a value is not of a type."""
    try:
        _adapter(type_).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([key, *map(str, first["loc"])])
        found = json_text(replace_not_finite(first["input"]))
        cause = f"`{place}` {first['msg'].removeprefix('Input ')}, but is {found[:40]}"
        raise damaged(kind, uri, cause) from error


@cache
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


def _as_mapping(content: Any, kind: str, uri: str) -> Row:
    if not isinstance(content, dict):
        raise damaged(kind, uri, "it holds no keys and values")
    return content


def damaged(kind: str, uri: str, cause: str) -> DamagedFileError:
    """Return the error of a damaged file, with the remedy of its kind."""
    return DamagedFileError(f"{uri} is damaged: {' '.join(cause.split())}. {KINDS[kind].remedy}")
