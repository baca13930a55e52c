"""Asynchronous writing of a stage's checkpoints and metrics, in two background threads. Without Ray."""

import os
import sys
import threading
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from carclass import storage
from carclass.runs.checkpoint_index import checkpoint_name
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run
from carclass.training import checkpoint
from carclass.training.learner import Learner
from carclass.training.loop import Metrics, TrainState, is_done

LOWEST_PRIORITY = 19
"""Niceness of POSIX."""


class CheckpointWriter:
    """Writer of metrics and checkpoints; training waits only for the copy to the host's memory, and at the end.

    Errors of the threads are raised at the end of the next epoch, or at the end.
    """

    def __init__(self, run: Run, stage: str, learner: Learner, state: TrainState) -> None:
        self.run, self.stage, self.learner = run, stage, learner
        self.uri = storage.join(run.uri, stage)
        self.metrics_log = MetricsLog(run, stage, state.epoch)
        self.metrics_thread, self.checkpoint_thread = (
            ThreadPoolExecutor(1, initializer=_lower_priority) for _ in range(2)
        )
        self.snapshots: dict[str, checkpoint.Snapshot] = {}  # that are not written yet, by name
        self.pending: list[Future[None]] = []
        self.pending_metrics: Future[None] | None = None
        self.pending_save: Future[None] | None = None
        self.save_time = time.monotonic()

    def is_checkpoint_due(self) -> bool:
        """Return True if it is time for a checkpoint to resume from, and the previous one is written."""
        is_written = self.pending_save is None or self.pending_save.done()
        return is_written and time.monotonic() - self.save_time >= self.run.settings.checkpoint_seconds

    def save(self, state: TrainState) -> None:
        """Save a checkpoint to resume from, once the previous one is written."""
        if self.pending_save is not None:
            self.pending_save.result()
        self.pending_save = self._submit_checkpoint(state)
        self.save_time = time.monotonic()

    def finish_epoch(self, state: TrainState, metrics: Metrics, steps: list[Metrics]) -> None:
        """Save an epoch's metrics, and its weights if they are to be kept."""
        for future in [future for future in self.pending if future.done()]:
            self.pending.remove(future)
            future.result()
        self.pending_metrics = self.metrics_thread.submit(self.metrics_log.add, {**metrics, "time": time.time()}, steps)
        self.pending.append(self.pending_metrics)
        kept = self._kept(state)
        for name in [*self.snapshots]:  # better epochs have replaced one before it was written
            if not checkpoint.is_resumable(name) and name not in kept:
                self.snapshots.pop(name, None)
        if checkpoint_name(state.epoch) in kept:
            self._submit_checkpoint(state)

    def wait_for_metrics(self) -> None:
        """Return when the metrics of all finished epochs are written."""
        if self.pending_metrics is not None:
            self.pending_metrics.result()

    def wait(self) -> None:
        """Return when everything is written, and end the loggers.

        Raise the first error of a write, once all others have ended.
        """
        pending, self.pending = self.pending, []
        futures.wait(pending)
        self.metrics_log.close()
        for future in pending:
            future.result()

    def _submit_checkpoint(self, state: TrainState) -> Future[None]:
        name = checkpoint_name(state.epoch, state.samples)
        self.snapshots[name] = checkpoint.take_snapshot(name, self.learner, asdict(state))
        future = self.checkpoint_thread.submit(self._write, name, self._kept(state), self.pending_metrics)
        self.pending.append(future)
        return future

    def _write(self, name: str, kept: set[str], metrics: Future[None] | None) -> None:
        """Write a snapshot after the metrics of its epoch, unless it was dropped."""
        snapshot = self.snapshots.pop(name, None)
        if snapshot is None:
            return
        if metrics is not None:
            metrics.result()
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


def _lower_priority() -> None:
    """Give training steps precedence over this thread on the CPUs."""
    if sys.platform == "linux":  # elsewhere, niceness is of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
