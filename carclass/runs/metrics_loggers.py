"""Receivers of a run's metrics as it trains, chosen by `train.loggers`: TensorBoard, MLflow, Weights & Biases.

MLflow and W&B are extras (`pip install carclass[mlflow]`), set up by their own environment variables. A carclass run is
one run there, over both stages and after a restart.
"""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from carclass import storage
from carclass.config.installation import pip_command
from carclass.config.schema import LoggerName, TrainSettings
from carclass.errors import UserError
from carclass.runs.run import MetricsRow, Run, flatten

PROJECT = "carclass"
"""Experiment of MLflow and project of W&B, unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT names another."""
RUN_TAG = "carclass.run"
EXTRAS: dict[LoggerName, str] = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""Distributions of the loggers that carclass does not require, by the name of their module."""
MAX_BATCH = 1000
"""Largest number of metrics in a request to MLflow."""


class MetricsLogger(Protocol):
    """A receiver of the metrics of a stage."""

    errors: tuple[type[Exception], ...]
    """Failures that end the logging, but not the training: metrics are in `metrics.jsonl` too."""

    def log(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Record an epoch. metrics: with `epoch` and `time`, seconds since 1970."""

    def close(self) -> None:
        """Send all that is left."""


class TensorBoardLogger:
    """Event files below the run's folder, one per epoch, so that every epoch costs the same."""

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, run: Run, stage: str) -> None:
        self.folder = storage.join(run.uri, "tensorboard", stage)

    def log(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Write the event file of an epoch."""
        name = f"events.out.tfevents.{metrics['epoch']:04d}.carclass"
        storage.write_bytes(storage.join(self.folder, name), tensorboard_events(metrics, steps))

    def close(self) -> None:
        """Do nothing: files are complete."""


class MlflowLogger:
    """A run of MLflow, on the server at MLFLOW_TRACKING_URI or in a file of a local root."""

    def __init__(self, run: Run, stage: str) -> None:
        from mlflow.exceptions import MlflowException

        self.stage = stage
        self.errors: tuple[type[Exception], ...] = (MlflowException,)
        identity = _identity(run)
        try:
            self.client, experiment = _open_mlflow(run.root)
            found = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{identity}'")
            tracked = found[0] if found else self._create_run(run, experiment, identity)
            self.run_id = tracked.info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        except MlflowException as error:
            raise _unusable("mlflow", error) from error
        self.last_epoch = int(tracked.data.metrics.get(f"{stage}/epoch", 0))

    def _create_run(self, run: Run, experiment: str, identity: str) -> Any:
        from mlflow.entities import Param

        tracked = self.client.create_run(experiment, run_name=run.settings.name, tags={RUN_TAG: identity})
        settings = flatten(run.settings.model_dump(mode="json"))
        self.client.log_batch(tracked.info.run_id, params=[Param(key, str(value)) for key, value in settings.items()])
        return tracked

    def log(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Send the metrics of an epoch, unless it was sent before a restart."""
        from mlflow.entities import Metric

        if metrics["epoch"] <= self.last_epoch:
            return
        time = int(metrics["time"] * 1000)
        rows = [*scalars(metrics, steps), ("epoch", metrics["epoch"], metrics["epoch"])]
        batch = [Metric(f"{self.stage}/{name}", value, time, step) for name, value, step in rows]
        for start in range(0, len(batch), MAX_BATCH):
            self.client.log_batch(self.run_id, metrics=batch[start : start + MAX_BATCH])

    def close(self) -> None:
        """Mark the run as finished; another stage or a restart continues it."""
        self.client.set_terminated(self.run_id)


class WandbLogger:
    """A run of W&B, sent to its server, or with WANDB_MODE=offline written to the run's folder for `wandb sync`."""

    def __init__(self, run: Run, stage: str) -> None:
        import wandb

        self.stage = stage
        self.errors: tuple[type[Exception], ...] = (wandb.errors.Error,)
        self.axes: set[str] = set()
        try:
            self.tracked = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=run.folder,
                name=run.settings.name,
                id=storage.sha256(_identity(run).encode())[:16],
                resume="allow",
                mode=os.environ.get("WANDB_MODE"),  # W&B itself reads it once in a process
                dir=_wandb_folder(run),
                config=flatten(run.settings.model_dump(mode="json")),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise _unusable("wandb", error) from error
        self.last_epoch = int(self.tracked.summary.get(f"{stage}/epoch") or 0)

    def log(self, metrics: MetricsRow, steps: list[MetricsRow]) -> None:
        """Send the metrics of an epoch, unless it was sent before a restart."""
        if metrics["epoch"] <= self.last_epoch:
            return
        rows: dict[tuple[str, int], dict[str, float]] = {}
        for name, value, step in scalars(metrics, steps):
            axis = f"{self.stage}/{'step' if name.startswith('step/') else 'epoch'}"
            key = f"{self.stage}/{name}"
            if key not in self.axes:
                self.tracked.define_metric(key, step_metric=axis)
                self.axes.add(key)
            rows.setdefault((axis, step), {axis: step})[key] = value
        for row in rows.values():
            self.tracked.log(row)

    def close(self) -> None:
        """Wait until all is sent."""
        self.tracked.finish()


LOGGERS: dict[LoggerName, Callable[[Run, str], MetricsLogger]] = {
    "tensorboard": TensorBoardLogger,
    "mlflow": MlflowLogger,
    "wandb": WandbLogger,
}


def make_loggers(run: Run, stage: str) -> list[MetricsLogger]:
    """Return the loggers of a run's settings. Raise UserError if one is unusable."""
    for name in run.settings.loggers:
        _check_installed(name)
    return [LOGGERS[name](run, stage) for name in run.settings.loggers]


def check_loggers(root: str, settings: TrainSettings) -> None:
    """Raise UserError for a logger without its package, server or key, before work begins."""
    for name in settings.loggers:
        _check_installed(name)
    if "mlflow" in settings.loggers:
        from mlflow.exceptions import MlflowException

        try:
            _open_mlflow(root)
        except MlflowException as error:
            raise _unusable("mlflow", error) from error
    if "wandb" in settings.loggers:
        _check_wandb(root)


def scalars(metrics: MetricsRow, steps: list[MetricsRow]) -> Iterator[tuple[str, float, int]]:
    """Yield (name, value, step): an epoch's metrics by epoch, and `step/loss` etc. by step since the first epoch."""
    for name in sorted(metrics.keys() - {"epoch", "time"}):
        yield name, metrics[name], metrics["epoch"]
    previous_steps = (metrics["epoch"] - 1) * len(steps)
    for row in steps:
        for name in sorted(row.keys() - {"step"}):
            yield f"step/{name}", row[name], previous_steps + row["step"]


def tensorboard_events(metrics: MetricsRow, steps: list[MetricsRow]) -> bytes:
    """Return an event file of one epoch."""
    # Imported here: it takes a second, and only the rank that writes metrics needs it.
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for name, value, step in scalars(metrics, steps):
                writer.add_scalar(name, value, step, walltime=metrics["time"])
        return next(Path(folder).iterdir()).read_bytes()


def _check_installed(name: LoggerName) -> None:
    if name in EXTRAS and importlib.util.find_spec(name) is None:
        raise UserError(
            f"`train.loggers` has `{name}`, whose Python package is missing. Leave it out, or install it on every "
            f"node: {pip_command(EXTRAS[name])}"
        )


def _identity(run: Run) -> str:
    """Return an id that tells a run from others of the same name."""
    return f"{run.uri} {run.lineage()['started']}"


def _open_mlflow(root: str) -> tuple[Any, str]:
    """Return the client of MLflow and the id of the experiment. Raise UserError if there is no server."""
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table of a new file
    uri, folder = os.environ.get("MLFLOW_TRACKING_URI"), storage.local_path(root)
    if not uri and folder is None:
        raise UserError(
            f"`train.loggers` has `mlflow`, and `root` {root} is not local. Set MLFLOW_TRACKING_URI to the address of "
            "a server on every node, or leave it out."
        )
    if not uri:
        Path(str(folder)).mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    return client, experiment.experiment_id if experiment is not None else client.create_experiment(name)


def _check_wandb(root: str) -> None:
    """Raise UserError if W&B has no key, or no folder for its files when offline."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online":
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise _unusable("wandb", error) from error
    elif storage.local_path(root) is None and "WANDB_DIR" not in os.environ:
        raise UserError(
            f"`train.loggers` has `wandb`, which is offline (WANDB_MODE), and `root` {root} is not local. Set "
            "WANDB_DIR to a folder that is kept, on every node, or leave it out."
        )


def _wandb_folder(run: Run) -> str:
    """Return the folder of W&B's own files."""
    return os.environ.get("WANDB_DIR") or storage.local_path(run.uri) or tempfile.gettempdir()


def _unusable(name: LoggerName, error: Exception) -> UserError:
    cause = next(iter(str(error).splitlines()), type(error).__name__)
    variables = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_API_KEY and WANDB_MODE"}[name]
    return UserError(f"`train.loggers`: {name} is unusable ({cause[:300]}). Check {variables}, or leave it out.")
