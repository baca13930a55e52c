"""Search files: which settings of an experiment a sweep varies, checked by the experiment's own types before it starts.

A search file names an experiment file and, by dotted keys such as `train.unfrozen.lr`, ranges or choices.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from carclass.config import yaml_file
from carclass.config.schema import Config, TrainSettings, with_changes
from carclass.config.section import Name, Section, Uri, validate
from carclass.errors import UserError
from carclass.formatting import Value, value_text
from carclass.models.resnet import StageName
from carclass.runs.run import MAY_CHANGE_ON_RESUME

NOT_VARIED = ("name", "seed", *MAY_CHANGE_ON_RESUME)
SCHEDULERS = ("asha", "hyperband", "median", "none")


class Range(Section):
    """Values of a setting to try: all from `min` to `max`, or `choices`."""

    min: float | None = Field(None, allow_inf_nan=False)
    """Lowest value."""
    max: float | None = Field(None, allow_inf_nan=False)
    """Highest value."""
    log: bool = False
    """Whether 0.001 to 0.01 is as much of the range as 0.01 to 0.1."""
    choices: list[Any] | None = None
    """Values without an order."""

    @model_validator(mode="after")
    def _some_values(self) -> "Range":
        if (self.choices is None) == (self.min is None and self.max is None):
            raise ValueError("give either `min` and `max`, or `choices`")
        if self.choices is not None:
            if len({repr(choice) for choice in self.choices}) < max(2, len(self.choices)):
                raise ValueError("`choices` needs two or more values, each once")
            if self.log:
                raise ValueError("`log` is for `min` and `max`, and `choices` has no order")
        elif self.min is None or self.max is None or self.min >= self.max:
            raise ValueError("`min` must be below `max`, and both must be there")
        elif self.log and self.min <= 0:
            raise ValueError("with `log`, `min` must be above 0")
        return self


def _known_scheduler(value: Any) -> Any:
    if str(value).lower() in ("pbt", "pb2", "population_based_training"):
        raise ValueError(
            "population-based training never exchanges weights with Ray Train's workers, silently, so it would be a "
            f"random search; choose one of {', '.join(SCHEDULERS)}"
        )
    return value


class Search(Section):
    """A search file."""

    name: Name
    """Name of the sweep; the same name goes on with it."""
    experiment: Uri
    """Experiment file whose `train:` section is varied."""
    root: Uri | None = None
    """Folder or s3:// prefix with the dataset, in which the sweep is written too; by default the experiment's."""
    fixed: dict[str, Any] = Field({})
    """Changes to the experiment for all trials, by dotted key."""
    space: dict[str, Range] = Field(min_length=1)
    """What varies, by dotted key: {min, max, log} or {choices}."""
    num_trials: int = Field(16, ge=1)
    """Settings to try, besides the experiment as it stands, which is trial 0."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Where the next settings come from: Optuna's tree-structured Parzen estimator, which learns from those tried, or
    chance alone."""
    scheduler: Annotated[Literal["asha", "hyperband", "median", "none"], BeforeValidator(_known_scheduler)] = "asha"
    """What ends trials before their last epoch: at growing intervals, all but the best share of those that got there
    (ASHA; HyperBand in groups); those worse than the median of all; nothing."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA and HyperBand: one trial in so many goes on, for so many times as long."""
    min_epochs: int | None = Field(None, ge=1)
    """Epochs of the last stage before a trial may be ended; by default a fifteenth of them all."""
    num_seeds: int = Field(3, ge=1)
    """Seeds with which the best three settings and the experiment as it stands are trained, the first one included."""
    devices_per_worker: float = Field(1.0, gt=0)
    """GPUs, or without them CPUs, of each worker of a trial; with 0.25, four trials share a GPU."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at a time; by default as many as the cluster has room for."""
    seed: int = Field(123, ge=0)
    """Decides which settings are tried; that of training is the experiment's."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "Search":
        unused = {"none": {"reduction_factor", "min_epochs"}, "median": {"reduction_factor"}}.get(self.scheduler, set())
        if without := sorted(unused & self.model_fields_set):
            raise ValueError(f"`{without[0]}` has no effect with `scheduler: {self.scheduler}`; leave it out")
        return self


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A setting that varies, its values as the setting's own type has them."""

    key: str  # dotted
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None

    @property
    def is_int(self) -> bool:
        """Whether only whole numbers are between low and high."""
        return isinstance(self.low, int)

    def contains(self, value: Value) -> bool:
        """Whether a value is one to try."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Space:
    """An experiment and what of it varies."""

    root: str
    base: TrainSettings
    """The experiment's settings, with what is fixed for all trials."""
    dimensions: tuple[Dimension, ...]
    source: str
    """The search file, for messages."""
    search: Search

    @property
    def defaults(self) -> dict[str, Value]:
        """The experiment's own values of what varies."""
        return {dimension.key: get_setting(self.base, dimension.key) for dimension in self.dimensions}

    @property
    def stage(self) -> StageName:
        """The last stage, whose val accuracy counts."""
        return "frozen" if self.base.unfrozen is None else "unfrozen"

    @property
    def max_epochs(self) -> int:
        """How many epochs of the last stage a trial may have."""
        key = f"train.{self.stage}.epochs"
        varied = [one for one in self.dimensions if one.key == key]
        values = [value for one in varied for value in (*(one.choices or ()), one.high) if value is not None]
        return max(int(value) for value in (*values, get_setting(self.base, key)))

    @property
    def min_epochs(self) -> int:
        """After how many of them a trial may be ended."""
        return self.search.min_epochs or max(1, self.max_epochs // 15)

    def settings(self, values: dict[str, Value], name: str, seed: int) -> TrainSettings:
        """The settings of one trial; UserError when they don't go together."""
        changes = {**values, "train.name": name, "train.seed": seed}
        return with_changes(self.base, changes, source=self.source, base=Path.cwd())


def load_space(path: Path, search: Search) -> Space:
    """What a search file asks for; UserError, naming the key, when the experiment has no such setting or value."""
    values = yaml_file.read(search.experiment)
    base = Path(os.path.abspath(search.experiment)).parent
    experiment = validate(values, Config, source=search.experiment, base=base)
    if experiment.train is None:
        raise UserError(f"{path}: `experiment`: {search.experiment} has no `train:` section, which a sweep varies.")
    root, source = search.root or experiment.root, str(path)
    for key in (*search.fixed, *search.space):
        _check_key(key, source)
    folder = Path(os.path.abspath(path)).parent
    base_settings = with_changes(experiment.train, search.fixed, source=f"{source}: `fixed`", base=folder)
    return make_space(search, base_settings, root, source, folder)


def make_space(search: Search, base: TrainSettings, root: str, source: str, folder: Path) -> Space:
    """The space around an experiment's settings. folder: of relative paths among the choices."""
    dimensions = tuple(_dimension(key, found, base, source, folder) for key, found in search.space.items())
    # Choices as the settings have them, paths among them being absolute: they are read again from somewhere else.
    typed = {one.key: Range(choices=list(one.choices)) for one in dimensions if one.choices is not None}
    search = search.model_copy(update={"space": {**search.space, **typed}})
    return Space(root, base, dimensions, source, search)


def get_setting(settings: TrainSettings, key: str) -> Any:
    """The value of a dotted key; None below a section that is null."""
    found: Any = settings
    for step in key.split(".")[1:]:
        found = getattr(found, step, None)
    return found


def _check_key(key: str, source: str) -> None:
    section, *steps = key.split(".")
    if section != "train" or not steps:
        raise UserError(
            f"{source}: `{key}`: a sweep trains on datasets that are there, so it varies keys that begin with "
            "`train.`. To compare ways of masking, make a dataset of each and give choices of `train.dataset`."
        )
    if steps[0] in NOT_VARIED:
        raise UserError(f"{source}: `{key}`: a sweep sets it itself or it changes no accuracy. Leave it out.")


def _dimension(key: str, found: Range, base: TrainSettings, source: str, folder: Path) -> Dimension:
    """A range in the setting's own type, each of its values tried on the settings."""
    if isinstance(get_setting(base, key), bool | str) and found.choices is None:
        raise UserError(f"{source}: `space.{key}` is no number; give `choices` instead of `min` and `max`.")
    wanted = [found.min, found.max] if found.choices is None else found.choices
    where = f"{source}: `space`"
    values = [get_setting(with_changes(base, {key: _whole(value)}, source=where, base=folder), key) for value in wanted]
    if get_setting(base, key.rsplit(".", 1)[0]) is None:
        raise UserError(f"{source}: `space.{key}`: the experiment skips that stage, which is null there.")
    if any(isinstance(value, Section) for value in (get_setting(base, key), *values)):
        raise UserError(f"{source}: `space.{key}` is a section; name one of its settings.")
    _check_effect(key, base, source)
    if found.choices is not None:
        return Dimension(key=key, choices=tuple(values))
    return Dimension(key=key, low=values[0], high=values[1], log=found.log)


def _whole(value: Any) -> Any:
    """32 instead of 32.0, which would be no value of an integer setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_effect(key: str, base: TrainSettings, source: str) -> None:
    """The frozen stage augments photos only for its cached views."""
    if key.startswith("train.augmentation.") and base.unfrozen is None:
        assert base.frozen is not None
        needed = 2 if key.endswith(".flip") else 3
        if base.frozen.views < needed:
            raise UserError(
                f"{source}: `space.{key}` would change nothing: the experiment trains the classifier alone, on "
                f"{base.frozen.views} cached view(s) of each photo. Give `fixed: {{train.frozen.views: {needed}}}`."
            )


def describe(values: dict[str, Value]) -> str:
    """Settings in a line: 'lr=3e-4 rotation=.2'."""
    names = short_names(list(values))
    texts = {key: value_text(value) for key, value in values.items()}
    return " ".join(f"{names[key]}={text[text.startswith('0.') :]}" for key, text in texts.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Keys → the shortest ends of them that tell them apart, of one or two words."""
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: last if lasts.count(last) == 1 else ".".join(key.split(".")[-2:])
        for key, last in zip(keys, lasts, strict=True)
    }
