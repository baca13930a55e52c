"""Records of a sweep's trials on storage: their settings and states.

<root>/sweeps/<name>/search.yml        settings of the sweep and of its experiment, fully resolved
<root>/sweeps/<name>/trials.json       a record per trial, rewritten at each change
<root>/sweeps/<name>/trials/<trial>/   the trial's run, laid out as below experiments/
<root>/sweeps/<name>/tune/             Ray Tune's own state
<root>/sweeps/<name>/trials.parquet    table of trials
<root>/sweeps/<name>/analysis.html     report
<root>/sweeps/<name>/best.yml          experiment file with the best settings
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.config.search import Search
from carclass.config.section import Section, validate
from carclass.data import formats
from carclass.errors import UserError, unknown_name
from carclass.formatting import Value
from carclass.runs.run import Run, changed_settings, stored_settings
from carclass.tuning.search_space import SearchSpace, make_space, settings_text

State = Literal["begun", "complete", "pruned", "failed", "lost"]
"""`lost`: complete or pruned, but without its metrics. Found when results are read, never recorded."""
MAX_NAME = 100
"""Largest number of characters of a trial's settings in the name of its run."""
MAY_CHANGE = {"experiment", "fixed", "root", "max_concurrent_trials", "devices_per_worker", "num_seeds"}
"""Search settings that may differ when a sweep is resumed: those of machines, and those compared by `train` anyway."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Record of a trial."""

    number: int
    """0 is the unchanged experiment."""
    values: dict[str, Value]
    """Values of the varied settings, by dotted key."""
    seed: int
    """Seed of training."""
    repeats: int | None = None
    """Number of the trial with the same settings that this one repeats with another seed."""
    device: str = "CPU"
    """`GPU` or `CPU`."""
    devices: float = 1.0
    """Number of GPUs or CPUs."""
    state: State = "begun"
    reason: str | None = None
    """Cause of a failure, in one line."""

    @property
    def title(self) -> str:
        """Return the settings in one line: "lr=3e-4 rotation=.2"."""
        return settings_text(self.values) + (f" seed={self.seed}" if self.repeats is not None else "")

    @property
    def name(self) -> str:
        """Return the name of the trial's run: "007_lr=3e-4_rotation=.2"."""
        words = settings_text(self.values).replace(" ", "_")[:MAX_NAME]
        seed = "" if self.repeats is None else f"_seed={self.seed}"
        return re.sub(r"[^A-Za-z0-9._=]+", "-", f"{self.number:03d}_{words}{seed}")

    @property
    def is_over(self) -> bool:
        """Return True if the trial is complete, pruned or failed."""
        return self.state != "begun"


class TrialRecords:
    """Records of a sweep's trials, by number."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.join(uri, "trials.json")
        self.trials: dict[int, Trial] = {}
        self.reload()

    def reload(self) -> "TrialRecords":
        """Read the records from storage."""
        try:
            rows = formats.read(self.uri, "trials")["trials"]
        except FileNotFoundError:
            rows = []
        trials = [formats.build(Trial, row, "trials", self.uri) for row in rows]
        self.trials = {trial.number: trial for trial in trials}
        return self

    def unfinished(self, numbers: Iterable[int]) -> list[int]:
        """Return the numbers whose trials are not over."""
        return [number for number in numbers if number not in self.trials or not self.trials[number].is_over]

    def searched(self, num_trials: int) -> list[int]:
        """Return the numbers of trial 0 and of num_trials sampled trials: the recorded ones first, then new ones.

        Repeats with other seeds have numbers too, so those of a search that has grown are not consecutive.
        """
        recorded = sorted(number for number, trial in self.trials.items() if trial.repeats is None)
        first_new = max(self.trials, default=-1) + 1
        return [*recorded, *range(first_new, first_new + num_trials + 1 - len(recorded))]

    def put(self, trial: Trial) -> None:
        """Write a trial's record."""
        self.trials[trial.number] = trial
        rows = [asdict(self.trials[number]) for number in sorted(self.trials)]
        formats.write(self.uri, "trials", {"trials": rows})


def sweep_uri(root: str, name: str) -> str:
    """Return the URI of a sweep's folder."""
    return storage.join(root, "sweeps", name)


def trial_run(space: SearchSpace, trial: Trial) -> Run:
    """Return the run of a trial. Raise UserError if its settings are inconsistent."""
    settings = space.trial_settings(trial.values, trial.name, trial.seed)
    return Run(space.root, settings, f"sweeps/{space.search.name}/trials")


def is_begun(space: SearchSpace, trial: Trial) -> bool:
    """Return True if the run of a trial exists; a user may delete it to have it trained again."""
    return storage.exists(storage.join(trial_run(space, trial).uri, "config.yml"))


def recorded_accuracies(space: SearchSpace, trial: Trial) -> dict[int, float]:
    """Return the val accuracy of each trained epoch of a trial's last stage."""
    rows = trial_run(space, trial).metrics()
    return {row["epoch"]: row["val_accuracy"] for row in rows if row["stage"] == space.stage}


def find_records(space: SearchSpace, *, resume: bool) -> TrialRecords:
    """Return the records of a sweep, empty for a new one.

    Raise UserError if the name belongs to another search or one with unknown settings, or, with resume, if there is no
    such sweep.
    """
    uri, name = sweep_uri(space.root, space.search.name), space.search.name
    records = TrialRecords(uri)
    if storage.exists(storage.join(uri, "search.yml")):
        recorded, _ = load_records(space.root, name)
        changed = sorted(_changed_fields(recorded.search, space.search) - MAY_CHANGE)
        if recorded.search.num_trials < space.search.num_trials:
            changed.remove("num_trials")  # a search may grow
        changed += [f"train.{key}" for key in changed_settings(recorded.base_settings, space.base_settings)]
        if changed:
            raise UserError(
                f"sweep `{name}` in {space.root} was begun with other settings ({', '.join(changed)}). "
                f"Give this one another `name`, or delete {uri}."
            )
    elif records.trials:
        raise UserError(
            f"{uri} has no search.yml, but trials of a search with unknown settings. Restore the file; or delete the "
            "folder, or give this one another `name`."
        )
    elif resume:
        raise _unknown_sweep(space.root, name)
    return records


def begin_records(space: SearchSpace) -> None:
    """Write the settings of a sweep to search.yml."""
    # Defaults are left out: Search refuses a setting that has no effect if it is given explicitly.
    search = space.search.model_dump(mode="json", exclude_unset=True)
    train = space.base_settings.model_dump(mode="json")
    uri = storage.join(sweep_uri(space.root, space.search.name), "search.yml")
    formats.write(uri, "search", {"search": search, "train": train})


def load_records(root: str, name: str) -> tuple[SearchSpace, TrialRecords]:
    """Return a sweep by its name. Raise UserError, which lists the existing sweeps, if there is none."""
    uri = sweep_uri(root, name)
    file = storage.join(uri, "search.yml")
    try:
        values = formats.read(file, "search")
    except FileNotFoundError as error:
        raise _unknown_sweep(root, name) from error
    search = validate(values["search"], Search, source=f"{file}: `search`", base=Path("/"))
    base_settings = stored_settings(values["train"], TrainSettings, f"{file}: `train`")
    return make_space(search, base_settings, root, uri, Path.cwd()), TrialRecords(uri)


def _changed_fields(old: Section, new: Section) -> set[str]:
    return {key for key in type(old).model_fields if getattr(old, key) != getattr(new, key)}


def _unknown_sweep(root: str, name: str) -> UserError:
    existing = storage.list_folders(storage.join(root, "sweeps"), "search.yml")
    return unknown_name("sweep", name, existing, root, "Omit --resume and --analyse to start one.")
