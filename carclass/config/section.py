"""What a setting is: typed, with its path in every error, and relative to the file that it stands in."""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from carclass.errors import UserError

NAMED_DETECTORS = ("mask_rcnn_r50_fpn", "faster_rcnn_r101_fpn", "torchvision_mask_rcnn_v2", "sample")
NAMED_PARENTS = ("imagenet", "imagenet-v2", "sample", "zoo", *NAMED_DETECTORS)
"""Words that stand for weights (weights.py), detectors or the embedded sample, where a path could be."""

EPOCH_OF_RUN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._=-]*)@([1-9][0-9]*|best|last)")
"""How a run's epoch is written."""
WEIGHTS = (".safetensors", ".pth", ".pt", ".pkl")
"""How files of weights end."""


class CommandLineText(str):
    """A value typed on the command line: as a path, relative to where the user stands."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    """Makes a local path absolute, so that no worker depends on its working directory."""
    if isinstance(value, str) and value.startswith("s3:") and not re.match("s3://[^/]", value):
        raise ValueError("a place on S3 is written s3://bucket/prefix")
    named = value in NAMED_PARENTS and info.field_name != "root"
    if not isinstance(value, str) or named or "://" in value:
        return value
    base = Path.cwd() if isinstance(value, CommandLineText) else (info.context or {}).get("base", Path.cwd())
    return str(Path(os.path.normpath(base / Path(value).expanduser())))


def _resolve_parent(value: Any, info: ValidationInfo) -> Any:
    """Leaves a run's epoch as it is; what else stands for weights is a URI."""
    if isinstance(value, str) and EPOCH_OF_RUN.fullmatch(value):
        return str(value)
    if isinstance(value, str) and "@" in value and "/" not in value and not value.endswith(WEIGHTS):
        raise ValueError("an epoch of a run is written NAME@12, NAME@best or NAME@last")
    return _resolve(value, info)


Uri = Annotated[str, BeforeValidator(_resolve)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$")]
Parent = Annotated[str, BeforeValidator(_resolve_parent)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """A part of the config file: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def digest(self) -> str:
        """sha256 of the settings, the same whatever the order in which they were written."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


S = TypeVar("S", bound=Section)


def validate(values: dict[str, Any], kind: type[S], *, source: str | Path, base: Path) -> S:
    """Typed settings; UserError names every wrong key with its path. base: folder of relative paths."""
    try:
        return kind.model_validate(values, context={"base": base})
    except ValidationError as error:
        problems = [_explain(item, kind) for item in error.errors()]
    raise UserError(f"{source}: " + "; ".join(problems))


def _explain(item: Any, kind: type[Section]) -> str:
    path = ".".join(str(step) for step in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"`{path}`: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
    known = list(_section_at(kind, item["loc"][:-1]).model_fields)
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
    return f"`{path}` is not a setting; {hint}"


def _section_at(section: type[Section], path: tuple[int | str, ...]) -> type[Section]:
    steps = iter(path)
    for step in steps:
        annotation = section.model_fields[str(step)].annotation
        found = section_type(annotation)
        assert found is not None, path
        section = found
        if get_origin(annotation) is dict:
            next(steps, None)  # a key of the user's
    return section


def section_type(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `Frozen | None`, if there is one."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((t for t in options if isinstance(t, type) and issubclass(t, Section)), None)
