"""Settings of a config file that would have no effect are refused by their key."""

from pathlib import Path
from typing import Any

import pytest

from carclass.config.schema import Config, TrainSettings, with_changes
from carclass.config.section import validate
from carclass.errors import UserError

BASE = Path("/base")
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    (
        {"train": {"unfrozen": {"epochs": 3, "warmup_epochs": 3}}},
        r"`train`: `unfrozen.warmup_epochs` is 3 and the stage has 3 epoch\(s\): .* Give less than 3",
    ),
    ({"train": {"frozen": {"warmup_epochs": 100.5}}}, r"`frozen.warmup_epochs` is 100.5"),
    ({"train": {"frozen": {"epochs": 5, "patience": 5}}}, r"`frozen.patience` is 5 and can't end the stage earlier"),
    ({"train": {"unfrozen": {"epochs": 5, "patience": 4}}}, r"`unfrozen.patience` is 4 .* only 5 epoch"),
    (
        {"train": {"unfrozen": {"epochs": 5, "patience": 2, "keep_epochs": [5]}}},
        r"`unfrozen.patience` is 2 .* `keep_epochs` has 5, the last epoch",
    ),
    (
        {"train": {"unfrozen": {"batch_size": 16, "micro_batch_size": 16}}},
        r"`unfrozen.micro_batch_size` is 16 .* has 16 photos",
    ),
    (
        {"train": {"frozen": {"views": 2}, "augmentation": {"flip": "none"}}},
        r"`frozen.views: 2` has no effect with `augmentation.flip: none`",
    ),
    (
        {"train": {"augmentation": {"flip": "none", "rotation": 0, "zoom_height": 0, "zoom_width": 0}}},
        r"`frozen.views` is 4, but `augmentation` changes nothing",
    ),
    ({"train": {"unfrozen": {"train_size": 224}}}, r"`unfrozen.train_size` is 224 and `model.image_size`, .*, is 224"),
    (
        {"train": {"frozen": {"views": 2}, "unfrozen": None, "augmentation": {"crop": 0.5}}},
        r"`augmentation.crop` has no effect: .* Set `frozen.views` to 3",
    ),
    (
        {"train": {"frozen": {"views": 2}, "unfrozen": None, "augmentation": {"rotation": 0.1}}},
        r"`augmentation.rotation` has no effect: .* Set `frozen.views` to 3",
    ),
    (
        {"train": {"frozen": {"views": 1}, "unfrozen": None, "augmentation": {"flip": "horizontal+vertical"}}},
        r"`augmentation.flip` has no effect: .* Set `frozen.views` to 3",
    ),
    (
        {"train": {"frozen": {"views": 2}, "unfrozen": None, "augmentation": {"flip": "horizontal+vertical"}}},
        r"`augmentation.flip` has no effect: .* Set `frozen.views` to 3",
    ),
    (
        {"mask": {"detector": {"num_detections": 1}, "exclude": {"several_vehicles": True}}},
        r"`mask`: `exclude.several_vehicles` has no effect with `detector.num_detections: 1`",
    ),
    ({"mask": {"cutout": {"mode": "mask", "margin": 0.1}}}, r"`mask`: `cutout.margin` has no effect"),
    ({"mask": {"cutout": {"mode": "crop", "fill": [0, 0, 0]}}}, r"`mask`: `cutout.fill` has no effect"),
]
WITH_EFFECT: list[dict[str, Any]] = [
    {"train": {"unfrozen": {"epochs": 1, "warmup_epochs": 1}}},  # as in a file that carclass wrote whole
    {"train": {"frozen": {"views": 1}, "unfrozen": None, "augmentation": {"flip": "horizontal"}}},
    {"train": {"unfrozen": {"epochs": 1}}},  # the default warm-up, of which preflight warns
    {"train": {"unfrozen": {"epochs": 3, "warmup_epochs": 2.5}}},
    {"train": {"unfrozen": {"epochs": 5, "patience": 3, "keep_epochs": [4]}}},
    {"train": {"unfrozen": {"train_size": 192}}},
    {"train": {"augmentation": {"flip": "none", "rotation": 0, "zoom_height": 0, "zoom_width": 0, "crop": 0.5}}},
    {"train": {"augmentation": {"flip": "none"}}},
    {"train": {"frozen": {"views": 1}, "augmentation": {"flip": "none", "rotation": 0.1}}},
    {"train": {"frozen": {"views": 2}, "augmentation": {"rotation": 0.1}}},
    {"mask": {"cutout": {"mode": "crop", "margin": 0}}},
    {"mask": {"cutout": {"mode": "crop+mask", "margin": 0, "fill": [0, 0, 0]}}},
]


def config_of(values: dict[str, Any]) -> Config:
    train = {"train": {"name": "x", **values["train"]}} if "train" in values else {}
    return validate({"root": "results", **values, **train}, Config, source="test.yml", base=BASE)


@pytest.mark.parametrize(("values", "message"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused_by_its_key(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config_of(values)


@pytest.mark.parametrize("values", WITH_EFFECT)
def test_a_setting_with_an_effect_is_accepted(values: dict[str, Any]):
    assert config_of(values)


@pytest.mark.parametrize("values", [values["train"] for values, _ in WITHOUT_EFFECT if "train" in values])
def test_the_settings_of_a_former_run_are_read_all_the_same(values: dict[str, Any]):
    settings = TrainSettings.model_validate({"name": "x", **values})
    assert TrainSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_a_shorter_stage_of_a_budget_keeps_the_patience_of_its_file():
    config = config_of({"train": {"frozen": {"epochs": 75, "patience": 3}}})
    assert config.train is not None
    changed = with_changes(config.train, {"train.frozen.epochs": 2}, source="budget", base=BASE)
    assert (changed.frozen and changed.frozen.epochs, changed.frozen and changed.frozen.patience) == (2, 3)


def test_changes_keep_all_other_settings():
    config = config_of({"train": {"unfrozen": None, "frozen": {"lr": 0.01, "views": 3}, "model": {"dropout": 0.5}}})
    assert config.train is not None
    changed = with_changes(config.train, {"train.frozen.views": 4}, source="budget", base=BASE)
    assert changed == config.train.model_copy(
        update={"frozen": config.train.frozen and config.train.frozen.model_copy(update={"views": 4})}
    )
