"""The checkpoint writer: order of asynchronous writes, and the checkpoints it keeps."""

from pathlib import Path

import torch
from torch import nn

from carclass.config.schema import FrozenSettings, TrainSettings
from carclass.models import resnet
from carclass.runs.run import Run
from carclass.training import checkpoint, loop
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.learner import make_learner

SETTINGS = TrainSettings(name="one", unfrozen=None, frozen=FrozenSettings(epochs=50))


def make_writer(run: Run, module: nn.Module, state: loop.TrainState) -> CheckpointWriter:
    assert run.settings.frozen is not None
    autocast = resnet.autocast("fp32", torch.device("cpu"))
    return CheckpointWriter(run, "frozen", make_learner(module, run.settings.frozen, autocast, seed=1), state)


def finish_epoch(writer: CheckpointWriter, state: loop.TrainState, accuracies: list[float]) -> None:
    state.epoch, state.val_accuracies = len(accuracies), accuracies
    metrics = {"epoch": state.epoch, "train_loss": 1.0, "val_accuracy": 0.5, "seconds": 0.1}
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
