"""Asynchronous writing of a stage's checkpoints and metrics, in a background thread. Without Ray."""

import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from carclass import storage
from carclass.progress import print_line
from carclass.runs.checkpoint_index import checkpoint_name
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run
from carclass.training import checkpoint
from carclass.training.learner import Learner
from carclass.training.loop import Metrics, TrainState, is_done

LOWEST_PRIORITY = 19
"""Niceness of POSIX."""


class CheckpointWriter:
    """Writer of one checkpoint after the other; training waits only for the copy to the host's memory.

    Errors of the thread are raised when the next checkpoint is saved, or at the end. verbose: print a line per epoch.
    """

    def __init__(self, run: Run, stage: str, learner: Learner, state: TrainState, *, verbose: bool = True) -> None:
        self.run, self.stage, self.learner, self.verbose = run, stage, learner, verbose
        self.uri = storage.join(run.uri, stage)
        self.metrics_log = MetricsLog(run, stage, state.epoch)
        self.thread = ThreadPoolExecutor(1, initializer=_lower_priority)
        self.pending_metrics: Future[None] | None = None
        self.pending_checkpoint: Future[None] | None = None

    def save(self, state: TrainState, required: bool) -> None:
        """Save a checkpoint to resume from; unless required, skip it while the previous one is being written."""
        if not required and self.pending_checkpoint is not None and not self.pending_checkpoint.done():
            return
        self.wait()
        self._submit_checkpoint(state)

    def finish_epoch(self, state: TrainState, metrics: Metrics, steps: list[Metrics]) -> None:
        """Save an epoch's metrics, and its weights if they are to be kept."""
        if self.verbose:
            self._report(metrics)
        self.wait()
        row = {**metrics, "time": time.time()}
        self.pending_metrics = self.thread.submit(self.metrics_log.add, row, steps)
        if checkpoint_name(state.epoch) in self._kept(state):
            self._submit_checkpoint(state)

    def wait_for_metrics(self) -> None:
        """Return when the metrics of all finished epochs are written."""
        if self.pending_metrics is not None:
            self.pending_metrics.result()

    def wait(self) -> None:
        """Return when everything is written."""
        self.wait_for_metrics()
        if self.pending_checkpoint is not None:
            self.pending_checkpoint.result()

    def _submit_checkpoint(self, state: TrainState) -> None:
        name = checkpoint_name(state.epoch, state.samples)
        snapshot = checkpoint.take_snapshot(name, self.learner, asdict(state))
        self.pending_checkpoint = self.thread.submit(self._write, snapshot, self._kept(state))

    def _write(self, snapshot: checkpoint.Snapshot, kept: set[str]) -> None:
        checkpoint.write_checkpoint(self.uri, snapshot)
        # Two to resume from, in case the newest is damaged.
        checkpoint.prune(self.uri, kept | {*checkpoint.resumable_names(self.uri)[-2:]})

    def _kept(self, state: TrainState) -> set[str]:
        """Return the names of the epochs' checkpoints to keep: the best, `keep_epochs` and the last one."""
        stage = getattr(self.run.settings, self.stage)
        best = sorted(range(1, state.epoch + 1), key=lambda epoch: (-state.val_accuracies[epoch - 1], epoch))
        last = {state.epoch} if is_done(stage, state) else set()
        kept = {*best[: self.run.settings.keep_checkpoints], *stage.keep_epochs} | last
        return {checkpoint_name(epoch) for epoch in kept}

    def _report(self, metrics: Metrics) -> None:
        settings = self.run.settings
        print_line(
            f"{settings.name} {self.stage} {metrics['epoch']}/{getattr(settings, self.stage).epochs}: "
            f"loss {metrics['train_loss']:.3f}, val accuracy {metrics['val_accuracy']:.3f}, {metrics['seconds']:.1f} s"
        )


def _lower_priority() -> None:
    """Give training steps precedence over this thread on the CPUs."""
    if sys.platform == "linux":  # elsewhere, niceness is of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
