"""Runs on storage: what was trained, from what, on what, and how it went.

<root>/experiments/<name>/config.yml      the run's settings, fully resolved
<root>/experiments/<name>/lineage.json    parent, dataset and code, with their hashes
<root>/experiments/<name>/metrics.jsonl   a line per epoch
<root>/experiments/<name>/steps/<stage>/  a file per epoch, a line per step
<root>/experiments/<name>/tensorboard/    both, for TensorBoard
<root>/experiments/<name>/<stage>/        checkpoints of the stage, and its best model
<root>/experiments/<name>/report/         what the evaluation wrote
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from carclass import config, dataset, storage
from carclass.errors import UserError
from carclass.model import StageName
from carclass.settings import EPOCH_OF_RUN

STAGES: tuple[StageName, ...] = ("frozen", "unfrozen")
MACHINES = ("num_workers", "use_gpu", "checkpoint_steps", "keep_checkpoints")
"""Settings of what a run is trained on and how it is kept, which may change when it goes on."""
Row = dict[str, Any]


class Start(NamedTuple):
    """Where a run with another run as its parent starts."""

    run: str
    epoch: str  # of that run's last stage: a number, `best` or `last`


@dataclass(frozen=True)
class Run:
    """A run that has begun."""

    root: str
    settings: config.Train
    folder: str = "experiments"
    """Where it lies below the root."""

    @property
    def uri(self) -> str:
        """The run's folder."""
        return storage.join(self.root, self.folder, self.settings.name)

    @property
    def stages(self) -> list[StageName]:
        """The stages that its settings ask for, in order."""
        return [stage for stage in STAGES if getattr(self.settings, stage) is not None]

    def best(self, stage: str) -> str:
        """Where a stage's best model is, without its suffixes."""
        return storage.join(self.uri, stage, "best")

    def is_finished(self, stage: str) -> bool:
        """Whether the stage's best model is published."""
        return storage.exists(f"{self.best(stage)}.json")

    @property
    def missing(self) -> list[StageName]:
        """The stages that are not finished."""
        return [stage for stage in self.stages if not self.is_finished(stage)]

    def best_val_accuracy(self, stage: str) -> float:
        """Of the stage's best epoch, once it is finished."""
        return float(json.loads(storage.read_bytes(f"{self.best(stage)}.json"))["val_accuracy"])

    def lineage(self) -> dict[str, Any]:
        """What the run comes from."""
        return dict(json.loads(storage.read_bytes(storage.join(self.uri, "lineage.json"))))

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch, with its stage, oldest first."""
        try:
            text = storage.read_bytes(storage.join(self.uri, "metrics.jsonl")).decode()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def steps(self, stage: str, epoch: int) -> list[Row]:
        """One dict per step of a finished epoch: `step` counted from 1, `loss`, `accuracy`, `lr`."""
        text = storage.read_bytes(storage.join(self.uri, "steps", stage, f"{epoch:04d}.jsonl")).decode()
        return [json.loads(line) for line in text.splitlines()]


class Journal:
    """Adds a stage's epochs to the run's metrics. Each epoch has files of its own where it is long, so none costs
    more than the one before.

    epoch: the last one that counts: what a killed run wrote after it is dropped.
    """

    def __init__(self, run: Run, stage: str, epoch: int) -> None:
        self.run, self.stage = run, stage
        self.rows = [row for row in run.metrics() if (row["stage"], row["epoch"]) <= (stage, epoch)]

    def add(self, metrics: Row, steps: list[Row]) -> None:
        """Writes an epoch, its steps first. metrics: with `epoch` and `time` (seconds since 1970)."""
        self.rows.append({"stage": self.stage, **metrics})
        epoch = f"{metrics['epoch']:04d}"
        self._write(f"steps/{self.stage}/{epoch}.jsonl", _lines(steps))
        self._write(
            f"tensorboard/{self.stage}/events.out.tfevents.{epoch}.carclass", tensorboard_events(metrics, steps)
        )
        self._write("metrics.jsonl", _lines(self.rows))

    def _write(self, path: str, data: bytes) -> None:
        storage.write_bytes(storage.join(self.run.uri, path), data)


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def place(root: str, name: str) -> str:
    """Where a run lies."""
    return storage.join(root, "experiments", name)


def start(parent: str) -> Start | None:
    """What `train.parent` says of a run; None where it stands for a file."""
    found = EPOCH_OF_RUN.fullmatch(parent)
    return Start(*found.groups()) if found else None


def begin(run: Run, source: dataset.Dataset, parent_sha256: str) -> Run:
    """Starts a run or finds it begun; UserError when its name was used with other settings or data."""
    settings = run.settings
    origin = {
        "parent": settings.parent,
        "parent_sha256": parent_sha256,
        "dataset": settings.dataset,
        "dataset_digest": source.digest,
        "seed": settings.seed,
        "code": code_version(),
    }
    config_uri = storage.join(run.uri, "config.yml")
    if storage.exists(config_uri):
        _check_same(run, load_settings(storage.read_bytes(config_uri)), origin)
        return run
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(storage.join(run.uri, "lineage.json"), json.dumps(origin, indent=1).encode())
    storage.write_bytes(config_uri, text.encode())
    return run


def adopt(run: Run, other: Run, stage: str) -> None:
    """Gives a run a finished stage of another one, which was trained with the same settings on the same photos."""
    rows = [row for row in other.metrics() if row["stage"] == stage]
    storage.write_bytes(storage.join(run.uri, "metrics.jsonl"), _lines(rows))
    for suffix in (".safetensors", ".json"):  # the latter makes the stage finished
        storage.write_bytes(f"{run.best(stage)}{suffix}", storage.read_bytes(f"{other.best(stage)}{suffix}"))


def load(root: str, name: str) -> Run:
    """A run by its name; UserError, naming those that are there, when it isn't."""
    try:
        text = storage.read_bytes(storage.join(place(root, name), "config.yml"))
    except FileNotFoundError as error:
        found = [path for path in storage.list_files(storage.join(root, "experiments")) if path.endswith("/config.yml")]
        known = ", ".join(path.removesuffix("/config.yml") for path in found) or "none: run jobs/train.py"
        raise UserError(f"no run `{name}` in {root}. There: {known}.") from error
    return Run(root, load_settings(text))


def load_settings(text: bytes) -> config.Train:
    """A run's config.yml."""
    return config.Train.model_validate(yaml.safe_load(text))


def changes(old: config.Train, new: config.Train) -> list[str]:
    """The settings, by dotted key, that make another run of it."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if key not in MACHINES and before.get(key) != after.get(key)]


def flat(values: dict[str, Any], prefix: str = "") -> Row:
    """Nested settings by dotted key."""
    found: Row = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def moved(run: Run, dataset_digest: str, parent_sha256: str | None) -> list[str]:
    """What a run that has begun comes from and is no longer what it was, in words. None: nobody knows the parent's."""
    was, found = run.lineage(), []
    if was["dataset_digest"] != dataset_digest:
        found.append("the dataset's content")
    if parent_sha256 not in (None, was["parent_sha256"]):
        found.append("the parent's weights")
    return found


def _check_same(run: Run, old: config.Train, origin: dict[str, Any]) -> None:
    other = changes(old, run.settings) + moved(run, origin["dataset_digest"], origin["parent_sha256"])
    if other:
        raise UserError(
            f"run `{run.settings.name}` in {run.root} was begun with other settings ({', '.join(other)}). "
            f"Give this one another `train.name`, or delete {run.uri}."
        )


def code_version() -> str:
    """The commit the code is at, with + when files were changed; the package's version outside a checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("carclass") if _is_installed() else "unknown"


def _is_installed() -> bool:
    return any(distribution.name == "carclass" for distribution in metadata.distributions())


def tensorboard_events(metrics: Row, steps: list[Row]) -> bytes:
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
