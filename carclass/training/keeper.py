"""Writes a stage's checkpoints and metrics behind the loop's back. Knows nothing of Ray."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from carclass import lineage, storage
from carclass.progress import say
from carclass.training import checkpoint
from carclass.training.loop import Finished, State


class Keeper:
    """Writes in a thread, one checkpoint after the other; training waits only for the copy in memory.

    What goes wrong in the thread comes up when the next checkpoint is saved, or at the end.
    """

    def __init__(self, run: lineage.Run, stage: str, trained: checkpoint.Trained, state: State) -> None:
        self.run, self.stage, self.trained = run, stage, trained
        self.uri = storage.join(run.uri, stage)
        self.journal = lineage.Journal(run, stage, state.epoch)
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def save(self, state: State, finished: Finished | None, must: bool) -> None:
        """Saves where training is; if it needn't be, only when the last checkpoint is written by now."""
        if not must and self.writing is not None and not self.writing.done():
            return
        self.wait()
        name = checkpoint.name_of(state.epoch, state.samples)
        snapshot = checkpoint.take(name, self.trained, asdict(state))
        if finished is not None:
            self._say(finished)
        self.writing = self.thread.submit(self._write, snapshot, finished, time.time())

    def wait(self) -> None:
        """Returns when all is written."""
        if self.writing is not None:
            self.writing.result()

    def _write(self, snapshot: checkpoint.Snapshot, finished: Finished | None, now: float) -> None:
        # Metrics first: a checkpoint without the metrics of its epoch would never get them.
        if finished is not None:
            self.journal.add({**finished.metrics, "time": now}, finished.steps)
        checkpoint.write(self.uri, snapshot)
        checkpoint.prune(self.uri, self._kept(snapshot.state["val_accuracies"]))

    def _kept(self, val_accuracies: list[float]) -> set[str]:
        """The best epochs, and the two latest checkpoints: the one to go on from, and one should it be damaged."""
        epochs = sorted(range(len(val_accuracies)), key=lambda i: (-val_accuracies[i], i))
        best = {checkpoint.name_of(i + 1) for i in epochs[: self.run.settings.keep_checkpoints]}
        return best | {*checkpoint.names(self.uri)[-2:]}

    def _say(self, finished: Finished) -> None:
        metrics, settings = finished.metrics, self.run.settings
        say(
            f"{settings.name} {self.stage} {metrics['epoch']}/{getattr(settings, self.stage).epochs}: "
            f"loss {metrics['train_loss']:.3f}, val accuracy {metrics['val_accuracy']:.3f}, {metrics['seconds']:.1f} s"
        )
