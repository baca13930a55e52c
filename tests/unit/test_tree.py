"""Trees of experiments: read from their files, with every mistake found before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.errors import UserError
from carclass.experiments import tree

HOUSE = Path(__file__).parents[2]
BUDGETS = HOUSE / "jobs" / "experiments" / "budgets"
FROZEN: dict[str, Any] = {"frozen": {"epochs": 9, "keep_epochs": [4]}, "unfrozen": None}
UNFROZEN: dict[str, Any] = {"frozen": None, "unfrozen": {"epochs": 9}}


def write(folder: Path, budget: dict[str, Any] | None = None, **experiments: dict[str, Any]) -> Path:
    for name, train in experiments.items():
        values = {"root": "unused", "train": {"name": name, **train}}
        (folder / f"exp_{name}.yml").write_text(yaml.safe_dump(values))
    file = folder / "budget.yml"
    file.write_text(yaml.safe_dump({"root": str(folder / "root"), "experiments": "exp_*.yml", **(budget or {})}))
    return file


def load(folder: Path, budget: dict[str, Any] | None = None, **experiments: dict[str, Any]) -> tree.Tree:
    return tree.load_tree(write(folder, budget, **experiments), {})


@pytest.mark.parametrize("budget", ["tiny", "cars196", "full"])
def test_the_tree_that_comes_along_is_the_originals_and_ours(budget: str):
    found = tree.load_tree(BUDGETS / f"{budget}.yml", {"root": "results"})
    drawn = found.draw(lambda one: f"{one.start.epoch if one.start else '-'} {one.settings.dataset}")
    assert drawn == "\n".join(
        [
            "exp_001: - v1",
            "exp_002: - v1",
            "├── exp_003: 12 v1",
            "├── exp_004: 12 v1",
            "├── exp_005: 12 v1",
            "│   └── exp_006: 69 v1",
            "└── exp_008: 12 v1",
            "exp_007: - v1",
            "exp_009: - v2",
            "└── exp_010: 22 v2",
            "exp_011: - v2",
            "exp_012: - v2",
            "└── exp_013: 24 v2",
            "exp_014: - v2-masked",
            "exp_015: - v2",
            "exp_016: - v1",
        ]
    )


def test_parents_come_before_children_whatever_the_files_are_called(tmp_path: Path):
    found = load(tmp_path, a={**UNFROZEN, "parent": "z@4"}, b=FROZEN, z=FROZEN)
    assert [one.name for one in found.experiments] == ["z", "a", "b"]


def test_a_run_comes_with_all_that_it_starts_from(tmp_path: Path):
    middle = {**UNFROZEN, "parent": "a@4"}
    found = load(tmp_path, a=FROZEN, b=middle, c={**UNFROZEN, "parent": "b@best"}, d=FROZEN)
    assert [one.name for one in found.with_parents(["c"])] == ["a", "b", "c"]


@pytest.mark.parametrize("circle", [{"a": "a@best"}, {"a": "b@best", "b": "a@best"}])
def test_a_circle_is_named(tmp_path: Path, circle: dict[str, str]):
    with pytest.raises(UserError, match=r"goes round in a circle: [ab] → .*Start one of them from `imagenet`"):
        load(tmp_path, **{name: {**UNFROZEN, "parent": parent} for name, parent in circle.items()})


def test_an_epoch_that_its_parent_will_not_keep_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"exp_b.yml: .*a@5 will not be kept. Add 5 to `train.frozen.keep_epochs` in "):
        load(tmp_path, a=FROZEN, b={**UNFROZEN, "parent": "a@5"})


def test_another_architecture_than_the_parents_is_named(tmp_path: Path):
    narrow = {"architecture": "resnet26-narrow"}
    with pytest.raises(
        UserError, match=r"exp_b.yml: `train.model.architecture` is resnet26-narrow, and `train.parent`"
    ):
        load(tmp_path, a=FROZEN, b={**UNFROZEN, "parent": "a@4", "model": narrow})


def test_two_files_of_one_name_are_both_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"exp_[ab].yml and .*exp_[ab].yml both have `train.name: a`"):
        load(tmp_path, a=FROZEN, b={**FROZEN, "name": "a"})


def test_epochs_are_limited_but_those_that_others_start_from_are_reached(tmp_path: Path):
    found = load(tmp_path, {"max_epochs": 2}, a=FROZEN, b={**UNFROZEN, "parent": "a@4"})
    assert found["a"].settings.frozen is not None
    assert found["b"].settings.unfrozen is not None
    assert (found["a"].settings.frozen.epochs, found["b"].settings.unfrozen.epochs) == (4, 2)


def test_what_is_fixed_holds_for_all(tmp_path: Path):
    found = load(tmp_path, {"fixed": {"train.model.image_size": 64}}, a=FROZEN, b=FROZEN)
    assert [one.settings.model.image_size for one in found.experiments] == [64, 64]


def test_the_budget_says_what_imagenet_stands_for(tmp_path: Path):
    found = load(tmp_path, {"imagenet": "sample"}, a=FROZEN, b={**UNFROZEN, "parent": "a@4"})
    assert [one.settings.parent for one in found.experiments] == ["sample", "a@4"]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_epoch": 3}, r"`max_epoch` is not a setting; did you mean `max_epochs`"),
        ({"experiments": "none_*.yml"}, r"`experiments`: no files .*none_\*.yml"),
        ({"fixed": {"model.dropout": 0.1}}, r"`fixed.model.dropout`: it changes experiments, by keys such as"),
        ({"fixed": {"train.model.drop": 0.1}}, r"`train.model.drop` is not a setting; did you mean `dropout`"),
        ({"imagenet_sha256": "0" * 64}, r"`imagenet_sha256` has no effect"),
    ],
)
def test_a_wrong_budget_is_explained(tmp_path: Path, budget: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        load(tmp_path, budget, a=FROZEN)


def test_an_unknown_experiment_is_named_with_those_that_are_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"no experiment `c` in .* There: a, b"):
        load(tmp_path, a=FROZEN, b=FROZEN)["c"]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({**UNFROZEN, "parent": "a@first"}, "an epoch of a run is written NAME@12, NAME@best or NAME@last"),
        (
            {"frozen": {"epochs": 3, "keep_epochs": [4]}, "unfrozen": None},
            "`keep_epochs` has 4, and the stage ends after 3",
        ),
        ({"frozen": {"keep_epochs": [4]}}, "`frozen.keep_epochs` has no effect: other runs start from the last stage"),
    ],
)
def test_a_wrong_experiment_is_explained(tmp_path: Path, train: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        load(tmp_path, a=train)
