"""Trees of experiments on a small cluster: parents, failures, resuming, and stale runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.errors import UserError
from carclass.experiments import status, tree
from carclass.experiments.compare import compare_runs
from carclass.experiments.run import TreeProgress, run_experiments, take_ready
from carclass.ingestion.ingest import ingest_photos
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, find_run
from carclass.runs.saved_model import read_model

JOBS = Path(__file__).parents[2] / "jobs"
FROZEN: dict[str, Any] = {
    "frozen": {"epochs": 2, "keep_epochs": [1], "views": 1},
    "unfrozen": None,
    "parent": "imagenet",
}
CHILD: dict[str, Any] = {"frozen": None, "unfrozen": {"epochs": 2, "batch_size": 16}, "parent": "first@1"}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "first": FROZEN,
    "child": CHILD,
    "lost": {**FROZEN, "parent": "nowhere.safetensors"},
    "orphan": {**CHILD, "parent": "lost@1"},
}
SIBLINGS: dict[str, dict[str, Any]] = {
    "twin": CHILD,
    "dropout": {**CHILD, "model": {"dropout": 0.6}},
    "turned": {**CHILD, "augmentation": {"rotation": 0.3}},
    "fresh": {**CHILD, "parent": "imagenet"},
}


def write(folder: Path, photos: Path, experiments: dict[str, dict[str, Any]]) -> Path:
    """Write a budget file and its experiments; return the budget file."""
    for name, train in experiments.items():
        values = {"root": "unused", "train": {"name": name, "dataset": "v1", **train}}
        (folder / f"exp_{name}.yml").write_text(yaml.safe_dump(values))
    file = folder / "budget.yml"
    budget = {
        "root": str(folder / "root"),
        "experiments": "exp_*.yml",
        "ingest": {"photos": str(photos / "photos"), "labels": str(photos / "labels.csv")},
        "imagenet": "sample",
        "devices_per_worker": 2,  # two runs at a time: every process takes seconds to start
        "fixed": {"train.model.architecture": "resnet26-narrow", "train.model.image_size": 32},
    }
    file.write_text(yaml.safe_dump(budget))
    return file


class Trained(NamedTuple):
    """A tree whose experiments were run, and the result."""

    tree: tree.Tree
    progress: TreeProgress


@pytest.fixture(scope="module")
def trained(ray_cluster, photos_folder: Path, tmp_path_factory) -> Trained:
    loaded = tree.load_tree(write(tmp_path_factory.mktemp("tree"), photos_folder, EXPERIMENTS), {})
    return Trained(loaded, run_experiments(loaded, loaded.experiments))


@pytest.fixture(scope="module")
def siblings(trained: Trained, photos_folder: Path) -> Trained:
    """Add experiments to the tree and run them."""
    folder = Path(trained.tree["first"].file).parent
    loaded = tree.load_tree(write(folder, photos_folder, EXPERIMENTS | SIBLINGS), {})
    return Trained(loaded, run_experiments(loaded, loaded.with_parents([*SIBLINGS])))


def losses(tested: Trained, name: str) -> list[float]:
    run = find_run(tested.tree.budget.root, name)
    return [row["loss"] for epoch in (1, 2) for row in run.steps("unfrozen", epoch)]


def test_runs_finish_if_their_parents_do(trained):
    assert sorted(trained.progress.finished) == ["child", "first"]


def test_failed_run_has_a_reason_and_fails_its_children(trained):
    assert sorted(trained.progress.failed) == ["lost", "orphan"]
    assert "nowhere.safetensors cannot be read" in trained.progress.failed["lost"]
    assert trained.progress.failed["orphan"] == "its parent lost failed"


def test_child_records_the_hash_of_its_parent_epoch(trained):
    root = trained.tree.budget.root
    weights = storage.read_bytes(f"{root}/experiments/first/frozen/epoch-0001/weights.safetensors")
    assert find_run(root, "child").lineage()["parent_sha256"] == storage.sha256(weights)


@pytest.mark.slow  # 40 s with its fixture
def test_siblings_with_the_same_settings_have_the_same_losses(siblings):
    assert losses(siblings, "child") == losses(siblings, "twin")


@pytest.mark.slow  # 40 s with its fixture
@pytest.mark.parametrize("changed", ["dropout", "turned"])
def test_dropout_and_augmentation_of_a_child_change_its_losses(siblings, changed: str):
    assert losses(siblings, "child") != losses(siblings, changed)


@pytest.mark.slow  # 40 s with its fixture
def test_child_inherits_the_classifier(siblings):
    """Compare first losses: a random classifier of ten classes has at least 2.3."""
    assert losses(siblings, "child")[0] < losses(siblings, "fresh")[0]


def test_second_run_trains_nothing(trained):
    root = Path(trained.tree.budget.root, "experiments")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and "lost" not in path.parts}
    again = run_experiments(trained.tree, trained.tree.experiments)
    assert again.finished == ["first", "child"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow  # 10 s
def test_other_classes_than_the_parent_are_refused_before_training(trained, photos_folder: Path, tmp_path: Path):
    file = write(tmp_path, photos_folder, {"first": FROZEN, "other": {**CHILD, "dataset": "few"}})
    few = tmp_path / "few.csv"
    rows = (photos_folder / "labels.csv").read_text().splitlines()
    few.write_text("\n".join([rows[0], *(row for row in rows[1:] if row.split(",")[1] < "M")]))
    photos = str(photos_folder / "photos")
    ingest_photos(str(tmp_path / "root"), IngestSettings(dataset="few", photos=photos, labels=str(few)))
    ingest_photos(str(tmp_path / "root"), tree.load_tree(file, {}).budget.ingest)
    loaded = tree.load_tree(file, {})
    with pytest.raises(UserError, match=r"different classes\. Choose datasets of the same classes"):
        run_experiments(loaded, loaded.experiments)
    assert not (tmp_path / "root" / "experiments").exists()


def test_unusable_weights_are_found_before_photos_are_read(photos_folder: Path, tmp_path: Path):
    loaded = tree.load_tree(write(tmp_path, photos_folder, {"lost": EXPERIMENTS["lost"]}), {})
    progress = run_experiments(loaded, loaded.experiments)
    assert "nowhere.safetensors cannot be read" in progress.failed["lost"]
    assert not (tmp_path / "root" / "datasets").exists()


def test_unusable_detector_weights_are_found_before_photos_are_read(photos_folder: Path, tmp_path: Path):
    file = write(tmp_path, photos_folder, {"masked": {**FROZEN, "dataset": "v2"}})
    detector = {"model": "sample", "weights": str(tmp_path / "nowhere.pkl")}
    file.write_text(file.read_text() + yaml.safe_dump({"masks": [{"dataset": "v2", "detector": detector}]}))
    loaded = tree.load_tree(file, {})
    with pytest.raises(UserError, match=r"`mask.detector.weights`: .*nowhere.pkl cannot be read"):
        run_experiments(loaded, loaded.experiments)
    assert not (tmp_path / "root" / "datasets").exists()


def test_missing_parent_is_refused_before_training(photos_folder: Path, tmp_path: Path):
    loaded = tree.load_tree(write(tmp_path, photos_folder, {"child": {**CHILD, "parent": "nobody@best"}}), {})
    with pytest.raises(UserError, match=r"exp_child.yml: `train.parent` is nobody@best, but no run `nobody` in .*root"):
        run_experiments(loaded, loaded.experiments)
    assert not (tmp_path / "root").exists()


def test_edited_parent_is_stale_and_not_retrained(trained, tmp_path: Path):
    file = Path(trained.tree["first"].file)
    kept = file.read_text()
    file.write_text(kept.replace("views: 1", "views: 2"))
    try:
        edited = tree.load_tree(file.with_name("budget.yml"), {})
        again = run_experiments(edited, edited.with_parents(["child"]))
    finally:
        file.write_text(kept)
    assert {name: why.split(":")[0] for name, why in again.failed.items()} == {
        "first": "stale (other settings",
        "child": "stale (first is stale)",
    }


@pytest.mark.slow  # 5 s
@pytest.mark.usefixtures("own_cluster")
def test_comparison_evaluates_every_finished_run(trained):
    some = tree.Tree(trained.tree.budget, trained.tree.with_parents(["child", "orphan"]))
    page, _ = (Path(place) for place in compare_runs(some))
    text = page.read_text()
    assert all(name in text for name in ("first", "child", "lost", "orphan"))
    reports = [
        Path(trained.tree.budget.root, "experiments", name, "report", "report.html") for name in ("first", "child")
    ]
    assert all(path.exists() for path in reports)


def start(file: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(JOBS / "lineage.py"), *words, "--budget", str(file)]
    log = file.with_name("job.log").open("a")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # In its own session, so that killing the group kills Ray's processes too, like the loss of a node.
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=environment)


@pytest.mark.nightly  # 90 s
def test_killed_tree_is_resumed(trained, photos_folder: Path, tmp_path: Path):
    requested = {name: EXPERIMENTS[name] for name in ("first", "child")}
    file = write(tmp_path, photos_folder, requested)
    root = tmp_path / "root" / "experiments"
    job = start(file, "run", "all")
    deadline = time.monotonic() + 180
    while not (root / "first" / "frozen" / "best.json").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, (tmp_path / "job.log").read_text()
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    before = {path: path.stat().st_mtime_ns for path in (root / "first").rglob("*") if path.is_file()}
    assert start(file, "run", "all").wait(timeout=240) == 0, (tmp_path / "job.log").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    expected = Path(trained.tree.budget.root, "experiments")
    for name in requested:
        stage = "frozen" if name == "first" else "unfrozen"
        sha256 = [
            json.loads((folder / name / stage / "best.json").read_text())["sha256"] for folder in (root, expected)
        ]
        assert sha256[0] == sha256[1], name


@pytest.mark.nightly  # 100 s
def test_a_killed_rerun_of_stale_runs_is_resumed_and_keeps_the_old_runs(trained, photos_folder: Path, tmp_path: Path):
    root, old = tmp_path / "root", Path(trained.tree.budget.root, "experiments")
    shutil.copytree(trained.tree.budget.root, root)
    file = write(tmp_path, photos_folder, {"first": {**FROZEN, "seed": 7}, "child": CHILD})
    job = start(file, "rerun-stale", "--yes")
    deadline = time.monotonic() + 180
    while not list((root / "replaced").glob("first/*/config.yml")):
        assert time.monotonic() < deadline
        assert job.poll() is None, (tmp_path / "job.log").read_text()
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert (root / "experiments" / "child" / "unfrozen" / "best.json").exists()
    assert start(file, "rerun-stale", "--yes").wait(timeout=240) == 0, (tmp_path / "job.log").read_text()
    states = [each.state for each in status.tree_status(tree.load_tree(file, {})).values()]
    assert states == ["finished", "finished"]
    for model in ("first/frozen/best", "child/unfrozen/best"):
        name, rest = model.split("/", 1)
        (replaced,) = (root / "replaced" / name).glob(f"*/{rest}.safetensors")
        assert replaced.read_bytes() == (old / f"{model}.safetensors").read_bytes()
        assert read_model(str(root / "experiments" / model))[1] != read_model(str(old / model))[1]


def test_run_waits_for_features_that_another_computes(photos_folder: Path, tmp_path: Path):
    other = {**FROZEN, "model": {"dropout": 0.5}}
    loaded = tree.load_tree(write(tmp_path, photos_folder, {"first": FROZEN, "other": other, "child": CHILD}), {})
    first = loaded["first"]
    progress = TreeProgress([each for each in loaded.experiments if each.name != "child"])
    assert [each.name for each in take_ready(loaded, progress)] == ["first"]
    progress = TreeProgress([loaded["other"]], {"a task": first})
    assert take_ready(loaded, progress) == []
    MetricsLog(Run(loaded.budget.root, first.settings), "frozen", 0).add(
        {
            "epoch": 1,
            "time": 1.0,
            **dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"), 0.5),
        },
        [],
    )
    assert [each.name for each in take_ready(loaded, progress)] == ["other"]
