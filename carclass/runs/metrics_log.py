"""A run's metrics per epoch and step, as JSON lines and TensorBoard events."""

import tempfile
from pathlib import Path

from carclass import storage
from carclass.data import formats
from carclass.runs.run import MetricsRow, Run


class MetricsLog:
    """The metrics of a stage as it trains. Steps and events have a file per epoch, so every epoch costs the same.

    epoch: number of completed epochs; rows of later ones, which a killed run wrote, are dropped.
    """

    def __init__(self, run: Run, stage: str, epoch: int) -> None:
        self.run, self.stage = run, stage
        self.rows = [row for row in run.metrics() if (row["stage"], row["epoch"]) <= (stage, epoch)]

    def add(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Write an epoch: steps, TensorBoard events, then metrics (with `epoch` and `time`, seconds since 1970)."""
        self.rows.append({"stage": self.stage, **metrics})
        epoch = f"{metrics['epoch']:04d}"
        self._write(f"steps/{self.stage}/{epoch}.jsonl", formats.encode_lines("steps", steps))
        self._write(
            f"tensorboard/{self.stage}/events.out.tfevents.{epoch}.carclass", tensorboard_events(metrics, steps)
        )
        self._write("metrics.jsonl", formats.encode_lines("metrics", self.rows))

    def _write(self, path: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.run.uri, path), data)


def tensorboard_events(metrics: MetricsRow, steps: list[MetricsRow]) -> bytes:
    """Return an event file of one epoch: metrics by epoch, and `step/loss` etc. by step since the first epoch."""
    # Imported here: it takes a second, and only the rank that writes metrics needs it.
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for name in sorted(metrics.keys() - {"epoch", "time"}):
                writer.add_scalar(name, metrics[name], metrics["epoch"], walltime=metrics["time"])
            previous_steps = (metrics["epoch"] - 1) * len(steps)
            for row in steps:
                for name in sorted(row.keys() - {"step"}):
                    writer.add_scalar(f"step/{name}", row[name], previous_steps + row["step"], walltime=metrics["time"])
        return next(Path(folder).iterdir()).read_bytes()
