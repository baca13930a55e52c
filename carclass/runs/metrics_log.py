"""A run's metrics per epoch and step, as JSON lines and TensorBoard events."""

import tempfile
from pathlib import Path

from carclass import storage
from carclass.runs.run import MetricsRow, Run, to_json_lines


class MetricsLog:
    """Adds a stage's epochs to the run's metrics. Each epoch has files of its own where it is long, so none costs
    more than the one before.

    epoch: the last one that counts: what a killed run wrote after it is dropped.
    """

    def __init__(self, run: Run, stage: str, epoch: int) -> None:
        self.run, self.stage = run, stage
        self.rows = [row for row in run.metrics() if (row["stage"], row["epoch"]) <= (stage, epoch)]

    def add(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Writes an epoch, its steps first. metrics: with `epoch` and `time` (seconds since 1970)."""
        self.rows.append({"stage": self.stage, **metrics})
        epoch = f"{metrics['epoch']:04d}"
        self._write(f"steps/{self.stage}/{epoch}.jsonl", to_json_lines(steps))
        self._write(
            f"tensorboard/{self.stage}/events.out.tfevents.{epoch}.carclass", tensorboard_events(metrics, steps)
        )
        self._write("metrics.jsonl", to_json_lines(self.rows))

    def _write(self, path: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.run.uri, path), data)


def tensorboard_events(metrics: MetricsRow, steps: list[MetricsRow]) -> bytes:
    """An event file of one epoch: its metrics by epoch, and `step/loss` and the like by step since the first epoch."""
    # Imported here: it takes a second, and only the worker that writes metrics needs it.
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for name in sorted(metrics.keys() - {"epoch", "time"}):
                writer.add_scalar(name, metrics[name], metrics["epoch"], walltime=metrics["time"])
            before = (metrics["epoch"] - 1) * len(steps)
            for row in steps:
                for name in sorted(row.keys() - {"step"}):
                    writer.add_scalar(f"step/{name}", row[name], before + row["step"], walltime=metrics["time"])
        return next(Path(folder).iterdir()).read_bytes()
