"""The checkpoint writer: order of asynchronous writes, and the checkpoints it keeps."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from carclass.config.schema import FrozenSettings, TrainSettings
from carclass.models import classifier
from carclass.runs.run import Run
from carclass.storage import StorageError
from carclass.training import checkpoint, loop
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.learner import make_learner

SETTINGS = TrainSettings(name="one", unfrozen=None, frozen=FrozenSettings(epochs=50))


class SlowStorage:
    """A write that occupies the writer's thread of checkpoints until it is released."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.release = threading.Event()
        writer.checkpoint_thread.submit(self.release.wait, 20)


def make_writer(run: Run, module: nn.Module, state: loop.TrainState) -> CheckpointWriter:
    assert run.settings.frozen is not None
    autocast = classifier.autocast("fp32", torch.device("cpu"))
    return CheckpointWriter(run, "frozen", make_learner(module, run.settings.frozen, autocast, seed=1), state)


def finish_epoch(writer: CheckpointWriter, state: loop.TrainState, accuracies: list[float]) -> None:
    state.epoch, state.val_accuracies = len(accuracies), accuracies
    figures = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")
    metrics = {"epoch": state.epoch, **dict.fromkeys(figures, 0.5)}
    writer.finish_epoch(state, metrics, [{"step": 1, "loss": 1.0, "lr": 0.1}])


def test_metrics_can_be_waited_for_while_a_checkpoint_is_being_written(tmp_path: Path):
    """The checkpoint of 40 MB, which is written after the metrics, takes longer than reading them."""
    run, state = Run(str(tmp_path), SETTINGS), loop.TrainState()
    writer = make_writer(run, nn.Linear(1000, 10_000), state)
    for epoch in range(1, 4):
        finish_epoch(writer, state, [0.5] * epoch)
        writer.wait_for_metrics()
        assert [row["epoch"] for row in run.metrics()] == list(range(1, epoch + 1))
    writer.wait()


def test_kept_weights_are_of_the_best_epochs_the_last_one_and_keep_epochs(tmp_path: Path):
    stage = FrozenSettings(epochs=6, keep_epochs=(3,))
    run = Run(str(tmp_path), TrainSettings(name="one", unfrozen=None, frozen=stage, keep_checkpoints=1))
    state, accuracies = loop.TrainState(), [0.1, 0.9, 0.2, 0.8, 0.7, 0.3]
    writer = make_writer(run, nn.Linear(2, 2), state)
    for epoch in range(1, 7):
        finish_epoch(writer, state, accuracies[:epoch])
    writer.wait()
    assert checkpoint.names(writer.uri) == ["epoch-0002", "epoch-0003", "epoch-0006"]


# Slow storage


def test_an_epoch_does_not_wait_for_the_checkpoints_of_earlier_ones(tmp_path: Path):
    run, state = Run(str(tmp_path), SETTINGS), loop.TrainState()
    writer = make_writer(run, nn.Linear(2, 2), state)
    storage = SlowStorage(writer)
    for epoch in range(1, 4):
        finish_epoch(writer, state, [0.5] * epoch)
        writer.wait_for_metrics()
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3]
    assert checkpoint.names(writer.uri) == []
    storage.release.set()
    writer.wait()
    assert checkpoint.names(writer.uri) == ["epoch-0001", "epoch-0002"]


def test_weights_that_better_ones_replace_are_not_written(tmp_path: Path):
    run, state = Run(str(tmp_path), SETTINGS), loop.TrainState()
    writer = make_writer(run, nn.Linear(2, 2), state)
    storage = SlowStorage(writer)
    for epoch in range(1, 21):
        finish_epoch(writer, state, [number / 50 for number in range(1, epoch + 1)])
    assert sorted(writer.snapshots) == ["epoch-0019", "epoch-0020"]
    storage.release.set()
    writer.wait()
    assert checkpoint.names(writer.uri) == ["epoch-0019", "epoch-0020"]


def test_no_checkpoint_is_due_while_the_previous_one_is_being_written(tmp_path: Path):
    run = Run(str(tmp_path), SETTINGS.model_copy(update={"checkpoint_seconds": 0.0}))
    state = loop.TrainState(steps=[[1.0, 1.0, 8.0]])
    writer = make_writer(run, nn.Linear(2, 2), state)
    assert writer.is_checkpoint_due()
    storage = SlowStorage(writer)
    writer.save(state)
    assert not writer.is_checkpoint_due()
    storage.release.set()
    writer.wait()
    assert writer.is_checkpoint_due()
    assert checkpoint.names(writer.uri) == ["epoch-0000-00000008"]


def test_checkpoints_to_resume_from_are_due_by_time(tmp_path: Path):
    writer = make_writer(Run(str(tmp_path), SETTINGS), nn.Linear(2, 2), loop.TrainState())
    assert not writer.is_checkpoint_due()
    writer.save_time -= 61
    assert writer.is_checkpoint_due()


def test_a_write_that_fails_ends_training_with_its_error(tmp_path: Path):
    """The stage's folder is a file."""
    run, state = Run(str(tmp_path), SETTINGS), loop.TrainState()
    writer = make_writer(run, nn.Linear(2, 2), state)
    Path(run.uri).mkdir(parents=True)
    Path(writer.uri).write_text("")
    finish_epoch(writer, state, [0.5])
    with pytest.raises(StorageError, match=r"one/frozen/epoch-0001/weights.safetensors cannot be written"):
        writer.wait()
