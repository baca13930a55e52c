"""A run's metrics per epoch and step, as JSON lines and by its loggers."""

from carclass import storage
from carclass.data import formats
from carclass.progress import print_line
from carclass.runs.metrics_loggers import MetricsLogger, make_loggers
from carclass.runs.run import MetricsRow, Run


class MetricsLog:
    """The metrics of a stage as it trains. Steps have a file per epoch, so every epoch costs the same.

    epoch: number of completed epochs; rows of later ones, which a killed run wrote, are dropped.
    """

    def __init__(self, run: Run, stage: str, epoch: int) -> None:
        self.run, self.stage = run, stage
        self.loggers = make_loggers(run, stage)
        self.rows = [row for row in run.metrics() if (row["stage"], row["epoch"]) <= (stage, epoch)]

    def add(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Write an epoch: steps, to the loggers, then metrics (with `epoch` and `time`, seconds since 1970)."""
        self.rows.append({"stage": self.stage, **metrics})
        epoch = f"{metrics['epoch']:04d}"
        self._write(f"steps/{self.stage}/{epoch}.jsonl", formats.encode_lines("steps", steps))
        for logger in [*self.loggers]:
            try:
                logger.log(metrics, steps)
            except logger.errors as error:
                self._give_up(logger, error)
        self._write("metrics.jsonl", formats.encode_lines("metrics", self.rows))

    def close(self) -> None:
        """End the loggers, once."""
        while self.loggers:
            logger = self.loggers.pop()
            try:
                logger.close()
            except logger.errors as error:
                self._give_up(logger, error)

    def _give_up(self, logger: MetricsLogger, error: Exception) -> None:
        """Go on without a logger whose server fails, with a warning."""
        if logger in self.loggers:
            self.loggers.remove(logger)
        cause = " ".join(str(error).split())[:300]
        print_line(
            f"warning: {type(logger).__name__} gets no more metrics of this stage ({cause}); all are in "
            f"{self.run.uri}/metrics.jsonl"
        )

    def _write(self, path: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.run.uri, path), data)
