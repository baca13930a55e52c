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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.config.section import EPOCH_OF_RUN
from carclass.data import dataset
from carclass.errors import UserError
from carclass.models.resnet import StageName

STAGES: tuple[StageName, ...] = ("frozen", "unfrozen")
MAY_CHANGE_ON_RESUME = ("num_workers", "use_gpu", "checkpoint_steps", "keep_checkpoints")
"""Settings of what a run is trained on and how it is kept, which may change when it goes on."""
MetricsRow = dict[str, Any]


class ParentEpoch(NamedTuple):
    """Where a run with another run as its parent starts."""

    run: str
    epoch: str  # of that run's last stage: a number, `best` or `last`


@dataclass(frozen=True)
class Run:
    """A run that has begun."""

    root: str
    settings: TrainSettings
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

    def model_uri(self, stage: str) -> str:
        """Where a stage's best model is, without its suffixes."""
        return storage.join(self.uri, stage, "best")

    def is_finished(self, stage: str) -> bool:
        """Whether the stage's best model is published."""
        return storage.exists(f"{self.model_uri(stage)}.json")

    @property
    def unfinished_stages(self) -> list[StageName]:
        """The stages that are not finished."""
        return [stage for stage in self.stages if not self.is_finished(stage)]

    def best_val_accuracy(self, stage: str) -> float:
        """Of the stage's best epoch, once it is finished."""
        return float(json.loads(storage.read_bytes(f"{self.model_uri(stage)}.json"))["val_accuracy"])

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

    def steps(self, stage: str, epoch: int) -> list[MetricsRow]:
        """One dict per step of a finished epoch: `step` counted from 1, `loss`, `accuracy`, `lr`."""
        text = storage.read_bytes(storage.join(self.uri, "steps", stage, f"{epoch:04d}.jsonl")).decode()
        return [json.loads(line) for line in text.splitlines()]


def to_json_lines(rows: list[MetricsRow]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def run_uri(root: str, name: str) -> str:
    """Where a run lies."""
    return storage.join(root, "experiments", name)


def parse_parent(parent: str) -> ParentEpoch | None:
    """What `train.parent` says of a run; None where it stands for a file."""
    found = EPOCH_OF_RUN.fullmatch(parent)
    return ParentEpoch(*found.groups()) if found else None


def begin_run(run: Run, source: dataset.Dataset, parent_sha256: str) -> Run:
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
        _check_same(run, parse_run_settings(storage.read_bytes(config_uri)), origin)
        return run
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(storage.join(run.uri, "lineage.json"), json.dumps(origin, indent=1).encode())
    storage.write_bytes(config_uri, text.encode())
    return run


def adopt_stage(run: Run, other: Run, stage: str) -> None:
    """Gives a run a finished stage of another one, which was trained with the same settings on the same photos."""
    rows = [row for row in other.metrics() if row["stage"] == stage]
    storage.write_bytes(storage.join(run.uri, "metrics.jsonl"), to_json_lines(rows))
    for suffix in (".safetensors", ".json"):  # the latter makes the stage finished
        storage.write_bytes(f"{run.model_uri(stage)}{suffix}", storage.read_bytes(f"{other.model_uri(stage)}{suffix}"))


def find_run(root: str, name: str) -> Run:
    """A run by its name; UserError, naming those that are there, when it isn't."""
    try:
        text = storage.read_bytes(storage.join(run_uri(root, name), "config.yml"))
    except FileNotFoundError as error:
        found = [path for path in storage.list_files(storage.join(root, "experiments")) if path.endswith("/config.yml")]
        known = ", ".join(path.removesuffix("/config.yml") for path in found) or "none: run jobs/train.py"
        raise UserError(f"no run `{name}` in {root}. There: {known}.") from error
    return Run(root, parse_run_settings(text))


def parse_run_settings(text: bytes) -> TrainSettings:
    """A run's config.yml."""
    return TrainSettings.model_validate(yaml.safe_load(text))


def changed_settings(old: TrainSettings, new: TrainSettings) -> list[str]:
    """The settings, by dotted key, that make another run of it."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if key not in MAY_CHANGE_ON_RESUME and before.get(key) != after.get(key)]


def flatten(values: dict[str, Any], prefix: str = "") -> MetricsRow:
    """Nested settings by dotted key."""
    found: MetricsRow = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def changed_origins(run: Run, dataset_digest: str, parent_sha256: str | None) -> list[str]:
    """What a run that has begun comes from and is no longer what it was, in words. None: nobody knows the parent's."""
    was, found = run.lineage(), []
    if was["dataset_digest"] != dataset_digest:
        found.append("the dataset's content")
    if parent_sha256 not in (None, was["parent_sha256"]):
        found.append("the parent's weights")
    return found


def _check_same(run: Run, old: TrainSettings, origin: dict[str, Any]) -> None:
    other = changed_settings(old, run.settings) + changed_origins(
        run, origin["dataset_digest"], origin["parent_sha256"]
    )
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
