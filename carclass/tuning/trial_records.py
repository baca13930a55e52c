"""A sweep's trials on storage: which settings were tried, and how each ended.

<root>/sweeps/<name>/search.yml        the sweep's settings and its experiment's, fully resolved
<root>/sweeps/<name>/trials.json       a record per trial, written whole at each change
<root>/sweeps/<name>/trials/<trial>/   the trial's run, as below experiments/
<root>/sweeps/<name>/tune/             Ray Tune's own state
<root>/sweeps/<name>/trials.parquet    all of it in a table
<root>/sweeps/<name>/analysis.html     all of it to look at
<root>/sweeps/<name>/best.yml          the best settings, to train with
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.config.section import Section
from carclass.errors import UserError
from carclass.formatting import Value
from carclass.runs.run import MAY_CHANGE_ON_RESUME, Run
from carclass.tuning.search_space import Search, Space, describe, make_space

State = Literal["begun", "complete", "pruned", "failed"]
MAX_NAME = 100
"""Characters of a trial's settings in the name of its run."""
MAY_CHANGE = {"experiment", "fixed", "root", "max_concurrent_trials", "devices_per_worker", "num_seeds"}
"""Of a search, when a sweep goes on: what its trials run on, and what shows in the resolved settings anyway."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is recorded of a trial."""

    number: int
    """0 is the experiment as it stands."""
    values: dict[str, Value]
    """By dotted key, what this trial has of each setting that varies."""
    seed: int
    """Of training."""
    repeats: int | None = None
    """The number of the trial whose settings it has with another seed."""
    device: str = "CPU"
    """What it is trained on: GPU or CPU."""
    devices: float = 1.0
    """How many of them."""
    state: State = "begun"
    reason: str | None = None
    """Of a failure, in a line."""

    @property
    def title(self) -> str:
        """What people call it: 'lr=3e-4 rotation=.2'."""
        return describe(self.values) + (f" seed={self.seed}" if self.repeats is not None else "")

    @property
    def name(self) -> str:
        """The name of its run: '007_lr=3e-4_rotation=.2'."""
        words = describe(self.values).replace(" ", "_")[:MAX_NAME]
        seed = "" if self.repeats is None else f"_seed={self.seed}"
        return re.sub(r"[^A-Za-z0-9._=]+", "-", f"{self.number:03d}_{words}{seed}")

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state != "begun"


class TrialRecords:
    """The records of a sweep, by number."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.join(uri, "trials.json")
        self.found: dict[int, Trial] = {}
        self.reload()

    def reload(self) -> "TrialRecords":
        """Reads the records as they are on storage."""
        try:
            rows: list[dict[str, Any]] = json.loads(storage.read_bytes(self.uri))
        except FileNotFoundError:
            rows = []
        self.found = {row["number"]: Trial(**row) for row in rows}
        return self

    def left(self, numbers: Iterable[int]) -> list[int]:
        """Those of the numbers whose trials aren't over."""
        return [number for number in numbers if number not in self.found or not self.found[number].is_over]

    def put(self, trial: Trial) -> None:
        """Records a trial in its present state."""
        self.found[trial.number] = trial
        rows = [asdict(self.found[number]) for number in sorted(self.found)]
        storage.write_bytes(self.uri, json.dumps(rows, indent=1).encode())


def sweep_uri(root: str, name: str) -> str:
    """Where a sweep lies."""
    return storage.join(root, "sweeps", name)


def trial_run(space: Space, trial: Trial) -> Run:
    """The run of a trial. UserError when its settings don't go together."""
    settings = space.settings(trial.values, trial.name, trial.seed)
    return Run(space.root, settings, f"sweeps/{space.search.name}/trials")


def told_settings(space: Space, trial: Trial) -> dict[int, float]:
    """val accuracy by epoch of the stage that counts, as far as a trial got."""
    rows = trial_run(space, trial).metrics()
    return {row["epoch"]: row["val_accuracy"] for row in rows if row["stage"] == space.stage}


def find_records(space: Space, *, resume: bool) -> TrialRecords:
    """A sweep's trials, none before it has begun; UserError when its name was used for another search.

    resume: it must have begun.
    """
    uri, name = sweep_uri(space.root, space.search.name), space.search.name
    if storage.exists(storage.join(uri, "search.yml")):
        kept, _ = load_records(space.root, name)
        other = sorted(_differing(kept.search, space.search) - MAY_CHANGE)
        other += sorted(f"train.{key}" for key in _differing(kept.base, space.base) - {*MAY_CHANGE_ON_RESUME})
        if other:
            raise UserError(
                f"sweep `{name}` in {space.root} was begun with other settings ({', '.join(other)}). "
                f"Give this one another `name`, or delete {uri}."
            )
    elif resume:
        raise _missing(space.root, name)
    return TrialRecords(uri)


def begin_records(space: Space) -> None:
    """Writes down what a sweep asks for."""
    # Defaults are left out: one that has no effect is fine, but not when it is written.
    search, train = space.search.model_dump(mode="json", exclude_unset=True), space.base.model_dump(mode="json")
    text = yaml.safe_dump({"search": search, "train": train}, sort_keys=False)
    storage.write_bytes(storage.join(sweep_uri(space.root, space.search.name), "search.yml"), text.encode())


def load_records(root: str, name: str) -> tuple[Space, TrialRecords]:
    """A sweep by its name; UserError, naming those that are there, when it isn't."""
    uri = sweep_uri(root, name)
    try:
        kept = yaml.safe_load(storage.read_bytes(storage.join(uri, "search.yml")))
    except FileNotFoundError as error:
        raise _missing(root, name) from error
    search, base = Search.model_validate(kept["search"]), TrainSettings.model_validate(kept["train"])
    return make_space(search, base, root, uri, Path.cwd()), TrialRecords(uri)


def _differing(old: Section, new: Section) -> set[str]:
    return {key for key in type(old).model_fields if getattr(old, key) != getattr(new, key)}


def _missing(root: str, name: str) -> UserError:
    found = [path for path in storage.list_files(storage.join(root, "sweeps")) if path.endswith("/search.yml")]
    known = ", ".join(path.removesuffix("/search.yml") for path in found) or "none"
    return UserError(f"no sweep `{name}` in {root}. There: {known}. Leave --resume and --analyse out to begin one.")
