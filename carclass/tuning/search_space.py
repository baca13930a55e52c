"""Search spaces: the settings of an experiment that a sweep varies, with their ranges or choices.

A search file names an experiment file and the varied settings, by dotted keys such as `train.unfrozen.lr`. All values
are checked against the types of the settings before the sweep starts.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from carclass.config import yaml_file
from carclass.config.effects import check_stage_effect, required_views
from carclass.config.schema import Config, StageName, StageSettings, TrainSettings, with_changes
from carclass.config.search import Range, Search
from carclass.config.section import Section, validate
from carclass.errors import UserError
from carclass.formatting import Value, value_text
from carclass.runs.run import MAY_CHANGE_ON_RESUME

log = logging.getLogger(__name__)
NOT_VARIED = ("name", "seed", "frozen.keep_epochs", "unfrozen.keep_epochs", *MAY_CHANGE_ON_RESUME)
"""Settings of `train` that a sweep sets itself or that do not change accuracy."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """A varied setting, with values in the setting's own type."""

    key: str  # dotted
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    choices: tuple[Value, ...] | None = None

    @property
    def is_int(self) -> bool:
        """Return True for a range of integers."""
        return isinstance(self.low, int)

    @property
    def num_values(self) -> int | None:
        """Return the number of values; None for a range of real numbers."""
        if self.choices is not None:
            return len(self.choices)
        assert self.low is not None
        assert self.high is not None
        return int(self.high - self.low) + 1 if self.is_int else None

    def contains(self, value: Value) -> bool:
        """Return True if the value is in the range or among the choices."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class SearchSpace:
    """An experiment and its varied settings."""

    root: str
    base_settings: TrainSettings
    """Settings of the experiment, with the changes that are fixed for all trials."""
    dimensions: tuple[Dimension, ...]
    source: str
    """Search file, for messages."""
    search: Search

    @property
    def base_values(self) -> dict[str, Value]:
        """Return the experiment's own values of the varied settings, by dotted key."""
        return {dimension.key: get_setting(self.base_settings, dimension.key) for dimension in self.dimensions}

    @property
    def stage(self) -> StageName:
        """Return the last stage; its val accuracy is the objective."""
        return "frozen" if self.base_settings.unfrozen is None else "unfrozen"

    @property
    def max_epochs(self) -> int:
        """Return the largest number of epochs of the last stage that a trial can have."""
        key = f"train.{self.stage}.epochs"
        varied = [dimension for dimension in self.dimensions if dimension.key == key]
        values = [value for one in varied for value in (*(one.choices or ()), one.high) if value is not None]
        return max(int(value) for value in (*values, get_setting(self.base_settings, key)))

    @property
    def min_epochs(self) -> int:
        """Return the number of epochs of the last stage before a trial may be pruned."""
        return self.search.min_epochs or max(1, self.max_epochs // 15)

    def trial_settings(self, values: dict[str, Value], name: str, seed: int) -> TrainSettings:
        """Return the settings of one trial, without a refit. Raise UserError if they are inconsistent."""
        changes = {**values, "train.name": name, "train.seed": seed}
        settings = with_changes(self.base_settings, changes, source=self.source, base=Path.cwd())
        return settings.model_copy(update={"refit": False}) if settings.refit else settings


def load_space(path: Path, search: Search) -> SearchSpace:
    """Return the space of a search file. Raise UserError, with the key, for an unknown setting or a wrong value."""
    values = yaml_file.read(search.experiment)
    experiment_folder = Path(os.path.abspath(search.experiment)).parent
    experiment = validate(values, Config, source=search.experiment, base=experiment_folder)
    if experiment.train is None:
        raise UserError(f"{path}: `experiment`: {search.experiment} has no `train:` section to vary.")
    root, source = search.root or experiment.root, str(path)
    for key in (*search.fixed, *search.space):
        _check_key(key, source)
    if both := sorted(search.fixed.keys() & search.space.keys()):
        raise UserError(f"{source}: `{both[0]}` is given twice, in `fixed` and in `space`. Delete one.")
    folder = Path(os.path.abspath(path)).parent
    base_settings = with_changes(experiment.train, search.fixed, source=f"{source}: `fixed`", base=folder)
    space = make_space(search, base_settings, root, source, folder)
    for key, each in search.space.items():  # of a user's file only: a stored one holds defaults too
        for changed in _settings_of(key, each, base_settings, source, folder):
            _check_effect(key, get_setting(changed, key), base_settings, source)
            _check_schedule_effect(key, changed, base_settings, source)
    _warn_about_repetition(space)
    return space


def _warn_about_repetition(space: SearchSpace) -> None:
    """Warn if there are fewer combinations of settings than trials, so that some are trained again."""
    sizes = [dimension.num_values for dimension in space.dimensions]
    number = math.prod(size for size in sizes if size is not None)
    if None not in sizes and number < space.search.num_trials:
        log.warning(
            "tune: `num_trials` is %d, but `space` has only %d combinations: others repeat them, with the same results",
            space.search.num_trials, number,
        )  # fmt: skip


def make_space(search: Search, base_settings: TrainSettings, root: str, source: str, folder: Path) -> SearchSpace:
    """Return the space around an experiment's settings. folder: base of relative paths among the choices."""
    make = partial(_make_dimension, search=search, base=base_settings, source=source, folder=folder)
    dimensions = tuple(make(key, each) for key, each in search.space.items())
    # Store choices as validated, with absolute paths: the stored search is read again from another folder.
    typed = {one.key: Range(choices=list(one.choices)) for one in dimensions if one.choices is not None}
    search = search.model_copy(update={"space": {**search.space, **typed}})
    return SearchSpace(root, base_settings, dimensions, source, search)


def get_setting(settings: TrainSettings, key: str) -> Any:
    """Return the value of a dotted key; None below a section that is null."""
    value: Any = settings
    for step in key.split(".")[1:]:
        value = getattr(value, step, None)
    return value


def _check_key(key: str, source: str) -> None:
    section, *steps = key.split(".")
    if section != "train" or not steps:
        raise UserError(
            f"{source}: `{key}`: a sweep trains on existing datasets, so the keys it varies begin with `train.`. To "
            "compare ways of masking, publish a dataset for each and list them as choices of `train.dataset`."
        )
    if steps[0] in NOT_VARIED or ".".join(steps) in NOT_VARIED:
        raise UserError(f"{source}: `{key}` is set by the sweep itself or does not change accuracy. Leave it out.")


def _make_dimension(
    key: str, values: Range, search: Search, base: TrainSettings, source: str, folder: Path
) -> Dimension:
    """Return a range or choices in the setting's own type; validate each value as part of the settings."""
    if isinstance(get_setting(base, key), bool | str) and values.choices is None:
        raise UserError(f"{source}: `space.{key}` is not a number; give `choices` instead of `min` and `max`.")
    typed = [get_setting(settings, key) for settings in _settings_of(key, values, base, source, folder)]
    if get_setting(base, stage := key.rsplit(".", 1)[0]) is None:
        origin = f"`fixed.{stage}`" if stage in search.fixed else search.experiment
        raise UserError(f"{source}: `space.{key}`: {origin} skips that stage (it is null). Vary another setting.")
    if any(isinstance(value, Section) for value in (get_setting(base, key), *typed)):
        raise UserError(f"{source}: `space.{key}` is a section; name one of its settings.")
    if values.choices is not None:
        if len({repr(value) for value in typed}) < len(typed):
            raise UserError(f"{source}: `space.{key}.choices` has a value twice: {values.choices}. Delete one.")
        return Dimension(key=key, choices=tuple(typed))
    return Dimension(key=key, low=typed[0], high=typed[1], log=values.log)


def _settings_of(key: str, values: Range, base: TrainSettings, source: str, folder: Path) -> list[TrainSettings]:
    """Return the experiment's settings with each end of a range, or each choice."""
    raw = [values.min, values.max] if values.choices is None else values.choices
    where = f"{source}: `space`"
    return [with_changes(base, {key: _to_int(value)}, source=where, base=folder) for value in raw]


def _to_int(value: Any) -> Any:
    """Return integral floats as integers: 32.0 is not a valid value of an integer setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_effect(key: str, value: Any, base: TrainSettings, source: str) -> None:
    """Raise UserError for augmentation settings that no photo of the frozen stage's cached views uses."""
    if key.startswith("train.augmentation.") and base.unfrozen is None:
        assert base.frozen is not None
        min_views = required_views(key.rsplit(".", 1)[1], value)
        if base.frozen.views < min_views:
            raise UserError(
                f"{source}: `space.{key}` would change nothing: trials train only the classifier, on "
                f"{base.frozen.views} cached view(s) of each photo. Set `fixed: {{train.frozen.views: {min_views}}}`."
            )


def _check_schedule_effect(key: str, changed: TrainSettings, base: TrainSettings, source: str) -> None:
    """Raise UserError if a value of a stage's setting is without effect.

    changed: the experiment with that value; base: without it. The experiment alone has passed this check, so what base
    has without effect is by `fixed`.
    """
    stage, unchanged = (get_setting(settings, key.rsplit(".", 1)[0]) for settings in (changed, base))
    if isinstance(stage, StageSettings) and (error := _find_ineffective(stage)):
        place = "`fixed`" if _find_ineffective(unchanged) == error else f"`space.{key}`"
        raise UserError(f"{source}: {place}: {error}.")


def _find_ineffective(stage: StageSettings) -> str:
    """Return the error of a setting without effect, or ""."""
    try:
        check_stage_effect(stage)
    except ValueError as error:
        return str(error)
    return ""


def settings_text(values: dict[str, Value]) -> str:
    """Return settings in one line: "lr=3e-4 rotation=.2"."""
    names = short_names(list(values))
    texts = {key: value_text(value) for key, value in values.items()}
    return " ".join(f"{names[key]}={text[text.startswith('0.') :]}" for key, text in texts.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Map each dotted key to its last word, or to its last two where the last is not unique."""
    last_words = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: word if last_words.count(word) == 1 else ".".join(key.split(".")[-2:])
        for key, word in zip(keys, last_words, strict=True)
    }
