"""Loggers of metrics: TensorBoard, MLflow and W&B, the latter two where they are installed."""

import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.runs import metrics_loggers
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run
from tests.helpers.runs import FROZEN, begin, publish_dataset

FIGURES = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"), 0.5)


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the settings of the machine, and all that would be sent."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def settings_with(*loggers: str) -> TrainSettings:
    return TrainSettings(name="first", **{**FROZEN, "loggers": loggers})


def begin_with(root: Path, *loggers: str) -> Run:
    publish_dataset(root)
    return begin(root, settings_with(*loggers))


def add(log: MetricsLog, *epochs: int, **figures: float) -> None:
    """Add epochs of two steps."""
    for epoch in epochs:
        steps = [{"step": step, "loss": epoch + step / 10, "accuracy": 0.5, "lr": 0.1} for step in (1, 2)]
        log.add({"epoch": epoch, "time": 1.7e9 + epoch, **FIGURES, **figures}, steps)


# Choice


def test_without_loggers_only_the_files_of_the_run_are_written(tmp_path: Path):
    run = begin_with(tmp_path)
    add(MetricsLog(run, "frozen", 0), 1)
    assert [row["epoch"] for row in run.metrics()] == [1]
    assert not Path(run.uri, "tensorboard").exists()


def test_tensorboard_is_the_default():
    assert TrainSettings(name="x").loggers == ("tensorboard",)


def test_a_logger_that_is_given_twice_is_refused():
    with pytest.raises(ValueError, match="`loggers` has mlflow twice"):
        settings_with("mlflow", "tensorboard", "mlflow")


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_a_missing_package_is_reported_with_the_command_before_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=rf"`train.loggers` has `{name}`, .* is missing. .* install .*{package}"):
        metrics_loggers.check_loggers(str(tmp_path), settings_with(name))


def test_scalars_of_steps_are_counted_from_the_first_epoch():
    rows = metrics_loggers.scalars({"epoch": 3, "time": 0.0, "val_loss": 1.0}, [{"step": 1, "loss": 2.0}] * 2)
    assert [*rows] == [("val_loss", 1.0, 3), ("step/loss", 2.0, 5), ("step/loss", 2.0, 5)]


# Failures


class FailingLogger:
    """A logger without a server, by the interface that all of them have."""

    errors = (ConnectionError,)

    def log(self, metrics: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_training_goes_on_without_a_logger_whose_server_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = begin_with(tmp_path, "tensorboard")
    log = MetricsLog(run, "frozen", 0)
    log.loggers.insert(0, FailingLogger())
    add(log, 1, 2)
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    assert len([*Path(run.uri, "tensorboard", "frozen").iterdir()]) == 2
    assert capsys.readouterr().out.count("gets no more metrics of this stage (no route to host)") == 1


def test_a_logger_that_fails_at_the_end_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = MetricsLog(begin_with(tmp_path), "frozen", 0)
    log.loggers.append(FailingLogger())
    log.close()
    log.close()
    assert capsys.readouterr().out.count("no route to host") == 1


# MLflow


@pytest.fixture
def mlflow() -> Any:
    return pytest.importorskip("mlflow", exc_type=ImportError)


def history(root: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric over all runs in a local root's database."""
    with sqlite3.connect(root / "mlflow.db") as database:
        return database.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (key,)).fetchall()


def test_mlflow_has_epochs_and_steps_of_both_processes_of_a_run(mlflow: Any, tmp_path: Path):
    run = begin_with(tmp_path, "mlflow")
    metrics_loggers.check_loggers(str(tmp_path), run.settings)
    for first in (0, 1):  # the second process resumes after epoch 1, and trains epoch 2 again
        log = MetricsLog(run, "frozen", first)
        add(log, 1, 2) if first == 0 else add(log, 2, 3)
        log.close()
    assert history(tmp_path, "frozen/val_loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [step for step, _ in history(tmp_path, "frozen/step/loss")] == [1, 2, 3, 4, 5, 6]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT name, status FROM runs").fetchall() == [("first", "FINISHED")]
        assert database.execute("SELECT value FROM params WHERE key = 'frozen.lr'").fetchall() == [("0.002",)]


def test_mlflow_needs_a_server_if_the_root_is_not_local(mlflow: Any):
    with pytest.raises(UserError, match=r"`root` s3://bucket is not local. Set MLFLOW_TRACKING_URI"):
        metrics_loggers.check_loggers("s3://bucket", settings_with("mlflow"))


def test_a_store_that_mlflow_refuses_is_reported(mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{tmp_path}/files")
    with pytest.raises(UserError, match=r"`train.loggers`: mlflow is unusable \(.*\). Check MLFLOW_TRACKING_URI"):
        metrics_loggers.check_loggers(str(tmp_path), settings_with("mlflow"))


# W&B


@pytest.fixture
def wandb() -> Any:
    return pytest.importorskip("wandb", exc_type=ImportError)


def test_wandb_needs_a_folder_if_it_is_offline_and_the_root_is_not_local(wandb: Any):
    with pytest.raises(UserError, match=r"offline \(WANDB_MODE\), and `root` s3://bucket is not local. Set WANDB_DIR"):
        metrics_loggers.check_loggers("s3://bucket", settings_with("wandb"))


def test_wandb_without_a_key_is_reported(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"wandb is unusable \(No API key configured.*Check WANDB_API_KEY"):
        metrics_loggers.check_loggers(str(tmp_path), settings_with("wandb"))


@pytest.mark.slow  # 10 s: starts W&B's own process
def test_an_offline_run_of_wandb_is_in_the_folder_of_the_run(wandb: Any, tmp_path: Path):
    run = begin_with(tmp_path, "wandb")
    log = MetricsLog(run, "frozen", 0)
    add(log, 1, 2)
    log.close()
    (file,) = Path(run.uri).glob("wandb/offline-run-*/*.wandb")
    assert b"frozen/val_loss" in file.read_bytes()
