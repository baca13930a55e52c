"""A sweep on a real cluster: trials share what they can, end early where they promise little, and fail alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray.tune import schedulers

from carclass import storage
from carclass.config import cli
from carclass.config.schema import Config
from carclass.data import dataset
from carclass.errors import UserError
from carclass.training.photo_store import open_block
from carclass.training.train import train_run
from carclass.tuning import results, search_space, trial_records
from carclass.tuning.collect import collect_sweep, publish_sweep
from carclass.tuning.tune import _prepare, _scheduler, run_sweep

TRAIN: dict[str, Any] = {
    "name": "small",
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": {"epochs": 3, "views": 2, "batch_size": 16},
    "unfrozen": {"epochs": 5, "lr": 1e-3, "batch_size": 16},
}
LR = {"train.unfrozen.lr": {"min": 1e-5, "max": 3e-3, "log": True}}
HUGE = {"train.unfrozen.batch_size": {"choices": [16, 10**6]}}


def load(root: str, folder: Path, name: str, varied: dict[str, Any], train: dict[str, Any] = TRAIN, **more: Any):
    (folder / "experiment.yml").write_text(yaml.safe_dump({"root": root, "train": train}))
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump({"name": name, "experiment": "experiment.yml", "space": varied, **more}))
    return search_space.load_space(path, cli.load_config(path, {}, search_space.Search))


def run(*args: Any, **more: Any) -> results.SweepResult:
    found = load(*args, **more)
    run_sweep(found)
    return collect_sweep(found.root, found.search.name)


@pytest.fixture(scope="module")
def root(ingested: dataset.Dataset) -> str:
    return ingested.uri.rsplit("/", 2)[0]


@pytest.fixture(scope="module")
def swept(root: str, tmp_path_factory: pytest.TempPathFactory) -> results.SweepResult:
    """Trials two at a time, of which those with the huge batch can't be trained."""
    folder = tmp_path_factory.mktemp("swept")
    more = {"num_trials": 6, "num_seeds": 2, "sampler": "random", "max_concurrent_trials": 2, "min_epochs": 2}
    return run(root, folder, "swept", {**LR, **HUGE}, **more)


def states(found: results.SweepResult) -> list[str]:
    return [one.trial.state for one in found.searched]


def files(root: str, found: results.SweepResult, number: int) -> list[str]:
    return storage.list_files(f"{root}/sweeps/{found.name}/trials/{found.outcomes[number].trial.name}")


def test_every_trial_comes_to_an_end(swept: results.SweepResult):
    assert len(states(swept)) == 7
    assert "begun" not in states(swept)


def test_trials_that_promise_little_are_ended_early(swept: results.SweepResult):
    pruned = [one for one in swept.searched if one.trial.state == "pruned"]
    assert pruned
    assert all(2 <= len(one.epochs) < 5 for one in pruned)


def test_the_experiment_as_it_stands_is_never_ended_early(swept: results.SweepResult):
    first = swept.searched[0]
    assert (first.trial.number, first.trial.state, len(first.epochs)) == (0, "complete", 5)


def test_a_trial_that_fails_says_why_and_stops_no_other(swept: results.SweepResult):
    failed = [one.trial for one in swept.searched if one.trial.values["train.unfrozen.batch_size"] == 10**6]
    assert failed
    assert all(one.state == "failed" and "batch_size" in str(one.reason) for one in failed)
    assert "complete" in states(swept)[failed[0].number :] + states(swept)[: failed[0].number]


def test_trials_go_on_from_one_frozen_stage(root: str, swept: results.SweepResult):
    """Only the experiment's own stage has steps; the others' weights are its weights."""
    ones = [one.trial for one in swept.searched if one.trial.state != "failed"]
    weights = [f"{root}/sweeps/swept/trials/{one.name}/frozen/best.safetensors" for one in ones]
    assert len({storage.sha256(storage.read_bytes(uri)) for uri in weights}) == 1
    assert [one.number for one in ones if any("steps/frozen" in path for path in files(root, swept, one.number))] == [0]


def test_nothing_to_go_on_from_is_left_of_trials_that_are_over(root: str, swept: results.SweepResult):
    over = [one for one in swept.outcomes if one.trial.state in ("complete", "pruned")]
    assert [path for one in over for path in files(root, swept, one.trial.number) if "/epoch-" in path] == []


def test_the_best_settings_and_the_experiment_are_trained_with_another_seed(swept: results.SweepResult):
    repeated = {(one.trial.repeats, one.trial.seed) for one in swept.outcomes if one.trial.repeats is not None}
    wanted = {one.trial.number for one in swept.complete[: results.NUM_REPEATED]} | {0}
    assert repeated == {(number, 124) for number in wanted}


def test_all_trials_are_in_the_table(root: str, swept: results.SweepResult):
    publish_sweep(root, swept)
    table = pq.read_table(f"{root}/sweeps/swept/trials.parquet")
    assert table["number"].to_pylist() == [one.trial.number for one in swept.outcomes]


def test_trials_of_several_workers_are_runs_of_ray_train(root: str, tmp_path: Path):
    train = {**TRAIN, "frozen": None, "num_workers": 2, "unfrozen": {"epochs": 2, "batch_size": 16}}
    found = run(root, tmp_path, "two-workers", LR, train, num_trials=1, num_seeds=1, scheduler="none")
    assert [(one.trial.state, len(one.epochs)) for one in found.outcomes] == [("complete", 2)] * 2


def test_photos_for_trials_of_several_sizes_are_seen_at_each_trial_s(root: str, tmp_path: Path):
    """Also those that trial 0 was trained on before, at its own size."""
    train = {**TRAIN, "frozen": {"epochs": 1, "views": 1}}
    found = load(root, tmp_path, "sizes", {"train.model.image_size": {"choices": [64, 32]}}, train, num_trials=1)
    shared = _prepare(found, trial_records.find_records(found, resume=False))
    block = ray.get(shared.photos["v1"]["train"][0])
    assert [open_block(block, size).pixels[0].shape for size in (64, 32)] == [(64, 64, 3), (32, 32, 3)]


# The classifier alone

HEAD = {**TRAIN, "frozen": {"epochs": 5, "views": 3}, "unfrozen": None}
HEAD_LR = {"train.frozen.lr": {"min": 1e-4, "max": 1e-2, "log": True}}


@pytest.fixture(scope="module")
def heads(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[results.SweepResult, int]:
    """A sweep, and how many files of features it added."""
    before = storage.list_files(f"{root}/features")
    found = run(root, tmp_path_factory.mktemp("heads"), "heads", HEAD_LR, HEAD, num_trials=3, num_seeds=2)
    return found, len(storage.list_files(f"{root}/features")) - len(before)


def test_all_trials_and_seeds_share_one_file_of_features(heads: tuple[results.SweepResult, int]):
    assert heads[1] == 1


def test_the_best_experiment_file_trains_to_the_trial_s_accuracy(root: str, heads: tuple[results.SweepResult, int]):
    (best, *_) = publish_sweep(root, heads[0])
    settings = cli.load_config(Path(best), {}, Config)
    assert settings.train is not None
    trained = train_run(settings.root, settings.train)
    # Another number of threads rounds otherwise, which may turn one of the dozen val photos.
    assert trained.best_val_accuracy("frozen") == pytest.approx(heads[0].best.accuracy, abs=0.1)


def test_a_sweep_that_is_over_trains_nothing_when_it_is_run_again(
    root: str,
    heads: tuple[results.SweepResult, int],
    tmp_path: Path,
    files_below: Callable[[str], dict[str, tuple[int, int]]],
):
    before = files_below(f"{root}/sweeps/heads/trials")
    run(root, tmp_path, "heads", HEAD_LR, HEAD, num_trials=3, num_seeds=2)
    assert files_below(f"{root}/sweeps/heads/trials") == before


def test_trials_that_hyperband_pauses_come_to_an_end(root: str, tmp_path: Path):
    found = run(root, tmp_path, "hyperband", HEAD_LR, HEAD, num_trials=4, num_seeds=1, scheduler="hyperband")
    assert "begun" not in states(found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("asha", schedulers.ASHAScheduler),
        ("hyperband", schedulers.HyperBandScheduler),
        ("median", schedulers.MedianStoppingRule),
        ("none", schedulers.FIFOScheduler),
    ],
)
def test_each_scheduler_is_the_one_of_its_name(root: str, tmp_path: Path, name: str, kind: type):
    assert type(_scheduler(load(root, tmp_path, "any", LR, scheduler=name))) is kind


# What is wrong


def test_a_name_used_for_another_search_is_refused(root: str, swept: results.SweepResult, tmp_path: Path):
    with pytest.raises(UserError, match=r"`swept`.*other settings \(.*num_trials.*another `name`"):
        run_sweep(load(root, tmp_path, "swept", {**LR, **HUGE}, num_trials=9))


def test_going_on_with_a_sweep_that_never_began_is_refused(root: str, swept: results.SweepResult, tmp_path: Path):
    with pytest.raises(UserError, match=r"no sweep `never`.*There: .*swept"):
        run_sweep(load(root, tmp_path, "never", LR), resume=True)


def test_more_than_the_cluster_has_is_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`devices_per_worker`.*room for 0"):
        run_sweep(load(root, tmp_path, "large", LR, devices_per_worker=64))


def test_parts_of_cpus_are_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`devices_per_worker`.*whole CPUs"):
        run_sweep(load(root, tmp_path, "parts", LR, devices_per_worker=0.5))


def test_a_sweep_that_is_refused_leaves_nothing_behind(root: str, tmp_path: Path):
    train = {**TRAIN, "unfrozen": {"batch_size": 10**6}}
    with pytest.raises(UserError, match="batch_size"):
        run_sweep(load(root, tmp_path, "refused", LR, train))
    assert storage.list_files(f"{root}/sweeps/refused") == []


def test_pruning_that_could_never_happen_is_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`min_epochs` is 5.*none would be ended early"):
        run_sweep(load(root, tmp_path, "late", LR, min_epochs=5))


def test_there_is_no_analysis_before_a_trial_has_finished(root: str, tmp_path: Path):
    trial_records.begin_records(load(root, tmp_path, "empty", LR))
    with pytest.raises(UserError, match=r"no trial of sweep `empty` has finished"):
        publish_sweep(root, collect_sweep(root, "empty"))
