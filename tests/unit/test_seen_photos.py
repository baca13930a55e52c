"""Photos of a split that a run's ancestors were trained on: found by content, told before training and in reports."""

from pathlib import Path

import pytest

from carclass import storage
from carclass.config.schema import EvaluateSettings, TrainSettings
from carclass.data import formats
from carclass.data.dataset import Dataset
from carclass.evaluation import collect, evaluate
from carclass.experiments.collect import describe_seen
from carclass.experiments.status import RunStatus
from carclass.runs.run import Run, begin_run
from carclass.runs.seen_photos import find_seen_photos
from carclass.training import preflight
from tests.helpers.held_out import Photo, publish, splits
from tests.helpers.runs import FROZEN

CHILD = {**FROZEN, "parent": "first@best"}


def make_dataset(root: Path, name: str, seed: int, prefix: str = "") -> Dataset:
    """Publish a dataset of the same 40 photos, under names that begin with a prefix."""
    photos = [Photo(f"{prefix}{label}{i}", label, content=f"{label}{i}") for label in "ab" for i in range(20)]
    return publish(root / "datasets" / name, photos, seed=seed)


def begin(root: Path, name: str, source: Dataset, parent: str = "sample") -> Run:
    settings = TrainSettings(name=name, dataset=source.name, **{**FROZEN, "parent": parent})
    return begin_run(Run(str(root), settings), source, "0" * 64)


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[Dataset, Dataset]:
    return make_dataset(tmp_path, "v1", 1), make_dataset(tmp_path, "v2", 2, "renamed/")


def overlap(first: Dataset, second: Dataset, split: str, seen: str = "train") -> int:
    """Return the number of photos of a split of the second dataset that are of another split of the first."""
    trained = {key for key, found in splits(first).items() if found == seen}
    return sum(found == split and key.removeprefix("renamed/") in trained for key, found in splits(second).items())


def test_photos_of_the_runs_own_dataset_are_not_seen(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    run = begin(tmp_path, "first", datasets[0])
    assert find_seen_photos(run, datasets[0], "val")[:3] == (0, 6, [])


@pytest.mark.parametrize("split", ["val", "test"])
def test_train_photos_of_a_run_are_found_in_another_dataset_by_their_content(
    tmp_path: Path, datasets: tuple[Dataset, Dataset], split: str
):
    seen = find_seen_photos(begin(tmp_path, "first", datasets[0]), datasets[1], split)
    assert seen.number == overlap(*datasets, split) > 0
    assert (seen.runs, seen.unknown) == (["first"], [])
    assert seen.text.startswith(f"{seen.number} of {seen.total} are train photos of first")


def test_val_photos_of_a_run_are_found_in_a_test_split(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    first = begin(tmp_path, "first", datasets[0])
    second = begin(tmp_path, "second", datasets[1], "first@best")
    number = overlap(*datasets, "test", "val")
    for run in (first, second):
        seen = find_seen_photos(run, datasets[1], "test")
        assert (seen.num_val, seen.val_runs) == (number, ["first"])
        assert f", {number} of 8 are val photos of first, whose epoch was chosen on them" in seen.text
    assert number > 0
    assert find_seen_photos(second, datasets[1], "val").num_val == 0


def test_train_photos_of_a_grandparent_are_found(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    begin(tmp_path, "first", datasets[0])
    begin(tmp_path, "second", datasets[1], "first@best")
    third = begin(tmp_path, "third", datasets[1], "second@2")
    assert find_seen_photos(third, datasets[1], "val").runs == ["first"]


def test_a_comparison_finds_the_test_photos_that_a_runs_parent_was_trained_on(
    tmp_path: Path, datasets: tuple[Dataset, Dataset]
):
    first, second = begin(tmp_path, "first", datasets[0]), begin(tmp_path, "second", datasets[1], "first@best")
    assert "are train photos of first, 3 of 8 are val photos of first" in describe_seen(RunStatus(second, "finished"))
    assert describe_seen(RunStatus(first, "finished")) == describe_seen(RunStatus(second, "begun")) == ""


def test_a_parent_or_its_dataset_that_is_gone_is_not_known(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    first, second = begin(tmp_path, "first", datasets[0]), begin(tmp_path, "second", datasets[1], "first@best")
    storage.delete_folder(datasets[0].uri)
    assert find_seen_photos(second, datasets[1], "val").unknown == ["first"]
    storage.delete_folder(first.uri)
    assert find_seen_photos(second, datasets[1], "val").unknown == ["first"]


def test_a_parent_that_was_trained_anew_is_not_known(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    first, second = begin(tmp_path, "first", datasets[0]), begin(tmp_path, "second", datasets[1], "first@best")
    uri = storage.join(first.uri, "lineage.json")
    formats.write(uri, "lineage", {**first.lineage(), "started": "2999-01-01T00:00:00Z"})
    assert find_seen_photos(second, datasets[1], "val").unknown == ["the former first, which was trained anew"]


def test_a_parent_that_is_given_by_the_uri_of_its_weights_is_found(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    first = begin(tmp_path, "first", datasets[0])
    second = begin(tmp_path, "second", datasets[1], f"{first.model_uri('frozen')}.safetensors")
    assert find_seen_photos(second, datasets[1], "val").runs == ["first"]


def test_training_warns_of_val_and_test_photos_that_its_parent_was_trained_on(
    tmp_path: Path, datasets: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture
):
    begin(tmp_path, "first", datasets[0])
    preflight.check_seen_photos(str(tmp_path), TrainSettings(name="child", dataset="v2", **CHILD), datasets[1])
    number = overlap(*datasets, "val")
    assert f"of the val photos of dataset v2, {number} of 6 are train photos of first" in caplog.text
    assert "its test accuracy will be too high" in caplog.text


def test_training_warns_once_of_each_split_if_its_parents_photos_are_not_known(
    tmp_path: Path, datasets: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture
):
    begin(tmp_path, "first", datasets[0])
    storage.delete_folder(datasets[0].uri)
    preflight.check_seen_photos(str(tmp_path), TrainSettings(name="child", dataset="v2", **CHILD), datasets[1])
    for split in ("val", "test"):
        assert caplog.text.count(f"{split} photos of dataset v2: the train photos of first are not known") == 1


def test_an_evaluation_warns_of_photos_that_may_be_the_models_train_photos(
    tmp_path: Path, datasets: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture
):
    run = begin(tmp_path, "first", datasets[0])
    storage.delete_folder(datasets[0].uri)
    evaluate._warn_about_photos(run, datasets[1], "test")
    assert (
        "test photos of dataset v2: the train photos of first are not known, as the run or its dataset" in caplog.text
    )


def test_a_report_says_whose_train_photos_are_not_known(tmp_path: Path, datasets: tuple[Dataset, Dataset]):
    run, facts = begin(tmp_path, "first", datasets[0]), {"stage": "frozen", "epoch": 1, "val_accuracy": 0.5}
    storage.delete_folder(datasets[0].uri)
    shown = dict(collect._facts(run, datasets[1], EvaluateSettings(run="first", dataset="v2"), facts))
    assert shown["Train photos"].startswith("the train photos of first are not known")


def test_training_on_the_parents_dataset_warns_of_nothing(
    tmp_path: Path, datasets: tuple[Dataset, Dataset], caplog: pytest.LogCaptureFixture
):
    begin(tmp_path, "first", datasets[0])
    preflight.check_seen_photos(str(tmp_path), TrainSettings(name="child", dataset="v1", **CHILD), datasets[0])
    assert not caplog.text


def test_a_report_has_the_number_of_photos_that_the_model_was_trained_on(
    tmp_path: Path, datasets: tuple[Dataset, Dataset]
):
    run, facts = begin(tmp_path, "first", datasets[0]), {"stage": "frozen", "epoch": 1, "val_accuracy": 0.5}
    shown = dict(collect._facts(run, datasets[1], EvaluateSettings(run="first", dataset="v2"), facts))
    assert "are train photos of first" in shown["Seen in training"]
    assert shown["Seen in training"].endswith(": the accuracy is too high")
