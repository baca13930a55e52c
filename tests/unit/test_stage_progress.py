"""Progress lines of a training stage."""

import time

import pytest

from carclass.config.schema import UnfrozenSettings
from carclass.training.loop import TrainState
from carclass.training.stage_progress import StageProgress

NUM_STEPS = 10
STAGE = UnfrozenSettings(epochs=4, warmup_epochs=1, batch_size=8)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def metrics(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 1.25, "val_accuracy": 0.5, "seconds": 2.0}


def test_steps_of_a_long_epoch_are_reported_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]):
    progress = StageProgress("first unfrozen", STAGE, NUM_STEPS, TrainState())
    for step in range(1, 16):
        clock.now += 4
        progress.report_step(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines[:1]] == ["first unfrozen 1/4: step 3 of 10, 2 photos/s, 2 min left"]
    assert len(lines) == 5


def test_steps_count_on_through_epochs_and_from_where_a_stage_resumes(clock: Clock, capsys: pytest.CaptureFixture[str]):
    state = TrainState(epoch=1, val_accuracies=[0.1], steps=[[1.0, 1.0, 8.0]] * 4)
    progress = StageProgress("first unfrozen", STAGE, NUM_STEPS, state)
    clock.now += 20
    progress.report_step(24)
    assert "first unfrozen 3/4: step 4 of 10, 4 photos/s, 32 s left" in capsys.readouterr().out


def test_short_epochs_are_reported_once_a_second_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]):
    progress = StageProgress("first unfrozen", STAGE, NUM_STEPS, TrainState())
    for epoch in range(1, 5):
        clock.now += 0.4
        progress.report_epoch(metrics(epoch))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "first unfrozen 1/4: loss 1.250, val accuracy 0.500, 2.0 s, 1 s left",
        "first unfrozen 4/4: loss 1.250, val accuracy 0.500, 2.0 s",
    ]


def test_with_patience_the_time_left_is_an_upper_bound(clock: Clock, capsys: pytest.CaptureFixture[str]):
    stage = STAGE.model_copy(update={"patience": 2})
    progress = StageProgress("first unfrozen", stage, NUM_STEPS, TrainState())
    clock.now += 10
    progress.report_epoch(metrics(1))
    assert "2.0 s, at most 30 s left" in capsys.readouterr().out
