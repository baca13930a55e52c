"""Progress lines of a training stage."""

import time

from carclass.config.schema import StageSettings
from carclass.formatting import duration_text, rate_text
from carclass.progress import Throttle, print_line
from carclass.training.loop import Metrics, TrainState

EPOCH_INTERVAL, STEP_INTERVAL = 1.0, 10.0
"""Least seconds between the lines of two epochs, and between those of steps."""


class StageProgress:
    """Lines with the time left: one per epoch, at most one a second, and during long epochs one every ten seconds.

    name: of run and stage. num_steps: of an epoch. state: that the stage begins or resumes with.
    """

    def __init__(self, name: str, stage: StageSettings, num_steps: int, state: TrainState) -> None:
        self.name, self.stage, self.num_steps = name, stage, num_steps
        self.first_step = state.epoch * num_steps + len(state.steps)
        self.started = time.monotonic()
        self.shows_val = True
        """False in a refit, which is trained on the val photos."""
        self.epochs, self.steps = Throttle(EPOCH_INTERVAL, immediate=True), Throttle(STEP_INTERVAL)

    def report_step(self, step: int) -> None:
        """Print a line if one is due. step: of the stage, from 1."""
        if self.steps.is_ready():
            epoch, in_epoch = (step - 1) // self.num_steps + 1, (step - 1) % self.num_steps + 1
            rate = (step - self.first_step) * self.stage.batch_size / (time.monotonic() - self.started)
            self._print(epoch, f"step {in_epoch} of {self.num_steps}, {rate:.3g} photos/s, {self._time_left(step)}")

    def report_epoch(self, metrics: Metrics) -> None:
        """Print a line if one is due, and at the last epoch."""
        epoch = int(metrics["epoch"])
        self.steps = Throttle(STEP_INTERVAL)  # the next line of a step waits from here
        if self.epochs.is_ready() or epoch == self.stage.epochs:
            figures = f"loss {metrics['train_loss']:.3f}"
            if self.shows_val:
                figures += f", val accuracy {rate_text(metrics['val_accuracy'])}"
            left = "" if epoch == self.stage.epochs else f", {self._time_left(epoch * self.num_steps)}"
            self._print(epoch, f"{figures}, {metrics['seconds']:.1f} s{left}")

    def _time_left(self, step: int) -> str:
        """Return the time left after a step as text: "3 min left"."""
        per_step = (time.monotonic() - self.started) / max(step - self.first_step, 1)
        left = duration_text((self.stage.epochs * self.num_steps - step) * per_step)
        return f"{left} left" if self.stage.patience is None else f"at most {left} left"

    def _print(self, epoch: int, text: str) -> None:
        print_line(f"{self.name} {epoch}/{self.stage.epochs}: {text}")
