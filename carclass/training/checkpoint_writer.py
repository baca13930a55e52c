"""Writes a stage's checkpoints and metrics behind the loop's back. Knows nothing of Ray."""

import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from carclass import storage
from carclass.progress import say
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run
from carclass.training import checkpoint
from carclass.training.loop import EpochResult, TrainState, is_done

LOWEST_PRIORITY = 19
"""Of the priorities of POSIX."""


class CheckpointWriter:
    """Writes in a thread, one checkpoint after the other; training waits only for the copy in memory.

    What goes wrong in the thread comes up when the next checkpoint is saved, or at the end.
    """

    def __init__(
        self, run: Run, stage: str, trained: checkpoint.TrainedParts, state: TrainState, *, quiet: bool = False
    ) -> None:
        self.run, self.stage, self.trained, self.quiet = run, stage, trained, quiet
        self.uri = storage.join(run.uri, stage)
        self.journal = MetricsLog(run, stage, state.epoch)
        self.thread = ThreadPoolExecutor(1, initializer=_lower_priority)
        self.noting: Future[None] | None = None  # metrics
        self.writing: Future[None] | None = None  # a checkpoint

    def save(self, state: TrainState, must: bool) -> None:
        """Saves where training is; if it needn't be, only when the last checkpoint is written by now."""
        if not must and self.writing is not None and not self.writing.done():
            return
        self._begin(state, None)

    def finish(self, state: TrainState, finished: EpochResult) -> None:
        """Keeps an epoch's metrics, and its weights if they are wanted; what is needed to go on takes longer
        to write, and is left to `save`.
        """
        if not self.quiet:
            self._say(finished)
        self._begin(state, finished)

    def wait_for_metrics(self) -> None:
        """Returns when those of the epochs finished are written."""
        if self.noting is not None:
            self.noting.result()

    def wait(self) -> None:
        """Returns when all is written."""
        self.wait_for_metrics()
        if self.writing is not None:
            self.writing.result()

    def _begin(self, state: TrainState, finished: EpochResult | None) -> None:
        self.wait()
        name, kept, snapshot = checkpoint.checkpoint_name(state.epoch, state.samples), self._kept(state), None
        if finished is None or name in kept:
            snapshot = checkpoint.take_snapshot(name, self.trained, asdict(state))
        if finished is not None:
            self.noting = self.thread.submit(
                self.journal.add, {**finished.metrics, "time": time.time()}, finished.steps
            )
        if snapshot is not None:
            self.writing = self.thread.submit(self._write, snapshot, kept)

    def _write(self, snapshot: checkpoint.Snapshot, kept: set[str]) -> None:
        checkpoint.write_checkpoint(self.uri, snapshot)
        # Two to go on from, should the newest be damaged.
        checkpoint.prune(self.uri, kept | {*checkpoint.resumable_names(self.uri)[-2:]})

    def _kept(self, state: TrainState) -> set[str]:
        """The names of the epochs' checkpoints that are kept: of the best, and of those that other runs start from."""
        stage = getattr(self.run.settings, self.stage)
        best = sorted(range(1, state.epoch + 1), key=lambda epoch: (-state.val_accuracies[epoch - 1], epoch))
        last = {state.epoch} if is_done(stage, state) else set()
        kept = {*best[: self.run.settings.keep_checkpoints], *stage.keep_epochs} | last
        return {checkpoint.checkpoint_name(epoch) for epoch in kept}

    def _say(self, finished: EpochResult) -> None:
        metrics, settings = finished.metrics, self.run.settings
        say(
            f"{settings.name} {self.stage} {metrics['epoch']}/{getattr(settings, self.stage).epochs}: "
            f"loss {metrics['train_loss']:.3f}, val accuracy {metrics['val_accuracy']:.3f}, {metrics['seconds']:.1f} s"
        )


def _lower_priority() -> None:
    """Leaves the CPUs to the steps wherever both want them."""
    if sys.platform == "linux":  # where priorities are those of threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
