"""Base class of all settings: typed, strict about keys, with paths relative to the file that contains them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from carclass.config.installation import resolve_path
from carclass.config.yaml_file import FileValues
from carclass.errors import UserError, suggest_names

NAMED_DETECTORS = ("mask_rcnn_r50_fpn", "faster_rcnn_r101_fpn", "torchvision_mask_rcnn_v2", "sample")
NAMED_PARENTS = ("pretrained", "imagenet", "imagenet-v2", "sample", "zoo", *NAMED_DETECTORS)
"""Names of weights, detectors and the embedded sample that are accepted in place of a path."""
EPOCH_OF_RUN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._=-]*)@([1-9][0-9]*|best|last)")
"""Syntax of a run's epoch."""
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


class CommandLineText(str):
    """A value from the command line: as a path, it is relative to the working directory."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    """Return a local path as absolute, so that no worker depends on its working directory."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; give a path or URI")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("is not UTF-8; rename the file or folder")
    if isinstance(value, str) and value.startswith("s3:") and not re.match("s3://[^/]", value):
        raise ValueError("an S3 URI is written s3://bucket/prefix")
    is_name = value in NAMED_PARENTS and info.field_name != "root"
    if not isinstance(value, str) or is_name or "://" in value:
        return value
    base = Path.cwd() if isinstance(value, CommandLineText) else (info.context or {}).get("base", Path.cwd())
    return str(resolve_path(Path(value).expanduser(), base))


def _resolve_parent(value: Any, info: ValidationInfo) -> Any:
    """Return the epoch of a run unchanged, and anything else as the URI of weights."""
    if isinstance(value, str) and EPOCH_OF_RUN.fullmatch(value):
        return str(value)
    if isinstance(value, str) and "@" in value and "/" not in value and not value.endswith(WEIGHTS_SUFFIXES):
        raise ValueError("an epoch of a run is written NAME@12, NAME@best or NAME@last")
    return _resolve(value, info)


NAME_PATTERN, SHA256_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._=-]{0,199}$", r"^[0-9a-f]{64}$"
MESSAGES = {
    "model_type": "must be a section of settings (key: value)",
    "dict_type": "must be a mapping (key: value)",
    "tuple_type": "must be a list, such as [1, 2]",
    "invalid_key": "is not the name of a setting",
    "string_type": "must be text",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
}
"""Texts for those of pydantic's error types whose own texts speak of Python."""
LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
"""Limits of numbers, by the keys of pydantic's errors."""
PATTERN_MESSAGES = {
    NAME_PATTERN: "a name has up to 200 letters a-z or A-Z, digits and . _ = - and begins with a letter or digit",
    SHA256_PATTERN: "a sha256 has 64 digits 0-9 or a-f",
}
Uri = Annotated[str, BeforeValidator(_resolve)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Parent = Annotated[str, BeforeValidator(_resolve_parent)]
Share = Annotated[float, Field(ge=0, le=1)]
ProperShare = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]


class Section(BaseModel):
    """A section of the config file: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    removed: ClassVar[dict[str, str]] = {}
    """Former settings of the section: name → the rest of the error's sentence."""


S = TypeVar("S", bound=Section)


def validate(
    values: dict[str, Any], kind: type[S], *, source: str | Path, base: Path, options: Mapping[str, str] | None = None
) -> S:
    """Return typed settings. Raise UserError, which names every wrong key with its path.

    source: file or origin, for messages. base: folder that relative paths refer to. options: dotted keys of values
    from the command line → their options, which are named instead of the source.
    """
    try:
        return kind.model_validate(values, context={"base": base})
    except ValidationError as error:
        items, given = error.errors(), options or {}
    empty = values.empty_variables if isinstance(values, FileValues) else {}
    problems, in_file = list[str](), list[str]()
    for item in items:
        path = _path_of(item)
        if key := next((key for key in given if f"{path}.".startswith(f"{key}.")), None):
            problems.append(f"`{given[key]}`: {_explain(item, path[len(key) + 1 :], kind, {})}")
        else:
            in_file.append(_explain(item, path, kind, empty) + _name_options(item, path, given))
    if in_file:
        problems.append(f"{source}: {'; '.join(in_file)}")
    raise UserError("; ".join(problems))


def _path_of(item: Any) -> str:
    """Return the dotted key of a problem."""
    return ".".join(str(step) for step in item["loc"] if step != "[key]")  # pydantic's mark of a mapping's key


def _name_options(item: Any, path: str, options: Mapping[str, str]) -> str:
    """Return the options that gave the settings which the problem of a whole section names, in parentheses."""
    inner = {key: name for key, name in options.items() if key.startswith(f"{path}." if path else "")}
    words = {*re.findall(r"`([\w.]+)", item["msg"])}
    named = [name for key, name in inner.items() if words & {key, key.rpartition(".")[2]}]
    return f" (given: {', '.join(named)})" if named else ""


def _explain(item: Any, path: str, kind: type[Section], empty: Mapping[str, str]) -> str:
    """Return a problem with its path. empty: dotted key → variables that made its value empty."""
    if item["type"] == "missing":
        return f"`{path}` is missing"
    if item["type"] != "extra_forbidden":
        message = MESSAGES.get(item["type"], item["msg"]).removeprefix("Value error, ")
        if limits := [key for key in LIMITS if key in item.get("ctx", {})]:
            message = _limit_text(item, limits[0], kind)
        if item["type"] == "literal_error":
            message = f"must be {item['ctx']['expected']}"
        if item["type"] == "string_pattern_mismatch":
            message = PATTERN_MESSAGES[item["ctx"]["pattern"]]
        if path in empty and not str(item["input"] or "").strip():
            return f"`{path}`: {message}; {empty[path]} is empty: set the variable, or write `${{NAME:-default}}`"
        return f"{f'`{path}`: ' if path else ''}{message}{_given_text(item['input'])}"
    section, name = _section_at(kind, item["loc"][:-1]), str(item["loc"][-1])
    if name in section.removed:
        return f"`{path}` {section.removed[name]}"
    known = [*section.model_fields, *(setting.key for setting in list_settings(section))]
    hint = suggest_names(name, dict.fromkeys(known)) or f"known here: {', '.join(section.model_fields)}"
    return f"`{path}` is not a setting; {hint}"


def _limit_text(item: Any, limit: str, kind: type[Section]) -> str:
    """Return the problem of a number outside of a limit; with both limits, if the setting has two that are allowed."""
    section: type[Section] | None = kind
    field: FieldInfo | None = None
    for step in item["loc"]:
        field = None if section is None else section.model_fields.get(str(step))
        section = None if field is None else section_type(field.annotation)
    found = [] if field is None else field.metadata
    low, high = (next((getattr(each, key) for each in found if hasattr(each, key)), None) for key in ("ge", "le"))
    if low is not None and high is not None:
        return f"must be from {low:g} to {high:g}"
    return f"must be {LIMITS[limit]} {item['ctx'][limit]:g}"


def _given_text(value: Any) -> str:
    """Return a rejected value in parentheses, as it is written in YAML; nothing for a whole section."""
    if isinstance(value, dict | Section):
        return ""
    literals: dict[Any, str] = {None: "null", True: "true", False: "false"}
    is_literal = value is None or isinstance(value, bool)
    return f" (got {literals[value] if is_literal else repr(str(value) if isinstance(value, str) else value)})"


def _section_at(section: type[Section], path: tuple[int | str, ...]) -> type[Section]:
    steps = iter(path)
    for step in steps:
        annotation = section.model_fields[str(step)].annotation
        inner = section_type(annotation)
        assert inner is not None, path
        section = inner
        if get_origin(annotation) in (dict, tuple):
            next(steps, None)  # a user's key, or an index
    return section


def section_type(annotation: Any) -> type[Section] | None:
    """Return the Section inside an annotation such as `FrozenSettings | None`, or None."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


class Setting(NamedTuple):
    """A setting as `--help` and the reference show it."""

    key: str
    """Dotted path below the section."""
    default: Any
    """`required` if there is none."""
    type_name: str
    bounds: str
    """Limits of a number, such as "≥ 1"."""
    explanation: str


def list_settings(section: type[Section], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a section, depth first."""
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (dict, tuple):
            yield from list_settings(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.default
            explanation = " ".join((field.description or _inherited_explanation(section, name)).split())
            yield Setting(f"{prefix}{name}", default, _type_name(field.annotation), _bounds(field), explanation)


def list_path_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of the settings of a section that are paths or URIs."""
    for name, field in section.model_fields.items():
        if (inner := section_type(field.annotation)) is not None:
            yield from list_path_keys(inner, f"{prefix}{name}.")
        options = getattr(field.annotation, "__args__", ())
        metadata = [*field.metadata, *(item for option in options for item in getattr(option, "__metadata__", ()))]
        if any(getattr(item, "func", None) in (_resolve, _resolve_parent) for item in metadata):
            yield f"{prefix}{name}"


def optional_sections(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return the explained sections that may be null, of all levels: dotted key → explanation."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if (inner := section_type(field.annotation)) is not None:
            if field.description and type(None) in getattr(field.annotation, "__args__", ()):
                found[f"{prefix}{name}"] = " ".join(field.description.split())
            found |= optional_sections(inner, f"{prefix}{name}.")
    return found


def removed_settings(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return the former settings of a section and of those below it: dotted key → explanation."""
    removed = {f"{prefix}{name}": text for name, text in section.removed.items()}
    for name, field in section.model_fields.items():
        if (inner := section_type(field.annotation)) is not None:
            removed |= removed_settings(inner, f"{prefix}{name}.")
    return removed


def _inherited_explanation(section: type[Section], name: str) -> str:
    """Return the parent section's explanation of a setting of which only the default differs."""
    fields: list[FieldInfo] = [
        parent.model_fields[name]
        for parent in section.__mro__[1:]
        if issubclass(parent, Section) and name in parent.model_fields
    ]
    return next((field.description for field in fields if field.description), "")


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [(sign, getattr(item, name, None)) for item in field.metadata for name, sign in signs.items()]
    return ", ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)


def _type_name(annotation: Any) -> str:
    """Return an annotation in words, alternatives joined by |: `int`, `crop|mask`, `int|[int, int]`."""
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) in (tuple, list):
        elements = [element for element in annotation.__args__ if element is not Ellipsis]
        return f"[{', '.join(map(_type_name, elements))}{', ...' if Ellipsis in annotation.__args__ else ''}]"
    if section_type(annotation) is not None and not hasattr(annotation, "__args__"):
        return "mapping"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type_name(annotation.__origin__)
    if hasattr(annotation, "__args__"):
        options = [str(option) if isinstance(option, str) else _type_name(option) for option in annotation.__args__]
        return "|".join(option for option in options if option != "NoneType")
    return "any" if annotation is Any else getattr(annotation, "__name__", str(annotation))
