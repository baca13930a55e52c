"""How far experiments are, and when a run is no longer what its files, parents and data say."""

from pathlib import Path

import pytest

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.experiments import status, tree_view
from carclass.experiments.tree import Budget, Experiment, Tree
from tests.helpers.runs import FROZEN, MODEL, begin, finish, publish_dataset

FIRST = TrainSettings(name="first", **{**FROZEN, "frozen": {"epochs": 5, "keep_epochs": [2]}})
CHILD = TrainSettings(name="child", parent="first@2", model=MODEL, frozen=None, unfrozen={"epochs": 5})
GRANDCHILD = CHILD.model_copy(update={"name": "grandchild", "parent": "child@best"})


def tree_of(root: Path, *settings: TrainSettings) -> Tree:
    return Tree(
        Budget(root=str(root), experiments="exp_*.yml"), [Experiment(f"{one.name}.yml", one) for one in settings]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Has `first`, `child` and `grandchild`, all finished."""
    publish_dataset(tmp_path)
    finish(begin(tmp_path, FIRST))
    for one in (CHILD, GRANDCHILD):
        finish(begin(tmp_path, one, status.parent_sha256(str(tmp_path), one.parent) or ""))
    return tmp_path


def states(tree: Tree) -> list[str]:
    return [one.state for one in status.tree_status(tree).values()]


def test_runs_that_are_what_their_files_say_are_finished(root: Path):
    assert states(tree_of(root, FIRST, CHILD, GRANDCHILD)) == ["finished"] * 3


def test_a_run_that_was_never_begun_is_missing_and_one_without_a_model_is_begun(root: Path):
    other = CHILD.model_copy(update={"name": "other"})
    begin(root, CHILD.model_copy(update={"name": "half"}), status.parent_sha256(str(root), "first@2") or "")
    half = CHILD.model_copy(update={"name": "half"})
    assert states(tree_of(root, FIRST, other, half)) == ["finished", "missing", "begun"]


def test_a_parents_edited_settings_make_it_and_its_children_stale(root: Path):
    edited = FIRST.model_copy(update={"model": FIRST.model.model_copy(update={"dropout": 0.5})})
    found = status.tree_status(tree_of(root, edited, CHILD, GRANDCHILD))
    assert [one.reason for one in found.values()] == [
        "other settings: model.dropout",
        "first is stale",
        "child is stale",
    ]


def test_a_parent_trained_again_to_other_weights_makes_its_child_stale(root: Path):
    status.set_aside_run(status.tree_status(tree_of(root, FIRST))["first"].run)
    finish(begin(root, FIRST), kept=(2, 3, 5))
    storage.delete_folder(f"{root}/experiments/first/frozen/epoch-0002")
    Path(root, "experiments/first/frozen/epoch-0003").rename(root / "experiments/first/frozen/epoch-0002")
    assert status.tree_status(tree_of(root, FIRST, CHILD))["child"].reason == "the parent's weights"


def test_another_content_of_its_dataset_makes_a_run_stale(root: Path):
    publish_dataset(root, seed=2)
    assert status.tree_status(tree_of(root, FIRST))["first"].reason == "the dataset's content"


def test_settings_of_machines_make_nothing_stale(root: Path):
    assert states(tree_of(root, FIRST.model_copy(update={"keep_checkpoints": 7}))) == ["finished"]


def test_a_run_that_is_put_aside_leaves_what_it_said(root: Path):
    run = status.tree_status(tree_of(root, FIRST))["first"].run
    rows = run.metrics()
    place = Path(status.set_aside_run(run))
    assert sorted(path.name for path in place.iterdir()) == ["config.yml", "lineage.json", "metrics.jsonl"]
    assert len((place / "metrics.jsonl").read_text().splitlines()) == len(rows)
    assert not Path(run.uri, "config.yml").exists()


def test_a_removal_that_is_interrupted_leaves_no_old_model_to_a_new_run(root: Path, monkeypatch: pytest.MonkeyPatch):
    run = status.tree_status(tree_of(root, FIRST))["first"].run

    def fail(uri: str) -> None:
        raise OSError("storage is away")

    monkeypatch.setattr(storage, "delete_folder", fail)
    with pytest.raises(OSError, match="storage is away"):
        status.set_aside_run(run)
    assert Path(run.uri, "config.yml").exists() or run.missing


def test_the_tree_says_where_each_starts_on_what_and_how_far_it_is(root: Path):
    assert tree_view.draw_tree(tree_of(root, FIRST, CHILD)).splitlines() == [
        "first: sample  v2  finished  val 0.500 (epoch 5)",
        "└── child: @2  v2  finished  val 0.500 (epoch 5)",
    ]


def test_a_run_is_shown_with_what_it_changes_against_its_parent(root: Path):
    shown = tree_view.describe_run(tree_of(root, FIRST, CHILD), "child")
    assert [line.split() for line in shown.splitlines() if line.startswith("  lr ")] == [["lr", "2e-3", "→", "6e-4"]]
