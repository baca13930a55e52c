"""A tree of experiments: which run starts from which epoch of which other one, on which dataset.

A budget file says which experiment files make the tree, on what data they are trained, and how long. Everything here
is read from files, before anything is trained.
"""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from carclass.config import yaml_file
from carclass.config.schema import Config, IngestSettings, MaskSettings, TrainSettings, with_changes
from carclass.config.section import Section, Sha256, Share, Uri, validate
from carclass.errors import UserError
from carclass.runs.run import STAGES, ParentEpoch, parse_parent


class Figures(Section):
    """What another system reached with an experiment."""

    val: Share | None = None
    test: Share | None = None


class Baseline(Section):
    """What experiments are compared with."""

    name: str
    """In words."""
    figures: dict[str, Figures]
    """By experiment."""


class Budget(Section):
    """Which experiments, on what data, how long."""

    root: Uri
    """Folder or s3:// prefix for datasets and experiments; the experiment files' own is not used."""
    experiments: Uri
    """Experiment files: a pattern of paths."""
    ingest: IngestSettings | None = None
    """Makes the photos' dataset where it isn't there; by default it must be."""
    masks: tuple[MaskSettings, ...] = ()
    """Make datasets from it, in this order."""
    imagenet: Uri = "imagenet"
    """What `parent: imagenet` stands for: as `train.parent`."""
    imagenet_sha256: Sha256 | None = None
    """As `train.parent_sha256`."""
    fixed: dict[str, Any] = Field({})
    """Changes to all experiments, by dotted key: `train.model.image_size`."""
    max_epochs: int | None = Field(None, ge=1)
    """Upper limit of each stage; epochs that other runs start from are reached all the same."""
    devices_per_worker: float = Field(1.0, gt=0)
    """GPUs, or without them CPUs, of each training process; with 0.25, four share a GPU."""
    baseline: Uri | None = None
    """YAML file of another system's figures, to compare with."""

    @model_validator(mode="after")
    def _some_source(self) -> "Budget":
        if self.masks and any(mask.preview is not None for mask in self.masks):
            raise ValueError("`masks.preview` only looks and publishes nothing to train on; leave it out")
        if self.imagenet == "imagenet" and self.imagenet_sha256 is not None:
            raise ValueError("`imagenet_sha256` has no effect with `imagenet: imagenet`, whose hash is known")
        return self


@dataclass(frozen=True)
class Experiment:
    """An experiment file, as its budget has it run."""

    file: str
    settings: TrainSettings

    @property
    def name(self) -> str:
        """Of its run."""
        return self.settings.name

    @property
    def start(self) -> ParentEpoch | None:
        """Where it starts, if from another run."""
        return parse_parent(self.settings.parent)


@dataclass(frozen=True)
class Tree:
    """All experiments of a budget, parents before children."""

    budget: Budget
    experiments: list[Experiment]

    def __getitem__(self, name: str) -> Experiment:
        """UserError, naming those that are there, when it isn't."""
        for one in self.experiments:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in self.experiments)
        raise UserError(f"no experiment `{name}` in {self.budget.experiments}. There: {known}.")

    def parent(self, one: Experiment) -> Experiment | None:
        """The experiment of this tree from which one starts."""
        return next((other for other in self.experiments if one.start and other.name == one.start.run), None)

    def origin(self, one: Experiment) -> str:
        """What an experiment starts from, in a word: `imagenet` whatever that stands for, a file, a run's epoch."""
        parent = one.settings.parent
        return "imagenet" if parent == self.budget.imagenet else parent.rsplit("/", 1)[-1]

    def children(self, of: Experiment | None) -> list[Experiment]:
        """Those that start from an experiment; None: from none of this tree."""
        return [one for one in self.experiments if self.parent(one) is of]

    def with_parents(self, names: Sequence[str]) -> list[Experiment]:
        """Experiments and all that they come from, parents first. UserError for unknown names."""
        wanted: set[str] = set()
        for name in names:
            one: Experiment | None = self[name]
            while one is not None:
                wanted.add(one.name)
                one = self.parent(one)
        return [one for one in self.experiments if one.name in wanted]

    def draw(self, told: Callable[[Experiment], str]) -> str:
        """The tree as text, a line per experiment. told: what to say after each one's name."""
        lines: list[str] = []

        def add(one: Experiment, indent: str, branch: str, below: str) -> None:
            lines.append(f"{indent}{branch}{one.name}: {told(one)}".rstrip())
            following = self.children(one)
            for child in following:
                last = child is following[-1]
                add(child, indent + below, "└── " if last else "├── ", "    " if last else "│   ")

        for one in self.children(None):
            add(one, "", "", "")
        return "\n".join(lines)


def load_tree(file: Path, overrides: dict[str, str]) -> Tree:
    """The tree of a budget file. UserError for what can't be trained: wrong settings, cycles, missing parents."""
    values: dict[str, Any] = yaml_file.read(file)
    for key, value in overrides.items():
        yaml_file.set_key(values, key, value)
    budget = validate(values, Budget, source=file, base=_folder(file))
    paths = sorted(glob.glob(budget.experiments))
    if not paths:
        raise UserError(f"{file}: `experiments`: no files {budget.experiments}. Correct the pattern.")
    found = [_experiment(path, budget, file) for path in paths]
    for one in found:
        if twin := next((other for other in found if other.name == one.name and other is not one), None):
            raise UserError(f"{one.file} and {twin.file} both have `train.name: {one.name}`. Give one another name.")
    tree = Tree(budget, _ordered(found))
    for one in tree.experiments:
        _check_start(one, tree.parent(one))
    return tree


def baseline(budget: Budget) -> Baseline | None:
    """What the budget's experiments are compared with."""
    if budget.baseline is None:
        return None
    values = yaml_file.read(budget.baseline)
    return validate(values, Baseline, source=budget.baseline, base=_folder(budget.baseline))


def _folder(file: str | Path) -> Path:
    return Path(os.path.abspath(file)).parent


def _experiment(path: str, budget: Budget, source: Path) -> Experiment:
    settings = validate(yaml_file.read(path), Config, source=path, base=_folder(path)).train
    if settings is None:
        raise UserError(f"{path} has no `train:` section, which an experiment needs. Add one, or move the file away.")
    changes = dict(budget.fixed)
    if settings.parent == "imagenet":
        changes |= {"train.parent": budget.imagenet, "train.parent_sha256": budget.imagenet_sha256}
    for stage in STAGES:
        kept = getattr(settings, stage)
        if kept is not None and budget.max_epochs is not None:
            changes[f"train.{stage}.epochs"] = min(kept.epochs, max(budget.max_epochs, *kept.keep_epochs, 1))
    wrong = [key for key in changes if not key.startswith("train.") or key == "train.name"]
    if wrong:
        raise UserError(f"{source}: `fixed.{wrong[0]}`: it changes experiments, by keys such as `train.seed`.")
    return Experiment(
        path, with_changes(settings, changes, source=f"{source}: `fixed` in {path}", base=_folder(source))
    )


def _ordered(found: list[Experiment]) -> list[Experiment]:
    """Parents before children, otherwise in the order of their files."""
    by_name = {one.name: one for one in found}
    graph = {one.name: [one.start.run] if one.start and one.start.run in by_name else [] for one in found}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise UserError(
            f"`train.parent` goes round in a circle: {circle}. Start one of them from `imagenet`."
        ) from error
    ordered: dict[str, Experiment] = {}

    def add(one: Experiment) -> None:
        for parent in graph[one.name]:
            add(by_name[parent])
        ordered.setdefault(one.name, one)

    for one in found:
        add(one)
    return list(ordered.values())


def _check_start(one: Experiment, parent: Experiment | None) -> None:
    """UserError when a run can't start from the epoch that it names; a parent outside the tree is looked at later."""
    if one.start is None or parent is None:
        return
    for key in ("architecture", "stride_in_1x1"):
        ours, theirs = getattr(one.settings.model, key), getattr(parent.settings.model, key)
        if ours != theirs:
            raise UserError(
                f"{one.file}: `train.model.{key}` is {ours}, and `train.parent` {one.settings.parent} has {theirs}. "
                "Give both the same."
            )
    name = "frozen" if parent.settings.unfrozen is None else "unfrozen"
    stage = getattr(parent.settings, name)
    if one.start.epoch.isdecimal() and int(one.start.epoch) not in stage.keep_epochs:
        raise UserError(
            f"{one.file}: `train.parent`: {one.settings.parent} will not be kept. Add {one.start.epoch} to "
            f"`train.{name}.keep_epochs` in {parent.file} (now {[*stage.keep_epochs]}), or say @best or @last."
        )
