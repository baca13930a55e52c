"""Search spaces: types of ranges and choices, and errors of search files by key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.config import cli
from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.tuning import search_space, trial

EXPERIMENT = {"root": "results", "train": {"name": "one", "frozen": {"views": 2}}}
LR = "train.unfrozen.lr"
SEARCHES = sorted((Path(__file__).parents[2] / "jobs" / "experiments" / "searches").glob("*.yml"))


def load(
    folder: Path, varied: dict[str, Any], experiment: dict[str, Any] = EXPERIMENT, **more: Any
) -> search_space.SearchSpace:
    (folder / "experiment.yml").write_text(yaml.safe_dump(experiment))
    path = folder / "search.yml"
    path.write_text(yaml.safe_dump({"name": "s", "experiment": "experiment.yml", "space": varied, **more}))
    return search_space.load_space(path, cli.load_config(path, {}, search_space.Search))


def dimension(folder: Path, key: str, **values: Any) -> search_space.Dimension:
    return load(folder, {key: values}).dimensions[0]


def refuse(folder: Path, message: str, *args: Any, **more: Any) -> None:
    with pytest.raises(UserError, match=message):
        load(folder, *args, **more)


# Settings without effect


def test_more_trials_than_combinations_of_settings_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    space = {"train.unfrozen.appearance": {"choices": [False, True]}, "train.unfrozen.epochs": {"min": 8, "max": 10}}
    load(tmp_path, space, num_trials=7)
    assert "`num_trials` is 7, but `space` has only 6 combinations" in caplog.text


@pytest.mark.parametrize("other", [{}, {LR: {"min": 1e-4, "max": 1e-2}}])
def test_trials_of_different_settings_are_not_warned_about(
    tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    load(tmp_path, {"train.unfrozen.epochs": {"min": 8, "max": 10}, **other}, num_trials=3 if not other else 9)
    assert not caplog.text


def test_a_warm_up_beyond_its_stage_is_refused(tmp_path: Path):
    experiment = {**EXPERIMENT, "train": {"name": "one", "unfrozen": {"epochs": 4}}}
    message = r"`space.train.unfrozen.warmup_epochs`: `unfrozen.warmup_epochs` is 6 and the stage has 4 epoch"
    refuse(tmp_path, message, {"train.unfrozen.warmup_epochs": {"min": 0, "max": 6}}, experiment)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"train.unfrozen": None}, rf"search.yml: `space.{LR}`: `fixed.train.unfrozen` skips that stage"),
        ({"train.unfrozen.warmup_epochs": 6}, r"search.yml: `fixed`: `unfrozen.warmup_epochs` is 6 and the stage has"),
    ],
)
def test_a_fixed_setting_is_blamed_for_its_own_mistake(tmp_path: Path, fixed: dict[str, Any], message: str):
    experiment = {**EXPERIMENT, "train": {"name": "one", "unfrozen": {"epochs": 4}}}
    refuse(tmp_path, message, {LR: {"min": 1e-4, "max": 1e-2}}, experiment, fixed=fixed)


def test_a_stage_that_the_experiment_skips_is_named_with_its_file(tmp_path: Path):
    experiment = {**EXPERIMENT, "train": {"name": "one", "unfrozen": None}}
    refuse(tmp_path, r"experiment.yml skips that stage", {LR: {"min": 1e-4, "max": 1e-2}}, experiment)


def test_epochs_down_to_the_default_warm_up_are_accepted(tmp_path: Path):
    assert dimension(tmp_path, "train.unfrozen.epochs", min=1, max=4).low == 1


def test_flips_of_the_mirrored_view_may_be_varied(tmp_path: Path):
    experiment = {"root": "results", "train": {"name": "one", "unfrozen": None, "frozen": {"views": 2}}}
    space = load(tmp_path, {"train.augmentation.flip": {"choices": ["none", "horizontal"]}}, experiment)
    assert space.dimensions[0].choices == ("none", "horizontal")


def test_vertical_flips_are_not_varied_for_the_mirrored_view_alone(tmp_path: Path):
    experiment = {"root": "results", "train": {"name": "one", "unfrozen": None, "frozen": {"views": 2}}}
    space = {"train.augmentation.flip": {"choices": ["horizontal", "horizontal+vertical"]}}
    refuse(tmp_path, r"`space.train.augmentation.flip` would change nothing: .*views: 3", space, experiment)


@pytest.mark.parametrize(("key", "choices"), [(LR, ["1e-3", "0.001"]), ("train.unfrozen.weight_decay", [0, 0.0])])
def test_choices_that_are_one_value_in_two_spellings_are_refused(tmp_path: Path, key: str, choices: list[Any]):
    refuse(tmp_path, rf"`space.{key}.choices` has a value twice", {key: {"choices": choices}})


def test_epochs_to_keep_are_not_varied(tmp_path: Path):
    refuse(tmp_path, "does not change accuracy", {"train.unfrozen.keep_epochs": {"choices": [[1], [2]]}})


def test_a_stored_space_is_read_although_defaults_are_without_effect(tmp_path: Path):
    experiment = {"root": "results", "train": {"name": "one", "unfrozen": {"epochs": 1}}}
    space = load(tmp_path, {LR: {"min": 1e-4, "max": 1e-3}}, experiment)
    stored = TrainSettings.model_validate(space.base_settings.model_dump(mode="json"))
    assert search_space.make_space(space.search, stored, "results", "search.yml", tmp_path).dimensions


# Types


def test_range_of_integer_setting(tmp_path: Path):
    values = dimension(tmp_path, "train.unfrozen.batch_size", min=8, max=64)
    assert (values.low, values.high, values.is_int) == (8, 64, True)


def test_range_of_float_setting_written_as_integers(tmp_path: Path):
    values = dimension(tmp_path, "train.augmentation.rotation", min=0, max=1)
    assert (values.low, values.high, values.is_int) == (0.0, 1.0, False)


def test_numbers_that_yaml_reads_as_text(tmp_path: Path):
    """Read 1e-4, which YAML 1.1 takes for text as it lacks a decimal point."""
    assert dimension(tmp_path, LR, min="1e-4", max="1e-2").low == 1e-4


def test_choices_have_the_type_of_the_setting(tmp_path: Path):
    assert dimension(tmp_path, "train.unfrozen.ema_decay", choices=[None, "0.9"]).choices == (None, 0.9)


def test_path_choices_are_relative_to_the_search_file(tmp_path: Path):
    values = dimension(tmp_path, "train.parent", choices=["imagenet", "mine.safetensors"])
    assert values.choices == ("imagenet", str(tmp_path / "mine.safetensors"))


def test_choices_do_not_depend_on_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = load(tmp_path, {"train.parent": {"choices": ["imagenet", "mine.safetensors"]}})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = search_space.make_space(values.search, values.base_settings, values.root, "search.yml", Path.cwd())
    assert again.dimensions == values.dimensions


# Errors


def test_misspelt_key_suggests_the_correct_one(tmp_path: Path):
    refuse(
        tmp_path,
        r"search.yml.*`train.unfrozen.lrr` is not a setting; did you mean `lr`",
        {f"{LR}r": {"min": 1, "max": 2}},
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min": 2, "max": 1}, "`min` must be below `max`"),
        ({"min": 0, "max": 1, "log": True}, "`min` must be above 0"),
        ({"min": 1}, "both are required"),
        ({"choices": [1]}, "two or more"),
        ({"choices": [1, 1]}, "each once"),
        ({"min": 1, "max": 2, "choices": [1, 2]}, "either"),
        ({}, "either"),
        ({"minimum": 1}, "did you mean `min`"),
    ],
)
def test_impossible_range_is_refused(tmp_path: Path, values: dict[str, Any], message: str):
    refuse(tmp_path, rf"`space.{LR}.*{message}", {LR: values})


def test_invalid_value_of_setting_is_refused(tmp_path: Path):
    refuse(tmp_path, r"`train.model.dropout`: .*less than 1", {"train.model.dropout": {"min": 0, "max": 2}})


def test_fraction_for_integer_setting_is_refused(tmp_path: Path):
    refuse(tmp_path, r"`train.frozen.views`: .*integer", {"train.frozen.views": {"min": 1.5, "max": 2}})


def test_trials_with_other_sampling_have_a_frozen_stage_of_their_own():
    uniform = TrainSettings(name="a")
    balanced = TrainSettings(name="b", sampling="balanced")
    assert trial._has_same_frozen(uniform, uniform.model_copy(update={"name": "c"}))
    assert not trial._has_same_frozen(balanced, uniform)


def test_range_of_text_setting_is_refused(tmp_path: Path):
    refuse(
        tmp_path, r"`space.train.dataset` is not a number; give `choices`", {"train.dataset": {"min": "1", "max": "2"}}
    )


@pytest.mark.parametrize("key", ["mask.cutout.margin", "root", "unfrozen.lr"])
def test_keys_outside_of_train_are_refused(tmp_path: Path, key: str):
    refuse(tmp_path, "begin with `train.`", {key: {"min": 0, "max": 1}})


@pytest.mark.parametrize("key", ["train.name", "train.seed", "train.num_workers", "train.unfrozen.micro_batch_size"])
def test_settings_without_effect_on_accuracy_are_refused(tmp_path: Path, key: str):
    refuse(tmp_path, f"`{key}`.*Leave it out", {key: {"choices": [1, 2]}})


def test_section_is_refused(tmp_path: Path):
    refuse(tmp_path, "is a section", {"train.unfrozen": {"choices": [None, {}]}})


def test_setting_of_skipped_stage_is_refused(tmp_path: Path):
    refuse(tmp_path, "skips that stage", {LR: {"min": 1e-4, "max": 1e-3}}, fixed={"train.unfrozen": None})


def test_augmentation_without_effect_is_refused(tmp_path: Path):
    rotation = {"train.augmentation.rotation": {"min": 0, "max": 0.1}}
    refuse(tmp_path, "would change nothing", rotation, fixed={"train.unfrozen": None})


@pytest.mark.parametrize("name", ["pbt", "PBT", "pb2"])
def test_population_based_training_is_refused_with_the_reason(tmp_path: Path, name: str):
    refuse(tmp_path, "cannot exchange weights", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler=name)


def test_unknown_scheduler_lists_the_known_ones(tmp_path: Path):
    refuse(tmp_path, "`scheduler`: .*asha.*hyperband.*median.*none", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler="x")


def test_search_setting_without_effect_is_refused(tmp_path: Path):
    refuse(tmp_path, "no effect", {LR: {"min": 1e-4, "max": 1e-3}}, scheduler="none", reduction_factor=4)


def test_experiment_without_train_section_is_refused(tmp_path: Path):
    refuse(tmp_path, "no `train:` section", {LR: {"min": 1e-4, "max": 1e-3}}, {"root": "results"})


# Trials


def test_fixed_settings_apply_to_every_trial(tmp_path: Path):
    values = load(tmp_path, {LR: {"min": 1e-4, "max": 1e-3}}, fixed={"train.unfrozen.epochs": 3})
    assert values.trial_settings({LR: 2e-4}, "trial", 5).unfrozen.epochs == 3


def test_trial_settings_have_values_name_and_seed(tmp_path: Path):
    settings = load(tmp_path, {LR: {"min": 1e-4, "max": 1e-3}}).trial_settings({LR: 2e-4}, "trial", 5)
    assert (settings.unfrozen.lr, settings.name, settings.seed) == (2e-4, "trial", 5)


def test_min_epochs_follow_from_longest_trial(tmp_path: Path):
    values = load(tmp_path, {"train.unfrozen.epochs": {"min": 5, "max": 60}})
    assert (values.max_epochs, values.min_epochs) == (60, 4)


def test_settings_text_is_short():
    values = {LR: 3.14159e-4, "train.augmentation.rotation": 0.2, "train.unfrozen.ema_decay": None}
    assert search_space.settings_text(values) == "lr=3.14e-4 rotation=.2 ema_decay=null"


def test_ambiguous_names_include_the_section():
    assert search_space.settings_text({LR: 1e-3, "train.frozen.lr": 1e-2}) == "unfrozen.lr=1e-3 frozen.lr=.01"


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_shipped_searches_are_valid(path: Path):
    assert search_space.load_space(path, cli.load_config(path, {}, search_space.Search)).dimensions


def test_a_setting_given_twice_is_refused(tmp_path: Path):
    lr = {"train.unfrozen.lr": {"min": 1e-4, "max": 1e-2}}
    message = r"`train.unfrozen.lr` is given twice, in `fixed` and in `space`"
    refuse(tmp_path, message, lr, fixed={"train.unfrozen.lr": 1e-3})
    message = r"`fixed`: `train.unfrozen.epochs` is given twice, as it is a part of `train.unfrozen`"
    refuse(tmp_path, message, lr, fixed={"train.unfrozen.epochs": 3, "train.unfrozen": {"epochs": 4}})
