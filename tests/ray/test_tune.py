"""Sweeps on a Ray cluster: shared frozen stage and photos, pruning, failures, repeats with other seeds."""

import json
import shutil
import signal
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
from carclass.config.schema import Config, TrainSettings
from carclass.errors import UserError
from carclass.runs.divergence_record import divergence_text
from carclass.runs.run import Run
from carclass.training.photo_store import open_block
from carclass.training.train import train_run
from carclass.tuning import results, search_space, trial_records
from carclass.tuning.collect import collect_sweep, publish_sweep
from carclass.tuning.tune import make_scheduler, prepare_sweep, run_sweep
from tests.helpers.own_cluster import treated_as_own

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
    space = load(*args, **more)
    run_sweep(space)
    return collect_sweep(space.root, space.search.name)


@pytest.fixture(scope="module")
def swept(root: str, tmp_path_factory: pytest.TempPathFactory) -> results.SweepResult:
    """Run a sweep with two concurrent trials; those with the huge batch fail, and some learning rates are too low."""
    folder = tmp_path_factory.mktemp("swept")
    more = {"num_trials": 6, "num_seeds": 2, "sampler": "random", "seed": 10}
    more |= {"max_concurrent_trials": 2, "min_epochs": 2}
    return run(root, folder, "swept", {**LR, **HUGE}, **more)


def states(sweep: results.SweepResult) -> list[str]:
    return [result.trial.state for result in sweep.searched]


def files(root: str, sweep: results.SweepResult, number: int) -> list[str]:
    return storage.list_files(f"{root}/sweeps/{sweep.name}/trials/{sweep.trials[number].trial.name}")


@pytest.mark.slow  # 40 s with its fixture
def test_every_trial_ends(swept: results.SweepResult):
    assert len(states(swept)) == 7
    assert "begun" not in states(swept)


@pytest.mark.slow  # 40 s with its fixture
def test_ctrl_c_interrupts_what_follows_a_sweep(swept: results.SweepResult):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow  # 40 s with its fixture
def test_poor_trials_are_pruned(swept: results.SweepResult):
    pruned = [result for result in swept.searched if result.trial.state == "pruned"]
    assert pruned
    assert all(2 <= len(result.epochs) < 5 for result in pruned)


@pytest.mark.slow  # 40 s with its fixture
def test_unchanged_experiment_is_never_pruned(swept: results.SweepResult):
    first = swept.searched[0]
    assert (first.trial.number, first.trial.state, len(first.epochs)) == (0, "complete", 5)


@pytest.mark.slow  # 40 s with its fixture
def test_failed_trial_has_a_reason_and_stops_no_other(swept: results.SweepResult):
    failed = [result.trial for result in swept.searched if result.trial.values["train.unfrozen.batch_size"] == 10**6]
    assert failed
    assert all(trial.state == "failed" and "batch_size" in str(trial.reason) for trial in failed)
    assert "complete" in states(swept)[failed[0].number :] + states(swept)[: failed[0].number]


@pytest.mark.slow  # 40 s with its fixture
def test_trials_share_one_frozen_stage(root: str, swept: results.SweepResult):
    """Compare weights of frozen stages; only that of trial 0 has recorded steps."""
    trials = [result.trial for result in swept.searched if result.trial.state != "failed"]
    weights = [f"{root}/sweeps/swept/trials/{trial.name}/frozen/best.safetensors" for trial in trials]
    assert len({storage.sha256(storage.read_bytes(uri)) for uri in weights}) == 1
    assert [
        trial.number for trial in trials if any("steps/frozen" in path for path in files(root, swept, trial.number))
    ] == [0]


@pytest.mark.slow  # 40 s with its fixture
def test_finished_trials_have_no_checkpoints(root: str, swept: results.SweepResult):
    over = [result for result in swept.trials if result.trial.state in ("complete", "pruned")]
    assert [path for result in over for path in files(root, swept, result.trial.number) if "/epoch-" in path] == []


@pytest.mark.slow  # 40 s with its fixture
def test_best_and_unchanged_settings_are_repeated_with_another_seed(swept: results.SweepResult):
    repeated = {
        (result.trial.repeats, result.trial.seed) for result in swept.trials if result.trial.repeats is not None
    }
    repeated_numbers = {result.trial.number for result in swept.complete[: results.NUM_REPEATED]} | {0}
    assert repeated == {(number, 124) for number in repeated_numbers}


@pytest.mark.slow  # 40 s with its fixture
def test_table_has_all_trials(root: str, swept: results.SweepResult):
    publish_sweep(root, swept)
    table = pq.read_table(f"{root}/sweeps/swept/trials.parquet")
    assert table["number"].to_pylist() == [result.trial.number for result in swept.trials]


@pytest.mark.nightly  # 20 s
def test_trials_with_several_workers(root: str, tmp_path: Path):
    train = {**TRAIN, "frozen": None, "num_workers": 2, "unfrozen": {"epochs": 2, "batch_size": 16}}
    sweep = run(root, tmp_path, "two-workers", LR, train, num_trials=1, num_seeds=1, scheduler="none")
    assert [(result.trial.state, len(result.epochs)) for result in sweep.trials] == [("complete", 2)] * 2


@pytest.mark.slow  # 15 s
def test_photos_are_decoded_at_the_size_of_each_trial(root: str, tmp_path: Path):
    """Check photos that trial 0 was trained on at another size."""
    train = {**TRAIN, "frozen": {"epochs": 1, "views": 1}}
    space = load(root, tmp_path, "sizes", {"train.model.image_size": {"choices": [64, 32]}}, train, num_trials=1)
    context = prepare_sweep(space, trial_records.find_records(space, resume=False))
    block = ray.get(context.photos["v1"]["train"][0])
    assert [open_block(block, size).pixels[0].shape for size in (64, 32)] == [(64, 64, 3), (32, 32, 3)]


# Frozen stage only

HEAD = {**TRAIN, "frozen": {"epochs": 5, "views": 3}, "unfrozen": None}
HEADS = {"num_trials": 2, "num_seeds": 2, "max_concurrent_trials": 1}  # in one process, which takes seconds to start
HEAD_LR = {"train.frozen.lr": {"min": 1e-4, "max": 1e-2, "log": True}}


@pytest.fixture(scope="module")
def heads(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[results.SweepResult, int]:
    """Run a sweep; return it and the number of feature files it added."""
    before = storage.list_files(f"{root}/features")
    with treated_as_own():  # without processes of Ray Train for the frozen stage of trial 0
        sweep = run(root, tmp_path_factory.mktemp("heads"), "heads", HEAD_LR, HEAD, **HEADS)
    return sweep, len(storage.list_files(f"{root}/features")) - len(before)


def test_all_trials_and_repeats_share_one_feature_cache(heads: tuple[results.SweepResult, int]):
    assert heads[1] == 1


@pytest.mark.slow  # 15 s
def test_best_config_trains_to_the_accuracy_of_the_trial(root: str, heads: tuple[results.SweepResult, int]):
    (best, *_) = publish_sweep(root, heads[0])
    settings = cli.load_config(Path(best), {}, Config)
    assert settings.train is not None
    trained = train_run(settings.root, settings.train)
    # Another number of threads changes rounding, which may change the prediction of one of the dozen val photos.
    assert trained.best_val_accuracy("frozen") == pytest.approx(heads[0].best.accuracy, abs=0.1)


def test_finished_sweep_trains_nothing_when_run_again(
    root: str,
    heads: tuple[results.SweepResult, int],
    tmp_path: Path,
    files_below: Callable[[str], dict[str, tuple[int, int]]],
):
    before = files_below(f"{root}/sweeps/heads/trials")
    run(root, tmp_path, "heads", HEAD_LR, HEAD, **HEADS)
    assert files_below(f"{root}/sweeps/heads/trials") == before


def test_finished_sweep_is_refused_after_its_dataset_has_changed(
    root: str, heads: tuple[results.SweepResult, int], tmp_path: Path
):
    copy = shutil.copytree(root, tmp_path / "root")
    manifest = copy / "datasets" / "v1" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["parts"] = {path: sha256[::-1] for path, sha256 in values["parts"].items()}
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"`heads` .* begun with other data \(the dataset's content; trial 0\)"):
        run(str(copy), tmp_path, "heads", HEAD_LR, HEAD, **HEADS)


@pytest.mark.nightly  # 30 s
def test_trials_that_hyperband_pauses_end(root: str, tmp_path: Path):
    sweep = run(root, tmp_path, "hyperband", HEAD_LR, HEAD, num_trials=4, num_seeds=1, scheduler="hyperband")
    assert "begun" not in states(sweep)


@pytest.mark.slow  # 40 s
def test_trials_that_diverge_fail_and_the_sweep_goes_on_and_grows(root: str, tmp_path: Path):
    """Trial 0 diverges too, in the stage that is trained before the others start."""
    train = {**HEAD, "frozen": {**HEAD["frozen"], "optimizer": "sgd", "lr": 1e30}}
    rates = {"train.frozen.lr": {"choices": [1e-3, 1e30]}}
    options = {"num_seeds": 1, "max_concurrent_trials": 1, "sampler": "random", "scheduler": "none"}
    begun = run(root, tmp_path, "diverging", rates, train, num_trials=1, **options)
    grown = run(root, tmp_path, "diverging", rates, train, num_trials=6, **options)
    assert (len(begun.searched), len(grown.searched)) == (2, 7)
    assert states(grown) == [
        "failed" if result.trial.values["train.frozen.lr"] == 1e30 else "complete" for result in grown.searched
    ]
    assert {"failed", "complete"} == {*states(grown)}
    failed = [result.trial for result in grown.searched if result.trial.state == "failed"]
    assert all("training diverged in the frozen stage: " in str(trial.reason) for trial in failed)


@pytest.mark.nightly  # 25 s
def test_diverged_training_of_several_workers_ends_with_one_paragraph(root: str):
    stage = {"optimizer": "sgd", "lr": 1e30, "warmup_epochs": 0, "batch_size": 16}
    settings = TrainSettings(**{**TRAIN, "name": "diverged", "frozen": None, "unfrozen": stage, "num_workers": 2})
    with pytest.raises(UserError, match=r"training diverged in the unfrozen stage: .* not finite in epoch 1, step \d"):
        train_run(root, settings)
    run = Run(root, settings)
    assert run.metrics() == []
    assert not run.is_finished("unfrozen")
    assert str(divergence_text(run)).startswith("unfrozen epoch 1, step ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("asha", schedulers.ASHAScheduler),
        ("hyperband", schedulers.HyperBandScheduler),
        ("median", schedulers.MedianStoppingRule),
        ("none", schedulers.FIFOScheduler),
    ],
)
def test_scheduler_by_name(root: str, tmp_path: Path, name: str, kind: type):
    assert type(make_scheduler(load(root, tmp_path, "any", LR, scheduler=name))) is kind


# Errors


@pytest.mark.slow  # 40 s with its fixture
def test_name_of_other_search_is_refused(root: str, swept: results.SweepResult, tmp_path: Path):
    with pytest.raises(UserError, match=r"`swept`.*other settings \(min_epochs, sampler, seed, space\).*another"):
        run_sweep(load(root, tmp_path, "swept", LR, num_trials=9))


@pytest.mark.slow  # 40 s with its fixture
def test_resuming_unknown_sweep_is_refused(root: str, swept: results.SweepResult, tmp_path: Path):
    with pytest.raises(UserError, match=r"no sweep `never`.*Available: .*swept"):
        run_sweep(load(root, tmp_path, "never", LR), resume=True)


def test_devices_beyond_the_cluster_are_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`devices_per_worker`.*room for 0"):
        run_sweep(load(root, tmp_path, "large", LR, devices_per_worker=64))


def test_fractions_of_cpus_are_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`devices_per_worker`.*whole CPUs"):
        run_sweep(load(root, tmp_path, "parts", LR, devices_per_worker=0.5))


def test_refused_sweep_writes_nothing(root: str, tmp_path: Path):
    train = {**TRAIN, "unfrozen": {"batch_size": 10**6}}
    with pytest.raises(UserError, match="batch_size"):
        run_sweep(load(root, tmp_path, "refused", LR, train))
    assert storage.list_files(f"{root}/sweeps/refused") == []


def test_pruning_without_effect_is_refused(root: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"`min_epochs` is 5.*none could be pruned"):
        run_sweep(load(root, tmp_path, "late", LR, min_epochs=5))


def test_analysis_without_a_finished_trial_is_refused(root: str, tmp_path: Path):
    trial_records.begin_records(load(root, tmp_path, "empty", LR))
    with pytest.raises(UserError, match=r"no trial of sweep `empty` has finished"):
        publish_sweep(root, collect_sweep(root, "empty"))
