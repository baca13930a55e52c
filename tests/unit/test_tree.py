"""Trees of experiments: order, changes by the budget, and errors found before training."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.errors import UserError
from carclass.experiments import tree

REPOSITORY = Path(__file__).parents[2]
BUDGETS = REPOSITORY / "jobs" / "experiments" / "budgets"
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
def test_shipped_trees(budget: str):
    loaded = tree.load_tree(BUDGETS / f"{budget}.yml", {"root": "results"})

    def describe(experiment: tree.Experiment) -> str:
        start = experiment.parent_epoch
        return f"{start.epoch if start else '-'} {experiment.settings.dataset}"

    assert loaded.draw(describe) == "\n".join(
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


@pytest.mark.parametrize(("budget", "num_variants"), [("recipe", 9), ("recipe-96px", 5)])
def test_the_ingredients_of_the_shipped_recipes_start_from_one_frozen_stage(budget: str, num_variants: int):
    loaded = tree.load_tree(BUDGETS / f"{budget}.yml", {"root": "results"})
    parents = [experiment.settings.parent for experiment in loaded.experiments if experiment.settings.frozen is None]
    assert parents == ["recipe-frozen@best"] * num_variants


def test_parents_come_before_children(tmp_path: Path):
    loaded = load(tmp_path, a={**UNFROZEN, "parent": "z@4"}, b=FROZEN, z=FROZEN)
    assert [each.name for each in loaded.experiments] == ["z", "a", "b"]


def test_with_parents_includes_ancestors(tmp_path: Path):
    middle = {**UNFROZEN, "parent": "a@4"}
    loaded = load(tmp_path, a=FROZEN, b=middle, c={**UNFROZEN, "parent": "b@best"}, d=FROZEN)
    assert [each.name for each in loaded.with_parents(["c"])] == ["a", "b", "c"]


@pytest.mark.parametrize("parents", [{"a": "a@best"}, {"a": "b@best", "b": "a@best"}])
def test_cycle_is_refused(tmp_path: Path, parents: dict[str, str]):
    with pytest.raises(UserError, match=r"forms a cycle: [ab] → .*Start one of them from `imagenet`"):
        load(tmp_path, **{name: {**UNFROZEN, "parent": parent} for name, parent in parents.items()})


def test_parent_epoch_that_is_not_kept_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"exp_b.yml: .*a@5 will not be kept. Add 5 to `train.frozen.keep_epochs` in "):
        load(tmp_path, a=FROZEN, b={**UNFROZEN, "parent": "a@5"})


def test_other_architecture_than_the_parent_is_refused(tmp_path: Path):
    narrow = {"architecture": "resnet26-narrow"}
    with pytest.raises(
        UserError, match=r"exp_b.yml: `train.model.architecture` is resnet26-narrow, but resnet50 in its parent"
    ):
        load(tmp_path, a=FROZEN, b={**UNFROZEN, "parent": "a@4", "model": narrow})


def test_duplicate_names_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"exp_[ab].yml and .*exp_[ab].yml both have `train.name: a`"):
        load(tmp_path, a=FROZEN, b={**FROZEN, "name": "a"})


def test_max_epochs_keeps_parent_epochs(tmp_path: Path):
    loaded = load(tmp_path, {"max_epochs": 2}, a=FROZEN, b={**UNFROZEN, "parent": "a@4"})
    assert loaded["a"].settings.frozen is not None
    assert loaded["b"].settings.unfrozen is not None
    assert (loaded["a"].settings.frozen.epochs, loaded["b"].settings.unfrozen.epochs) == (4, 2)


def test_fixed_settings_apply_to_all_experiments(tmp_path: Path):
    loaded = load(tmp_path, {"fixed": {"train.model.image_size": 64}}, a=FROZEN, b=FROZEN)
    assert [each.settings.model.image_size for each in loaded.experiments] == [64, 64]


def test_budget_replaces_imagenet(tmp_path: Path):
    loaded = load(tmp_path, {"imagenet": "sample"}, a=FROZEN, b={**UNFROZEN, "parent": "a@4"})
    assert [each.settings.parent for each in loaded.experiments] == ["sample", "a@4"]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_epoch": 3}, r"`max_epoch` is not a setting; did you mean `max_epochs`"),
        ({"experiments": "none_*.yml"}, r"`experiments`: no files match .*none_\*.yml"),
        ({"fixed": {"model.dropout": 0.1}}, r"`fixed.model.dropout`: only keys of training, such as"),
        ({"fixed": {"train.model.drop": 0.1}}, r"`train.model.drop` is not a setting; did you mean `dropout`"),
        ({"imagenet_sha256": "0" * 64}, r"`imagenet_sha256` has no effect"),
    ],
)
def test_invalid_budget_is_refused(tmp_path: Path, budget: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load(tmp_path, budget, a=FROZEN)


def test_unknown_experiment_lists_the_known_ones(tmp_path: Path):
    with pytest.raises(UserError, match=r"no experiment `c` in .* Available: a, b"):
        load(tmp_path, a=FROZEN, b=FROZEN)["c"]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({**UNFROZEN, "parent": "a@first"}, "an epoch of a run is written NAME@12, NAME@best or NAME@last"),
        (
            {"frozen": {"epochs": 3, "keep_epochs": [4]}, "unfrozen": None},
            "`keep_epochs` has 4, but the stage ends after 3",
        ),
        ({"frozen": {"keep_epochs": [4]}}, "`frozen.keep_epochs` has no effect: other runs start from the last stage"),
    ],
)
def test_invalid_experiment_is_refused(tmp_path: Path, train: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load(tmp_path, a=train)


def test_a_root_of_the_command_line_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = write(tmp_path, a={"parent": "sample"})
    assert tree.load_tree(file, {"root": "mine"}).budget.root == str(tmp_path / "here" / "mine")


def test_a_wrong_root_of_the_command_line_is_named_by_its_option(tmp_path: Path):
    with pytest.raises(UserError, match=r"^`--root`: an S3 URI is written"):
        tree.load_tree(write(tmp_path, a={"parent": "sample"}), {"root": "s3:x"})
