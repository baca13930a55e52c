"""A tree of experiments on a small cluster: who starts from whom, what fails with whom, what a second run leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.errors import UserError
from carclass.experiments import status, tree
from carclass.experiments.compare import compare_runs
from carclass.experiments.run import TreeProgress, _ready, rerun_stale, run_experiments
from carclass.ingestion.ingest import ingest_photos
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, find_run

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
    "twin": CHILD,
    "dropout": {**CHILD, "model": {"dropout": 0.6}},
    "turned": {**CHILD, "augmentation": {"rotation": 0.3}},
    "fresh": {**CHILD, "parent": "imagenet"},
    "lost": {**FROZEN, "parent": "nowhere.safetensors"},
    "orphan": {**CHILD, "parent": "lost@1"},
}


def write(folder: Path, photos: Path, experiments: dict[str, dict[str, Any]]) -> Path:
    """A budget file and its experiments."""
    for name, train in experiments.items():
        values = {"root": "unused", "train": {"name": name, "dataset": "v1", **train}}
        (folder / f"exp_{name}.yml").write_text(yaml.safe_dump(values))
    file = folder / "budget.yml"
    budget = {
        "root": str(folder / "root"),
        "experiments": "exp_*.yml",
        "ingest": {"photos": str(photos / "photos"), "labels": str(photos / "labels.csv")},
        "imagenet": "sample",
        "fixed": {"train.model.architecture": "resnet26-narrow", "train.model.image_size": 32},
    }
    file.write_text(yaml.safe_dump(budget))
    return file


@pytest.fixture(scope="module")
def found(ray_cluster, photos_folder: Path, tmp_path_factory) -> tuple[tree.Tree, TreeProgress]:
    """A tree that was run, and how that ended."""
    experiments = tree.load_tree(write(tmp_path_factory.mktemp("tree"), photos_folder, EXPERIMENTS), {})
    return experiments, run_experiments(experiments, experiments.experiments)


def losses(found: tuple[tree.Tree, TreeProgress], name: str) -> list[float]:
    this = find_run(found[0].budget.root, name)
    return [row["loss"] for epoch in (1, 2) for row in this.steps("unfrozen", epoch)]


def test_every_run_ends_whose_parents_do(found):
    assert sorted(found[1].finished) == ["child", "dropout", "first", "fresh", "turned", "twin"]


def test_a_branch_that_fails_says_why_and_takes_its_children_along(found):
    assert sorted(found[1].failed) == ["lost", "orphan"]
    assert "nowhere.safetensors cannot be read" in found[1].failed["lost"]
    assert found[1].failed["orphan"] == "lost, which it starts from, failed"


def test_a_child_records_the_hash_of_the_epoch_it_starts_from(found):
    root = found[0].budget.root
    weights = storage.read_bytes(f"{root}/experiments/first/frozen/epoch-0001/weights.safetensors")
    assert find_run(root, "child").lineage()["parent_sha256"] == storage.sha256(weights)


def test_siblings_with_the_same_settings_are_trained_alike(found):
    assert losses(found, "child") == losses(found, "twin")


@pytest.mark.parametrize("changed", ["dropout", "turned"])
def test_a_childs_own_dropout_and_augmentation_change_its_training(found, changed: str):
    assert losses(found, "child") != losses(found, changed)


def test_a_child_starts_better_than_chance_as_its_classifier_comes_along(found):
    """Ten classes: a classifier of random weights has a loss of 2.3 or more."""
    assert losses(found, "child")[0] < losses(found, "fresh")[0]


def test_a_second_run_trains_nothing_that_is_finished(found):
    root = Path(found[0].budget.root, "experiments")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and "lost" not in path.parts}
    again = run_experiments(found[0], found[0].experiments)
    assert again.finished == ["first", "child", "dropout", "fresh", "turned", "twin"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow  # 10 s
def test_a_dataset_of_other_classes_than_the_parents_is_refused_before_anything_is_trained(
    found, photos_folder: Path, tmp_path: Path
):
    file = write(tmp_path, photos_folder, {"first": FROZEN, "other": {**CHILD, "dataset": "few"}})
    few = tmp_path / "few.csv"
    rows = (photos_folder / "labels.csv").read_text().splitlines()
    few.write_text("\n".join([rows[0], *(row for row in rows[1:] if row.split(",")[1] < "M")]))
    photos = str(photos_folder / "photos")
    ingest_photos(str(tmp_path / "root"), IngestSettings(dataset="few", photos=photos, labels=str(few)))
    ingest_photos(str(tmp_path / "root"), tree.load_tree(file, {}).budget.ingest)
    experiments = tree.load_tree(file, {})
    with pytest.raises(UserError, match=r"or others\. Choose datasets of the same classes"):
        run_experiments(experiments, experiments.experiments)
    assert not (tmp_path / "root" / "experiments").exists()


def test_a_parent_that_is_nowhere_is_refused_before_anything_is_trained(photos_folder: Path, tmp_path: Path):
    experiments = tree.load_tree(write(tmp_path, photos_folder, {"child": {**CHILD, "parent": "nobody@best"}}), {})
    with pytest.raises(UserError, match=r"exp_child.yml: `train.parent` is nobody@best, but no run `nobody` in .*root"):
        run_experiments(experiments, experiments.experiments)
    assert not (tmp_path / "root").exists()


def test_an_edited_parent_is_left_alone_until_it_is_told_to_run_again(found, tmp_path: Path):
    file = Path(found[0]["first"].file)
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


@pytest.mark.slow  # 25 s
def test_the_comparison_is_written_with_every_finished_run_tested(found):
    some = tree.Tree(found[0].budget, found[0].with_parents(["child", "orphan"]))
    page, _ = (Path(place) for place in compare_runs(some))
    text = page.read_text()
    assert all(name in text for name in ("first", "child", "lost", "orphan"))
    reports = [Path(found[0].budget.root, "experiments", name, "report", "report.html") for name in ("first", "child")]
    assert all(path.exists() for path in reports)


def start(file: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(JOBS / "lineage.py"), *words, "--budget", str(file)]
    log = file.with_name("job.log").open("a")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # A session of its own: killing its group takes Ray's processes along, as the loss of a machine does.
    return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=environment)


@pytest.mark.slow  # 70 s
def test_a_tree_that_is_killed_on_the_way_goes_on_with_what_is_missing(found, photos_folder: Path, tmp_path: Path):
    wanted = {name: EXPERIMENTS[name] for name in ("first", "child", "turned")}
    file = write(tmp_path, photos_folder, wanted)
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
    expected = Path(found[0].budget.root, "experiments")
    for name in wanted:
        stage = "frozen" if name == "first" else "unfrozen"
        sha256 = [
            json.loads((folder / name / stage / "best.json").read_text())["sha256"] for folder in (root, expected)
        ]
        assert sha256[0] == sha256[1], name


@pytest.mark.slow  # 40 s
def test_stale_runs_are_trained_anew_and_what_they_said_is_kept(found, photos_folder: Path, tmp_path: Path):
    root = tmp_path / "root"
    file = write(tmp_path, photos_folder, {"first": FROZEN, "child": CHILD})
    experiments = tree.load_tree(file, {})
    run_experiments(experiments, experiments.experiments)
    write(tmp_path, photos_folder, {"first": {**FROZEN, "seed": 7}, "child": CHILD})
    again = rerun_stale(tree.load_tree(file, {}))
    states = [one.state for one in status.tree_status(tree.load_tree(file, {})).values()]
    replaced = sorted(path.parts[-2] for path in (root / "replaced").glob("*/*"))
    assert (again.finished, replaced) == (["first", "child"], ["child", "first"])
    assert states == ["finished", "finished"]


def test_a_run_waits_for_cached_features_that_another_computes(photos_folder: Path, tmp_path: Path):
    other = {**FROZEN, "model": {"dropout": 0.5}}
    experiments = tree.load_tree(write(tmp_path, photos_folder, {"first": FROZEN, "other": other, "child": CHILD}), {})
    first = experiments["first"]
    progress = TreeProgress([one for one in experiments.experiments if one.name != "child"])
    assert [one.name for one in _ready(experiments, progress)] == ["first"]
    progress = TreeProgress([experiments["other"]], {"a task": first})
    assert _ready(experiments, progress) == []
    MetricsLog(Run(experiments.budget.root, first.settings), "frozen", 0).add({"epoch": 1, "time": 1.0}, [])
    assert [one.name for one in _ready(experiments, progress)] == ["other"]
