"""Stale runs that are moved aside whole, also if that is interrupted, and the choice of those to train again."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.experiments import replaced_runs
from carclass.experiments.run import find_stale, rerun_stale
from carclass.experiments.tree import Tree, load_tree
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import read_model
from tests.helpers.runs import FROZEN, MODEL, begin, finish, publish_dataset

LINEAGE = Path(__file__).parents[2] / "jobs" / "lineage.py"
RUN_FILES = ("metrics.jsonl", "frozen/best.json", "frozen/best.safetensors", "report/report.html", "export/model.onnx")
CHILD = {"model": MODEL, "frozen": None, "unfrozen": {"epochs": 5}}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run of a few small files, and one of the user's."""
    settings = TrainSettings(name="first", **FROZEN)
    run = begin_run(Run(str(tmp_path), settings), dataset.Dataset("", {}), "0" * 64)
    for file in (*RUN_FILES, "notes.txt"):
        path = Path(run.uri, file)
        path.parent.mkdir(exist_ok=True)
        path.write_text(file)
    return run


def test_a_run_is_moved_whole(run: Run):
    before = contents(Path(run.uri))
    target = Path(replaced_runs.set_aside_run(run))
    notes = before.pop("notes.txt")
    assert contents(target) == before
    assert contents(Path(run.uri)) == {"notes.txt": notes}


def test_its_folder_is_named_by_the_start_of_the_run(run: Run):
    started = run.lineage()["started"].replace(":", "")
    target = Path(replaced_runs.set_aside_run(run))
    assert target.parent == Path(run.root, "replaced", "first")
    assert target.name.startswith(f"{started}-")


def test_a_run_of_the_same_name_is_set_aside_beside_the_former(run: Run):
    first = replaced_runs.set_aside_run(run)
    again = begin_run(Run(run.root, run.settings.model_copy(update={"seed": 7})), dataset.Dataset("", {}), "1" * 64)
    assert replaced_runs.set_aside_run(again) != first
    assert replaced_runs.names_of_replaced_runs(run.root) == {"first"}


def test_the_weights_of_a_replaced_run_are_restored_by_moving_its_folder_back(tmp_path: Path):
    publish_dataset(tmp_path)
    run = begin(tmp_path, TrainSettings(name="first", **FROZEN))
    finish(run)
    before = read_model(run.model_uri("frozen"))[1]["sha256"]
    target = replaced_runs.set_aside_run(run)
    shutil.rmtree(run.uri)
    Path(target).rename(run.uri)
    assert read_model(run.model_uri("frozen"))[1]["sha256"] == before


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt the process before its write or deletion of the given number."""
    steps = iter(range(count))

    def stop_or(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return function(*arguments)

        return step

    monkeypatch.setattr(storage, "write_bytes", stop_or(storage.write_bytes))
    monkeypatch.setattr(storage, "delete", stop_or(storage.delete))


def test_a_move_that_is_interrupted_at_any_step_loses_nothing_and_is_completed_by_the_next(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, expected = Path(run.uri), contents(Path(run.uri))
    template = shutil.copytree(folder, tmp_path / "template")
    for count in range(2 * (len(expected) - 1)):
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "replaced", ignore_errors=True)
        shutil.copytree(template, folder)
        with monkeypatch.context() as patch:
            stop_at(patch, count)
            with pytest.raises(KeyboardInterrupt):
                replaced_runs.set_aside_run(run)
        moved = [content for path in (tmp_path / "replaced").glob("first/*") for content in contents(path).values()]
        assert {*expected.values()} <= {*moved, *contents(folder).values()}, count
        assert replaced_runs.is_half_moved(run) == (count > 1), count  # from the copy of the last file on
        if (folder / "config.yml").exists():  # else a new run may begin here
            replaced_runs.set_aside_run(run)
        (target,) = (tmp_path / "replaced" / "first").iterdir()
        assert {**contents(target), "notes.txt": b"notes.txt"} == expected, count
        assert {*contents(folder)} <= {"notes.txt", "lineage.json"}, count


# Choice


def write_tree(folder: Path, **experiments: dict[str, Any]) -> Path:
    """Write a budget and its experiments; return the budget's file."""
    for name, train in experiments.items():
        (folder / f"exp_{name}.yml").write_text(yaml.safe_dump({"root": "unused", "train": {"name": name, **train}}))
    file = folder / "small.yml"
    file.write_text(yaml.safe_dump({"root": "root", "experiments": "exp_*.yml"}))
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the budget of a finished run `first` and its child, both stale by another seed of `first`."""
    root = tmp_path / "root"
    publish_dataset(root)
    changed = {**FROZEN, "frozen": {"epochs": 5, "keep_epochs": [2]}, "seed": 7}
    first = begin(root, TrainSettings(name="first", **{**changed, "seed": 1}))
    finish(first)
    best = read_model(first.model_uri("frozen"))[1]["sha256"]
    finish(begin(root, TrainSettings(name="child", parent="first@best", **CHILD), best))
    return write_tree(tmp_path, first=changed, child={**CHILD, "parent": "first@best"})


@pytest.fixture
def tree(file: Path) -> Tree:
    return load_tree(file, {})


def is_untouched(tree: Tree) -> bool:
    root = Path(tree.budget.root)
    models = [root / "experiments" / name for name in ("first/frozen/best.json", "child/unfrozen/best.json")]
    return all(path.exists() for path in models) and not (root / "replaced").exists()


def test_stale_runs_are_found_with_their_reasons(tree: Tree):
    assert find_stale(tree) == {"first": "other settings: seed", "child": "first is stale"}


def test_a_run_that_was_moved_aside_but_not_trained_again_is_found(tree: Tree):
    replaced_runs.set_aside_run(Run(tree.budget.root, tree["first"].settings))
    assert find_stale(tree) == {"first": "moved aside, not trained again yet", "child": "first is trained again"}


def test_a_stale_parent_that_is_not_named_is_refused(tree: Tree):
    with pytest.raises(
        UserError, match=r"first is stale .*Retrain it too: the same command with `rerun-stale first child`"
    ):
        rerun_stale(tree, ["child"])
    assert is_untouched(tree)


def test_a_missing_dataset_is_reported_before_a_run_is_moved(tree: Tree):
    shutil.rmtree(Path(tree.budget.root, "datasets"))
    with pytest.raises(UserError, match="no dataset `v2`"):
        rerun_stale(tree, ["first", "child"])
    assert is_untouched(tree)


def test_a_missing_parent_is_reported_before_a_run_is_moved(tree: Tree, file: Path):
    write_tree(file.parent, child={**CHILD, "parent": "nobody@best"})
    with pytest.raises(UserError, match="no run `nobody`"):
        rerun_stale(load_tree(file, {}), ["first", "child"])
    assert is_untouched(tree)


def lineage(file: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(LINEAGE), *words, "--budget", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow  # 5 s, imports of Ray
def test_stale_runs_are_listed_and_kept_without_names_and_yes(file: Path, tree: Tree):
    done = lineage(file, "rerun-stale")
    assert done.returncode == 2
    assert "first (other settings: seed); child (first is stale). Add the names of those to train" in done.stderr
    assert is_untouched(tree)
