"""Status of experiments: progress, and runs that are stale by settings, parents or data."""

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


def make_tree(root: Path, *settings: TrainSettings) -> Tree:
    return Tree(
        Budget(root=str(root), experiments="exp_*.yml"), [Experiment(f"{each.name}.yml", each) for each in settings]
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Publish the finished runs `first`, `child` and `grandchild`."""
    publish_dataset(tmp_path)
    finish(begin(tmp_path, FIRST))
    for settings in (CHILD, GRANDCHILD):
        finish(begin(tmp_path, settings, status.parent_sha256(str(tmp_path), settings.parent) or ""))
    return tmp_path


def run_states(tree: Tree) -> list[str]:
    return [each.state for each in status.tree_status(tree).values()]


def test_unchanged_runs_are_finished(root: Path):
    assert run_states(make_tree(root, FIRST, CHILD, GRANDCHILD)) == ["finished"] * 3


def test_missing_and_begun_runs(root: Path):
    other = CHILD.model_copy(update={"name": "other"})
    begin(root, CHILD.model_copy(update={"name": "half"}), status.parent_sha256(str(root), "first@2") or "")
    half = CHILD.model_copy(update={"name": "half"})
    assert run_states(make_tree(root, FIRST, other, half)) == ["finished", "missing", "begun"]


def test_edited_settings_make_run_and_descendants_stale(root: Path):
    edited = FIRST.model_copy(update={"model": FIRST.model.model_copy(update={"dropout": 0.5})})
    statuses = status.tree_status(make_tree(root, edited, CHILD, GRANDCHILD))
    assert [each.reason for each in statuses.values()] == [
        "other settings: model.dropout",
        "first is stale",
        "child is stale",
    ]


def test_other_parent_weights_make_a_child_stale(root: Path):
    status.set_aside_run(status.tree_status(make_tree(root, FIRST))["first"].run)
    finish(begin(root, FIRST), kept=(2, 3, 5))
    storage.delete_folder(f"{root}/experiments/first/frozen/epoch-0002")
    Path(root, "experiments/first/frozen/epoch-0003").rename(root / "experiments/first/frozen/epoch-0002")
    assert status.tree_status(make_tree(root, FIRST, CHILD))["child"].reason == "the parent's weights"


def test_other_dataset_content_makes_a_run_stale(root: Path):
    publish_dataset(root, seed=2)
    assert status.tree_status(make_tree(root, FIRST))["first"].reason == "the dataset's content"


def test_machine_settings_do_not_make_runs_stale(root: Path):
    assert run_states(make_tree(root, FIRST.model_copy(update={"keep_checkpoints": 7}))) == ["finished"]


def test_run_that_is_set_aside_keeps_its_records(root: Path):
    run = status.tree_status(make_tree(root, FIRST))["first"].run
    rows = run.metrics()
    target = Path(status.set_aside_run(run))
    assert sorted(path.name for path in target.iterdir()) == ["config.yml", "lineage.json", "metrics.jsonl"]
    assert len((target / "metrics.jsonl").read_text().splitlines()) == len(rows)
    assert not Path(run.uri, "config.yml").exists()


def test_a_file_of_the_user_stays_in_the_folder_of_a_run_set_aside(root: Path):
    run = status.tree_status(make_tree(root, FIRST))["first"].run
    notes = Path(run.uri, "notes.txt")
    notes.write_text("lr 3e-4 was too high")
    status.set_aside_run(run)
    assert [path for path in Path(run.uri).rglob("*") if path.is_file()] == [notes]


def test_interrupted_removal_leaves_no_model_to_a_new_run(root: Path, monkeypatch: pytest.MonkeyPatch):
    run = status.tree_status(make_tree(root, FIRST))["first"].run

    def fail(uri: str) -> None:
        raise OSError("storage is away")

    monkeypatch.setattr(storage, "delete", fail)
    with pytest.raises(OSError, match="storage is away"):
        status.set_aside_run(run)
    assert Path(run.uri, "config.yml").exists() or run.unfinished_stages


def test_tree_shows_parent_dataset_state_and_accuracy(root: Path):
    assert tree_view.draw_tree(make_tree(root, FIRST, CHILD)).splitlines() == [
        "first: sample  v2  finished  val 0.500 (epoch 5)",
        "└── child: @2  v2  finished  val 0.500 (epoch 5)",
    ]


def test_run_is_described_with_changes_against_its_parent(root: Path):
    shown = tree_view.describe_run(make_tree(root, FIRST, CHILD), "child")
    assert [line.split() for line in shown.splitlines() if line.startswith("  lr ")] == [["lr", "2e-3", "→", "6e-4"]]
