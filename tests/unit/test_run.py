"""Runs on storage: metrics after an interruption, and settings that may differ when a run is resumed."""

from pathlib import Path
from typing import Any

import pytest

from carclass.config.schema import TrainSettings, UnfrozenSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, begin_run, refused_settings
from tests.helpers.runs import MODEL, finish

OF_MACHINES = (
    {"num_workers": (1, 2)},
    {"checkpoint_seconds": 7},
    {"keep_checkpoints": 5},
    {"unfrozen": UnfrozenSettings(micro_batch_size=4)},
)
FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")


def begin(root: Path, **changes: object) -> Run:
    settings = TrainSettings(name="one", **changes)
    return begin_run(Run(str(root), settings), dataset.Dataset(f"{root}/datasets/v2", {}), "0" * 64)


def add(run: Run, stage: str, epochs: range, loss: float = 1.0) -> None:
    log = MetricsLog(run, stage, epochs[0] - 1)
    for epoch in epochs:
        steps = [{"step": step, "loss": loss, "lr": 0.1} for step in (1, 2)]
        log.add({**dict.fromkeys(FIGURES, loss), "epoch": epoch, "time": 1e9 + epoch}, steps)


def test_metrics_have_a_row_per_epoch_of_both_stages(tmp_path: Path):
    run = begin(tmp_path)
    add(run, "frozen", range(1, 4))
    add(run, "unfrozen", range(1, 3))
    epochs = [(row["stage"], row["epoch"]) for row in run.metrics()]
    assert epochs == [("frozen", 1), ("frozen", 2), ("frozen", 3), ("unfrozen", 1), ("unfrozen", 2)]


def test_metrics_after_the_checkpoint_are_replaced(tmp_path: Path):
    run = begin(tmp_path)
    add(run, "frozen", range(1, 2))
    add(run, "unfrozen", range(1, 5), loss=1.0)
    add(run, "unfrozen", range(3, 4), loss=2.0)
    losses = [(row["stage"], row["epoch"], row["train_loss"]) for row in run.metrics()]
    assert losses == [("frozen", 1, 1.0), ("unfrozen", 1, 1.0), ("unfrozen", 2, 1.0), ("unfrozen", 3, 2.0)]


def test_the_loss_of_every_step_can_be_read(tmp_path: Path):
    run = begin(tmp_path)
    add(run, "frozen", range(1, 3), loss=0.5)
    assert [(row["step"], row["loss"]) for row in run.steps("frozen", 2)] == [(1, 0.5), (2, 0.5)]


def test_every_epoch_writes_the_same_number_of_bytes(tmp_path: Path):
    run = begin(tmp_path)
    add(run, "frozen", range(1, 6))
    sizes = [path.stat().st_size for path in sorted(Path(run.uri, "tensorboard", "frozen").iterdir())]
    assert len(sizes) == 5
    assert max(sizes) - min(sizes) < 16


@pytest.mark.parametrize("change", OF_MACHINES)
def test_settings_of_machines_may_differ_when_a_run_is_resumed(tmp_path: Path, change: dict):
    begin(tmp_path)
    assert begin(tmp_path, **change).settings == TrainSettings(name="one", **change)


@pytest.mark.parametrize(("key", "skipped"), [("frozen", "unfrozen"), ("unfrozen", "frozen")])
def test_more_epochs_of_a_finished_run_are_trained_from_its_last_epoch(tmp_path: Path, key: str, skipped: str):
    stages = {key: {"epochs": 5}, skipped: None}
    finish(begin(tmp_path, model=MODEL, **stages))
    hint = rf"`train.parent: one@last`, `train.{skipped}: null`, `train.{key}.epochs: 3`"
    with pytest.raises(UserError, match=rf"other settings \({key}.epochs\).* for 3 more epochs, .*{hint}"):
        begin(tmp_path, model=MODEL, **{**stages, key: {"epochs": 8}})


@pytest.mark.parametrize("changes", [{"frozen": {"epochs": 3}}, {"frozen": {"epochs": 8}, "seed": 5}])
def test_other_changes_of_a_finished_run_have_no_such_advice(tmp_path: Path, changes: dict[str, Any]):
    settings = {"model": MODEL, "frozen": {"epochs": 5}, "unfrozen": None}
    finish(begin(tmp_path, **settings))
    with pytest.raises(UserError) as caught:
        begin(tmp_path, **{**settings, **changes})
    assert "@last" not in str(caught.value)


@pytest.mark.parametrize("kept", ["metrics.jsonl", "frozen/best.json"])
def test_results_of_unknown_settings_are_not_continued(tmp_path: Path, kept: str):
    run = begin(tmp_path, model=MODEL, unfrozen=None)
    finish(run)
    for path in [*Path(run.uri).rglob("*")]:
        if path.is_file() and str(path.relative_to(run.uri)) not in (kept, "lineage.json"):
            path.unlink()
    with pytest.raises(UserError, match=rf"has no config.yml, but results .*{kept}.* delete the folder"):
        begin(tmp_path, model=MODEL, unfrozen=None, seed=5)


@pytest.mark.parametrize(("key", "value"), [("seed", 5), ("sampling", "balanced")])
def test_other_settings_of_a_begun_run_are_an_error(tmp_path: Path, key: str, value: Any):
    begin(tmp_path)
    with pytest.raises(UserError, match=rf"begun with other settings \({key}\)"):
        begin(tmp_path, **{key: value})


def test_a_refit_may_be_added_to_a_run_but_not_taken_away():
    plain = TrainSettings(name="first")
    refitted = plain.model_copy(update={"refit": True})
    assert refused_settings(plain, refitted) == []
    assert refused_settings(refitted, plain) == ["refit"]
    assert refused_settings(plain, refitted.model_copy(update={"seed": 4})) == ["seed"]
