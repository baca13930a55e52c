"""Search files: ranges in the types of the settings they are of, and what is wrong with a file said by its key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.config import cli
from carclass.errors import UserError
from carclass.tuning import search_space

EXPERIMENT = {"root": "results", "train": {"name": "one", "frozen": {"views": 2}}}
LR = "train.unfrozen.lr"
SEARCHES = sorted((Path(__file__).parents[2] / "jobs" / "experiments" / "searches").glob("*.yml"))


def load(
    folder: Path, varied: dict[str, Any], experiment: dict[str, Any] = EXPERIMENT, **more: Any
) -> search_space.Space:
    (folder / "experiment.yml").write_text(yaml.safe_dump(experiment))
    path = folder / "search.yml"
    path.write_text(yaml.safe_dump({"name": "s", "experiment": "experiment.yml", "space": varied, **more}))
    return search_space.load_space(path, cli.load_config(path, {}, search_space.Search))


def dimension(folder: Path, key: str, **found: Any) -> search_space.Dimension:
    return load(folder, {key: found}).dimensions[0]


def refuse(folder: Path, message: str, *given: Any, **more: Any) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, *given, **more)


# Types


def test_a_range_of_whole_numbers_is_one_where_the_setting_is(tmp_path: Path):
    found = dimension(tmp_path, "train.unfrozen.batch_size", min=8, max=64)
    assert (found.low, found.high, found.is_int) == (8, 64, True)


def test_a_range_of_a_real_setting_is_real_however_it_is_written(tmp_path: Path):
    found = dimension(tmp_path, "train.augmentation.rotation", min=0, max=1)
    assert (found.low, found.high, found.is_int) == (0.0, 1.0, False)


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path):
    """YAML 1.1 wants a point in 1e-4."""
    assert dimension(tmp_path, LR, min="1e-4", max="1e-2").low == 1e-4


def test_choices_have_the_setting_s_type(tmp_path: Path):
    assert dimension(tmp_path, "train.unfrozen.ema_decay", choices=[None, "0.9"]).choices == (None, 0.9)


def test_paths_among_the_choices_are_relative_to_the_search_file(tmp_path: Path):
    found = dimension(tmp_path, "train.parent", choices=["imagenet", "mine.safetensors"])
    assert found.choices == ("imagenet", str(tmp_path / "mine.safetensors"))


def test_a_search_read_from_elsewhere_has_the_same_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = load(tmp_path, {"train.parent": {"choices": ["imagenet", "mine.safetensors"]}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = search_space.make_space(found.search, found.base, found.root, "search.yml", Path.cwd())
    assert again.dimensions == found.dimensions


# What is wrong


def test_a_misspelt_key_is_named_with_the_one_that_was_meant(tmp_path: Path):
    refuse(
        tmp_path,
        r"search.yml.*`train.unfrozen.lrr` is not a setting; did you mean `lr`",
        {f"{LR}r": {"min": 1, "max": 2}},
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"min": 2, "max": 1}, "`min` must be below `max`"),
        ({"min": 0, "max": 1, "log": True}, "`min` must be above 0"),
        ({"min": 1}, "both must be there"),
        ({"choices": [1]}, "two or more"),
        ({"choices": [1, 1]}, "each once"),
        ({"min": 1, "max": 2, "choices": [1, 2]}, "either"),
        ({}, "either"),
        ({"minimum": 1}, "did you mean `min`"),
    ],
)
def test_an_impossible_range_is_named_by_its_key(tmp_path: Path, found: dict[str, Any], message: str):
    refuse(tmp_path, rf"`space.{LR}.*{message}", {LR: found})


def test_a_value_that_the_setting_refuses_is_named(tmp_path: Path):
    refuse(tmp_path, r"`train.model.dropout`: .*less than or equal to 1", {"train.model.dropout": {"min": 0, "max": 2}})


def test_a_part_of_a_whole_number_is_refused(tmp_path: Path):
    refuse(tmp_path, r"`train.frozen.views`: .*integer", {"train.frozen.views": {"min": 1.5, "max": 2}})


def test_text_has_choices_and_no_range(tmp_path: Path):
    refuse(tmp_path, r"`space.train.dataset` is no number; give `choices`", {"train.dataset": {"min": "1", "max": "2"}})


@pytest.mark.parametrize("key", ["mask.cutout.margin", "root", "unfrozen.lr"])
def test_keys_outside_of_training_are_refused(tmp_path: Path, key: str):
    refuse(tmp_path, "begin with `train.`", {key: {"min": 0, "max": 1}})


@pytest.mark.parametrize("key", ["train.name", "train.seed", "train.num_workers"])
def test_settings_that_change_no_accuracy_are_not_varied(tmp_path: Path, key: str):
    refuse(tmp_path, f"`{key}`.*Leave it out", {key: {"choices": [1, 2]}})


def test_a_section_is_no_setting(tmp_path: Path):
    refuse(tmp_path, "is a section", {"train.unfrozen": {"choices": [None, {}]}})


def test_settings_of_a_stage_that_is_skipped_are_refused(tmp_path: Path):
    refuse(tmp_path, "skips that stage", {LR: {"min": 1e-4, "max": 1e-3}}, fixed={"train.unfrozen": None})


def test_augmentation_that_no_photo_would_see_is_refused(tmp_path: Path):
    rotation = {"train.augmentation.rotation": {"min": 0, "max": 0.1}}
    refuse(tmp_path, "would change nothing", rotation, fixed={"train.unfrozen": None})


@pytest.mark.parametrize("name", ["pbt", "PBT", "pb2"])
def test_population_based_training_is_refused_with_the_reason(tmp_path: Path, name: str):
    refuse(tmp_path, "never exchanges weights", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler=name)


def test_an_unknown_scheduler_is_answered_with_those_there_are(tmp_path: Path):
    refuse(tmp_path, "`scheduler`: .*asha.*hyperband.*median.*none", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler="x")


def test_a_setting_without_effect_is_refused(tmp_path: Path):
    refuse(tmp_path, "no effect", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler="none", reduction_factor=4)


def test_an_experiment_that_trains_nothing_is_refused(tmp_path: Path):
    refuse(tmp_path, "no `train:` section", {LR: {"min": 1e-4, "max": 1e-3}}, {"root": "results"})


# What comes of it


def test_what_is_fixed_holds_for_every_trial(tmp_path: Path):
    found = load(tmp_path, {LR: {"min": 1e-4, "max": 1e-3}}, fixed={"train.unfrozen.epochs": 3})
    assert found.settings({LR: 2e-4}, "trial", 5).unfrozen.epochs == 3


def test_a_trial_has_its_values_name_and_seed(tmp_path: Path):
    settings = load(tmp_path, {LR: {"min": 1e-4, "max": 1e-3}}).settings({LR: 2e-4}, "trial", 5)
    assert (settings.unfrozen.lr, settings.name, settings.seed) == (2e-4, "trial", 5)


def test_the_longest_trial_decides_on_when_others_may_end(tmp_path: Path):
    found = load(tmp_path, {"train.unfrozen.epochs": {"min": 5, "max": 60}})
    assert (found.max_epochs, found.min_epochs) == (60, 4)


def test_trials_are_called_by_short_names_and_numbers():
    values = {LR: 3.14159e-4, "train.augmentation.rotation": 0.2, "train.unfrozen.ema_decay": None}
    assert search_space.describe(values) == "lr=3.14e-4 rotation=.2 ema_decay=null"


def test_names_that_two_sections_share_are_told_apart():
    assert search_space.describe({LR: 1e-3, "train.frozen.lr": 1e-2}) == "unfrozen.lr=1e-3 frozen.lr=.01"


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_the_searches_that_come_along_are_sound(path: Path):
    assert search_space.load_space(path, cli.load_config(path, {}, search_space.Search)).dimensions
