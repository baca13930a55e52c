"""Runs on storage: settings, lineage, metrics and models.

<root>/experiments/<name>/config.yml      the run's settings, fully resolved
<root>/experiments/<name>/lineage.json    parent and dataset with their hashes, code, libraries and device
<root>/experiments/<name>/preprocessing.json  all steps from a photo's file to the network's input
<root>/experiments/<name>/metrics.jsonl   a line per epoch
<root>/experiments/<name>/model.json      the run's model: the best epoch over its stages, written when training ends
<root>/experiments/<name>/steps/<stage>/  a file per epoch, a line per step
<root>/experiments/<name>/tensorboard/    metrics and steps as TensorBoard events
<root>/experiments/<name>/<stage>/        checkpoints, the best model of a stage and its calibration.json
<root>/experiments/<name>/refit/          the model of a refit, and the run of its stages
<root>/experiments/<name>/report/         report of the evaluation
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from carclass import storage
from carclass.config.schema import StageName, TrainSettings
from carclass.config.section import EPOCH_OF_RUN, S, validate
from carclass.data import dataset, formats
from carclass.data.lease import find_worker
from carclass.errors import UserError, unknown_name
from carclass.formatting import rate_text
from carclass.runs.environment import code_version

log = logging.getLogger(__name__)
STAGES: tuple[StageName, ...] = ("frozen", "unfrozen")
REFIT = "refit"
"""Name of a refit's model beside those of stages, and of its own run within the run."""
MAY_CHANGE_ON_RESUME = (
    *("num_workers", "use_gpu", "checkpoint_seconds", "keep_checkpoints", "loggers"),
    "unfrozen.micro_batch_size",
)
"""Settings of machines, checkpoints and logging, which may differ when a run is resumed."""
MODEL = "model.json"
MetricsRow = dict[str, Any]


class ParentEpoch(NamedTuple):
    """A run's epoch that another run starts from."""

    run: str
    epoch: str  # `best`, the run's model, or an epoch of its last stage: a number or `last`


@dataclass(frozen=True)
class Run:
    """A run on storage."""

    root: str
    settings: TrainSettings
    folder: str = "experiments"
    """Parent folder of the run below the root."""

    @property
    def uri(self) -> str:
        """Return the URI of the run's folder."""
        return storage.join(self.root, self.folder, self.settings.name)

    @property
    def stages(self) -> list[StageName]:
        """Return the stages of the settings, in order of training."""
        return [stage for stage in STAGES if getattr(self.settings, stage) is not None]

    def model_uri(self, stage: str) -> str:
        """Return the URI of a stage's best model, without suffix: `.safetensors` and `.json` are its files."""
        return storage.join(self.uri, stage, "best")

    def is_finished(self, stage: str) -> bool:
        """Return True if the stage's best model is published."""
        return storage.exists(f"{self.model_uri(stage)}.json")

    @property
    def unfinished_stages(self) -> list[StageName]:
        """Return the stages whose best model is not published or has lost its weights, in order."""
        return [stage for stage in self.stages if not self.has_model(stage)]

    def has_model(self, stage: str) -> bool:
        """Return True if the best model of a stage, or of the refit, is published and has its weights."""
        return self.is_finished(stage) and storage.exists(f"{self.model_uri(stage)}.safetensors")

    def model_facts(self, stage: str) -> dict[str, Any]:
        """Return the facts of a stage's best model, such as its epoch, as publish_model recorded them.

        Raise UserError if the stage is not finished, or other records of the run contradict them, as after one was
        copied from another run.
        """
        uri = f"{self.model_uri(stage)}.json"
        try:
            facts = formats.read(uri, "model")
        except FileNotFoundError as error:
            raise unfinished_stage(self.model_uri(stage)) from error
        model = self.settings.model.model_dump()
        changed = [f"model.{key}" for key, value in facts["model"].items() if model.get(key, value) != value]
        if facts["stage"] != stage or changed:
            name = changed[0] if changed else "stage"
            raise _contradiction(uri, storage.join(self.uri, "config.yml"), f"`{name}`")
        if self._recorded_accuracy(facts) != facts["val_accuracy"]:
            name = f"the val accuracy of {epoch_text(facts)}"
            raise _contradiction(uri, storage.join(self.uri, "metrics.jsonl"), name)
        return facts

    def _recorded_accuracy(self, facts: dict[str, Any]) -> float:
        """Return the val accuracy of a model's epoch in metrics.jsonl; that of its facts if it is not there."""
        try:
            rows = self.metrics()
        except formats.DamagedFileError:  # an error where the curves are read; the model can be used
            return float(facts["val_accuracy"])
        epoch = facts["stage"], facts["epoch"]
        found = (row["val_accuracy"] for row in rows if (row["stage"], row["epoch"]) == epoch)
        return float(next(found, facts["val_accuracy"]))

    def best_val_accuracy(self, stage: str) -> float:
        """Return the val accuracy of a finished stage's best epoch."""
        return float(self.model_facts(stage)["val_accuracy"])

    @property
    def best_stage(self) -> StageName:
        """Return the stage of the run's model, which has the best epoch by val accuracy, the first of equals.

        It is recorded when training ends; for a run without the record it is found from the stages' best models. Raise
        UserError if the last stage is not finished.
        """
        if not self.is_finished(self.stages[-1]):
            raise unfinished_stage(self.model_uri(self.stages[-1]), [s for s in self.stages if self.is_finished(s)])
        uri = storage.join(self.uri, MODEL)
        try:
            record = formats.read(uri, "run_model")
        except FileNotFoundError:
            return find_best_stage(self)
        recorded: StageName = record["stage"]
        if recorded not in self.stages:
            raise formats.damaged("run_model", uri, f"the run has no stage `{recorded}`")
        if self.is_finished(recorded) and self.model_facts(recorded)["sha256"] != record["sha256"]:
            raise formats.damaged("run_model", uri, f"its `sha256` is not that of the model of stage {recorded}")
        return recorded

    @property
    def model_name(self) -> str:
        """Return the stage of the run's model, or REFIT: the name of its files. Raise UserError as best_stage does."""
        return REFIT if self.settings.refit else self.best_stage

    def select_stage(self, stage: str | None) -> str:
        """Return the stage whose best model is to be used, or REFIT: by default that of the run's model, as is logged.

        Raise UserError if the run has no such stage, or as model_facts does.
        """
        if stage is None:
            name = self.model_name
            if name == REFIT:
                log.info("run %s: its model is the refit, on train and val photos", self.settings.name)
            elif len(self.stages) > 1:
                log.info("run %s: its model is of the %s stage, the best on val", self.settings.name, name)
            self.model_facts(name)
            return name
        for known in self.stages:
            if stage == known:
                self.model_facts(known)
                return known
        names = " and ".join(self.stages)
        raise UserError(
            f"`stage`: run `{self.settings.name}` in {self.root} has no stage `{stage}`, only {names}. Name one that "
            "it has, or leave `stage` out for the run's model, its best epoch by val accuracy."
        )

    def stage_suffix(self, stage: str) -> str:
        """Return the ending of the names of results by a stage's model: empty for the run's model."""
        return "" if self.is_finished(self.stages[-1]) and stage == self.model_name else f"-{stage}"

    def lineage(self) -> dict[str, Any]:
        """Return the run's parent and dataset with their hashes, seed, start, code version and environments."""
        uri = storage.join(self.uri, "lineage.json")
        try:
            lineage = formats.read(uri, "lineage")
        except FileNotFoundError as error:
            raise formats.DamagedFileError(f"{uri} is missing. {formats.RUN_REMEDY}") from error
        if not all(isinstance(each, dict) and isinstance(each.get("stage"), str) for each in lineage["environments"]):
            raise formats.damaged("lineage", uri, "`environments` is no list of the stages' environments")
        return lineage

    def metrics(self) -> list[dict[str, Any]]:
        """Return one row per epoch of all stages, oldest first; empty before the first epoch."""
        uri = storage.join(self.uri, "metrics.jsonl")
        try:
            return formats.decode_lines(storage.read_bytes(uri), "metrics", uri)
        except FileNotFoundError:
            return []

    def steps(self, stage: str, epoch: int) -> list[MetricsRow]:
        """Return one row per step of a finished epoch: `step` (from 1), `loss`, `accuracy`, `lr`."""
        uri = storage.join(self.uri, "steps", stage, f"{epoch:04d}.jsonl")
        return formats.decode_lines(storage.read_bytes(uri), "steps", uri)


def find_best_stage(run: Run) -> StageName:
    """Return the finished stage whose best model has the highest val accuracy, the first of equals."""
    stages = [stage for stage in run.stages if run.is_finished(stage)]
    return stages[0] if len(stages) == 1 else max(stages, key=run.best_val_accuracy)


def record_best_stage(run: Run) -> None:
    """Write the record of the model of a finished run."""
    facts = run.model_facts(find_best_stage(run))
    record = {key: facts[key] for key in ("stage", "epoch", "val_accuracy", "sha256")}
    formats.write(storage.join(run.uri, MODEL), "run_model", record)


def model_text(facts: dict[str, Any]) -> str:
    """Return a model's epoch in words: "frozen epoch 12, val accuracy 0.808". facts: see Run.model_facts."""
    return f"{epoch_text(facts)}, val accuracy {rate_text(facts['val_accuracy'])}"


def epoch_text(facts: dict[str, Any]) -> str:
    """Return an epoch with its stage in words: "frozen epoch 12"; of a refit the one that was chosen."""
    if facts["stage"] == REFIT:
        return f"refit on train and val after {epoch_text(facts['chosen'])}"
    return f"{facts['stage']} epoch {facts['epoch']}"


def unfinished_stage(model_uri: str, finished: Sequence[str] = ()) -> UserError:
    """Return the error of a model that is not published yet. finished: stages of the run whose models are."""
    run, worker = model_uri.rsplit("/", 2)[0], find_worker(model_uri.rsplit("/", 2)[0])
    remedy = "Run `python jobs/train.py --config FILE` with the run's file, which resumes it."
    if worker is not None:
        remedy = f"It is in training: {worker} is at work on {run}. Run the same command again when it has ended."
    earlier = "".join(f" Or use the stage that is finished: --stage {stage}." for stage in finished)
    return UserError(f"no model at {model_uri}.safetensors: the run has not finished this stage. {remedy}{earlier}")


def _contradiction(uri: str, other_uri: str, name: str) -> formats.DamagedFileError:
    return formats.DamagedFileError(
        f"{uri} and {other_uri} contradict each other ({name}): one of them was edited, or copied from another run. "
        "Restore it from a backup; without metrics.jsonl, a run has no training curves."
    )


def best_epoch_row(rows: Sequence[MetricsRow]) -> MetricsRow | None:
    """Return the row with the highest finite val accuracy, the earliest of equals; None if there is none."""
    finite = [row for row in rows if math.isfinite(row["val_accuracy"])]
    return max(finite, key=lambda row: row["val_accuracy"], default=None)


def run_uri(root: str, name: str) -> str:
    """Return the URI of a run's folder."""
    return storage.join(root, "experiments", name)


def parse_parent(parent: str) -> ParentEpoch | None:
    """Parse `train.parent` as `<run>@<epoch>`; return None if it names a weights file."""
    match = EPOCH_OF_RUN.fullmatch(parent)
    return ParentEpoch(*match.groups()) if match else None


def begin_run(run: Run, source: dataset.Dataset, parent_sha256: str) -> Run:
    """Write a run's config and lineage, if it is new. Raise UserError if it exists with other settings or data."""
    settings = run.settings
    lineage = {
        "parent": settings.parent,
        "parent_sha256": parent_sha256,
        "dataset": settings.dataset,
        "dataset_digest": source.digest,
        "seed": settings.seed,
        "code": code_version(),
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environments": [],  # of the stages, see environment.record_environment
    }
    config_uri = storage.join(run.uri, "config.yml")
    if storage.exists(config_uri):
        old = read_run_settings(run.uri)
        changed = changed_inputs(run, source.digest, parent_sha256)
        _refuse_changes(run, old, [*refused_settings(old, settings), *changed])
        if settings.refit and not old.refit:
            formats.write(config_uri, "run_config", settings.model_dump(mode="json"))
        return run
    _refuse_results_without_config(run)
    formats.write(storage.join(run.uri, "lineage.json"), "lineage", lineage)
    formats.write(config_uri, "run_config", settings.model_dump(mode="json"))
    return run


def copy_stage(run: Run, other: Run, stage: str) -> None:
    """Copy a finished stage of another run, trained with the same settings on the same photos."""
    rows = [row for row in other.metrics() if row["stage"] == stage]
    storage.write_bytes(storage.join(run.uri, "metrics.jsonl"), formats.encode_lines("metrics", rows))
    environments = [each for each in other.lineage()["environments"] if each["stage"] == stage]
    formats.write(storage.join(run.uri, "lineage.json"), "lineage", {**run.lineage(), "environments": environments})
    for suffix in (".safetensors", ".json"):  # the .json last: it marks the stage as finished
        storage.write_bytes(f"{run.model_uri(stage)}{suffix}", storage.read_bytes(f"{other.model_uri(stage)}{suffix}"))


def find_run(root: str, name: str) -> Run:
    """Return a run by its name. Raise UserError, which lists the existing runs, if there is none."""
    try:
        settings = read_run_settings(run_uri(root, name))
        return Run(root, settings.model_copy(update={"name": name}))  # a copied folder has another run's name in it
    except FileNotFoundError as error:
        existing = storage.list_folders(storage.join(root, "experiments"), "config.yml")
        hint = "" if existing else dataset.first_step(root, "python jobs/train.py --config FILE")
        raise unknown_name("run", name, existing, root, hint) from error


def read_run_settings(uri: str) -> TrainSettings:
    """Return the settings in a run's config.yml. Raise FileNotFoundError if there is none. uri: of the run."""
    config_uri = storage.join(uri, "config.yml")
    values = formats.read(config_uri, "run_config")
    values.pop("format", None)
    return stored_settings(values, TrainSettings, config_uri)


def stored_settings(values: dict[str, Any], kind: type[S], source: str) -> S:
    """Return settings that were stored whole: a default of today is not taken for one that is missing.

    source: file, for messages. Raise UserError for settings that this version lacks, or that the file lacks.
    """
    way_out = "It was written by another version of carclass: use that one, or move the folder away and train again."
    try:
        settings = validate(values, kind, source=source, base=Path("/"))
    except UserError as error:
        raise UserError(f"{error}. {way_out}") from error
    stored = flatten(values)
    if missing := [key for key in flatten(settings.model_dump(mode="json")) if key not in stored]:
        raise UserError(f"{source} lacks the setting `{missing[0]}`, which its format has. {way_out}")
    return settings


def changed_settings(old: TrainSettings, new: TrainSettings) -> list[str]:
    """Return the dotted keys of differing settings, without those that may differ when a run is resumed."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if key not in MAY_CHANGE_ON_RESUME and before.get(key) != after.get(key)]


def refused_settings(old: TrainSettings, new: TrainSettings) -> list[str]:
    """Return the keys of changed_settings, without that of a refit, which follows what is finished."""
    return [key for key in changed_settings(old, new) if key != "refit" or not new.refit]


def flatten(values: dict[str, Any], prefix: str = "") -> MetricsRow:
    """Return nested settings by dotted key."""
    flat: MetricsRow = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changed_inputs(run: Run, dataset_digest: str, parent_sha256: str | None) -> list[str]:
    """Describe the inputs of a run that have changed since it began. parent_sha256: None if it is unknown."""
    recorded, changed = run.lineage(), []
    if recorded["dataset_digest"] != dataset_digest:
        changed.append("the dataset's content")
    if parent_sha256 not in (None, recorded["parent_sha256"]):
        changed.append("the parent's weights")
    return changed


def check_same_settings(run: Run) -> None:
    """Raise UserError if the run exists with other settings, as `begin_run` does."""
    if storage.exists(storage.join(run.uri, "config.yml")):
        old = read_run_settings(run.uri)
        _refuse_changes(run, old, refused_settings(old, run.settings))


def _refuse_results_without_config(run: Run) -> None:
    """Raise UserError if a run without config.yml has results, of which no one knows the settings and the data."""
    places = ("metrics.jsonl", "model.json", "frozen/", "unfrozen/", "refit/")
    if found := [path for path in storage.list_files(run.uri) if path.startswith(places)]:
        raise UserError(
            f"{run.uri} has no config.yml, but results of a run with unknown settings ({found[0]}). Restore the file; "
            "or delete the folder to train the run anew, or choose another `train.name`."
        )


def _refuse_changes(run: Run, old: TrainSettings, changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"run `{run.settings.name}` in {run.root} was begun with other settings ({', '.join(changed)}). "
            f"Give this one another `train.name`, or delete {run.uri}.{_continuation_hint(run, old, changed)}"
        )


def _continuation_hint(run: Run, old: TrainSettings, changed: list[str]) -> str:
    """Return the way to train a finished run further, if it was given more epochs; "" for other changes."""
    stage = run.stages[-1]
    if changed != [f"{stage}.epochs"] or run.unfinished_stages:
        return ""
    more = getattr(run.settings, stage).epochs - getattr(old, stage).epochs
    if more < 0:
        return ""
    others = "".join(f", `train.{other}: null`" for other in STAGES if other != stage)
    return (
        f" To train it for {more} more epochs, start another run from its last one, with a learning rate and schedule "
        f"of its own: `train.parent: {run.settings.name}@last`{others}, `train.{stage}.epochs: {more}`."
    )
