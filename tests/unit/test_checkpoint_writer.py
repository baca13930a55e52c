"""What is written behind a loop's back, and what is there when."""

from pathlib import Path

from torch import nn

from carclass.config.schema import FrozenSettings, TrainSettings
from carclass.runs.run import Run
from carclass.training import checkpoint, loop
from carclass.training.checkpoint_writer import CheckpointWriter

SETTINGS = TrainSettings(name="one", unfrozen=None, frozen=FrozenSettings(epochs=50))


def finished(epoch: int) -> loop.EpochResult:
    metrics = {"epoch": epoch, "train_loss": 1.0, "val_accuracy": 0.5, "seconds": 0.1}
    return loop.EpochResult(metrics, [{"step": 1, "loss": 1.0, "lr": 0.1}])


def test_metrics_that_were_waited_for_are_on_storage_whatever_else_is_being_written(tmp_path: Path):
    """A checkpoint of 40 MB is written after them, which takes longer than looking."""
    run, state = Run(str(tmp_path), SETTINGS), loop.TrainState()
    keeper = CheckpointWriter(run, "frozen", loop.make_trained(nn.Linear(1000, 10_000), FrozenSettings()), state)
    for epoch in range(1, 4):
        state.epoch, state.val_accuracies = epoch, [0.5] * epoch
        keeper.finish(state, finished(epoch))
        keeper.wait_for_metrics()
        assert [row["epoch"] for row in run.metrics()] == list(range(1, epoch + 1))
    keeper.wait()


def test_weights_are_kept_of_the_best_epochs_the_last_one_and_those_that_other_runs_start_from(tmp_path: Path):
    stage = FrozenSettings(epochs=6, keep_epochs=(3,))
    run = Run(str(tmp_path), TrainSettings(name="one", unfrozen=None, frozen=stage, keep_checkpoints=1))
    state, accuracies = loop.TrainState(), [0.1, 0.9, 0.2, 0.8, 0.7, 0.3]
    keeper = CheckpointWriter(run, "frozen", loop.make_trained(nn.Linear(2, 2), stage), state)
    for epoch in range(1, 7):
        state.epoch, state.val_accuracies = epoch, accuracies[:epoch]
        keeper.finish(state, finished(epoch))
    keeper.wait()
    assert checkpoint.names(keeper.uri) == ["epoch-0002", "epoch-0003", "epoch-0006"]
