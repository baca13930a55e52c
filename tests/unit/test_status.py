"""Status of experiments: progress, and runs that are stale by settings, parents or data."""

import re
from pathlib import Path

import pytest

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.experiments import status, tree_view
from carclass.experiments.collect import collect_comparison, read_test
from carclass.experiments.replaced_runs import set_aside_run
from carclass.experiments.tree import Budget, Experiment, Tree
from carclass.runs.run import record_best_stage
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
    first = begin(tmp_path, FIRST)
    finish(first)
    record_best_stage(first)
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
    set_aside_run(status.tree_status(make_tree(root, FIRST))["first"].run)
    finish(begin(root, FIRST), kept=(2, 3, 5))
    storage.delete_folder(f"{root}/experiments/first/frozen/epoch-0002")
    Path(root, "experiments/first/frozen/epoch-0003").rename(root / "experiments/first/frozen/epoch-0002")
    assert status.tree_status(make_tree(root, FIRST, CHILD))["child"].reason == "the parent's weights"


def test_other_dataset_content_makes_a_run_stale(root: Path):
    publish_dataset(root, seed=2)
    assert status.tree_status(make_tree(root, FIRST))["first"].reason == "the dataset's content"


def test_machine_settings_do_not_make_runs_stale(root: Path):
    assert run_states(make_tree(root, FIRST.model_copy(update={"keep_checkpoints": 7}))) == ["finished"]


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "config.yml",
            "seed: 123",
            "seed: 123\nsurprise: 1",
            r"`surprise` is not a setting.*another version of carclass",
        ),
        ("config.yml", "  dropout: 0.2\n", "", r"lacks the setting `model.dropout`.*another version of carclass"),
        ("config.yml", "format: 5", "format: 99", "a newer version of carclass"),
        ("lineage.json", None, None, r"lineage.json is missing\. Restore it"),
        ("lineage.json", "dataset", "data", "`dataset` is missing"),
        ("lineage.json", '"environments": []', '"environments": [7]', "`environments` is no list"),
        ("model.json", '"stage": "frozen"', '"stage": "thawed"', "the run has no stage `thawed`"),
        ("metrics.jsonl", "val_accuracy", "accuracy", "`val_accuracy` is missing"),
        ("frozen/best.json", "{", "", r"best.json is damaged"),
        ("frozen/epoch-0002/checkpoint.json", "{", "", None),
    ],
)
def test_a_damaged_run_ends_no_listing_of_the_others(
    root: Path, file: str, old: str | None, new: str, reason: str | None
):
    path = root / "experiments" / "first" / file
    path.unlink() if old is None else path.write_text(path.read_text().replace(old, new))
    tree = make_tree(root, FIRST, CHILD, GRANDCHILD)
    statuses = status.tree_status(tree)
    first, *others = statuses.values()
    assert (first.state, [each.state for each in others]) == ("unreadable" if reason else "finished", ["finished"] * 2)
    assert re.search(reason or "None", str(first.reason))
    assert first.state in tree_view.draw_tree(tree).splitlines()[0]
    assert first.state in tree_view.describe_run(tree, "first")
    assert len(collect_comparison(tree, statuses).runs) == 3


def test_a_damaged_evaluation_is_done_anew(root: Path):
    first = status.tree_status(make_tree(root, FIRST))["first"]
    assert read_test(first) is None
    Path(first.run.uri, "report").mkdir()
    Path(first.run.uri, "report", "metrics.json").write_text('{"accuracy": 0.5, "num_photos": 2}')
    Path(first.run.uri, "report", "predictions.parquet").write_text("PAR1")
    assert read_test(first) is None


def test_tree_shows_parent_dataset_state_and_accuracy(root: Path):
    assert tree_view.draw_tree(make_tree(root, FIRST, CHILD)).splitlines() == [
        "first: sample  v2  finished  val 0.500 (epoch 5)",
        "└── child: @2  v2  finished  val 0.500 (epoch 5)",
    ]


def test_run_is_described_with_changes_against_its_parent(root: Path):
    shown = tree_view.describe_run(make_tree(root, FIRST, CHILD), "child")
    assert [line.split() for line in shown.splitlines() if line.startswith("  lr ")] == [["lr", "2e-3", "→", "6e-4"]]
