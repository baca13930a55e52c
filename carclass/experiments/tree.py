"""Trees of experiments: each experiment starts from pretrained weights or from an epoch of another one.

A budget file lists the experiment files, the datasets and the length of training. A tree is read and checked before
anything is trained.
"""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from carclass.config import yaml_file
from carclass.config.budget import Baseline, Budget
from carclass.config.schema import Config, TrainSettings, with_changes
from carclass.config.section import CommandLineText, validate
from carclass.errors import UserError, unknown_name
from carclass.runs.run import STAGES, ParentEpoch, parse_parent


@dataclass(frozen=True)
class Experiment:
    """An experiment file with its settings, changed by the budget."""

    file: str
    settings: TrainSettings

    @property
    def name(self) -> str:
        """Return the name of the experiment and of its run."""
        return self.settings.name

    @property
    def parent_epoch(self) -> ParentEpoch | None:
        """Return the epoch of another run that it starts from; None if it starts from a weights file."""
        return parse_parent(self.settings.parent)


@dataclass(frozen=True)
class Tree:
    """All experiments of a budget, parents before children."""

    budget: Budget
    experiments: list[Experiment]

    def __getitem__(self, name: str) -> Experiment:
        """Return an experiment by its name. Raise UserError, which lists the names, if there is none."""
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        raise unknown_name("experiment", name, [each.name for each in self.experiments], self.budget.experiments)

    def parent(self, experiment: Experiment) -> Experiment | None:
        """Return the experiment of this tree that another starts from."""
        start = experiment.parent_epoch
        return next((other for other in self.experiments if start and other.name == start.run), None)

    def parent_label(self, experiment: Experiment) -> str:
        """Return a short name of an experiment's parent: `imagenet`, a file name, or `exp_002@12`."""
        parent = experiment.settings.parent
        return "imagenet" if parent == self.budget.imagenet else parent.rsplit("/", 1)[-1]

    def children(self, parent: Experiment | None) -> list[Experiment]:
        """Return the experiments that start from a parent, or, for None, from no experiment of this tree."""
        return [experiment for experiment in self.experiments if self.parent(experiment) is parent]

    def with_parents(self, names: Sequence[str]) -> list[Experiment]:
        """Return experiments with all of their ancestors, parents first. Raise UserError for unknown names."""
        included: set[str] = set()
        for name in names:
            experiment: Experiment | None = self[name]
            while experiment is not None:
                included.add(experiment.name)
                experiment = self.parent(experiment)
        return [experiment for experiment in self.experiments if experiment.name in included]

    def draw(self, describe: Callable[[Experiment], str]) -> str:
        """Return the tree as text, a line per experiment. describe: text after the name."""
        lines: list[str] = []

        def add(experiment: Experiment, indent: str, branch: str, below: str) -> None:
            lines.append(f"{indent}{branch}{experiment.name}: {describe(experiment)}".rstrip())
            children = self.children(experiment)
            for child in children:
                is_last = child is children[-1]
                add(child, indent + below, "└── " if is_last else "├── ", "    " if is_last else "│   ")

        for experiment in self.children(None):
            add(experiment, "", "", "")
        return "\n".join(lines)


def load_tree(file: Path, overrides: dict[str, str]) -> Tree:
    """Return the tree of a budget file. overrides: dotted key → text of the command line.

    Raise UserError for wrong settings, cycles and unknown parents.
    """
    values: dict[str, Any] = yaml_file.read(file)
    for key, value in overrides.items():
        yaml_file.set_key(values, key, CommandLineText(value))
    options = {key: f"--{key}" for key in overrides}
    budget = validate(values, Budget, source=file, base=_folder(file), options=options)
    paths = sorted(glob.glob(budget.experiments))
    if not paths:
        raise UserError(f"{file}: `experiments`: no files match {budget.experiments}. Correct the pattern.")
    experiments = [_load_experiment(path, budget, file) for path in paths]
    by_name: dict[str, Experiment] = {}
    for experiment in experiments:
        twin = by_name.setdefault(experiment.name, experiment)
        if twin is not experiment:
            raise UserError(
                f"{twin.file} and {experiment.file} both have `train.name: {twin.name}`. Rename one of them."
            )
    tree = Tree(budget, _sort_by_parents(experiments))
    for experiment in tree.experiments:
        _check_parent_epoch(experiment, tree.parent(experiment))
    return tree


def load_baseline(budget: Budget) -> Baseline | None:
    """Return the accuracies of the budget's baseline, if it has one."""
    if budget.baseline is None:
        return None
    values = yaml_file.read(budget.baseline)
    return validate(values, Baseline, source=budget.baseline, base=_folder(budget.baseline))


def _folder(file: str | Path) -> Path:
    return Path(os.path.abspath(file)).parent


def _load_experiment(path: str, budget: Budget, source: Path) -> Experiment:
    settings = validate(yaml_file.read(path), Config, source=path, base=_folder(path)).train
    if settings is None:
        raise UserError(f"{path} has no `train:` section. Add one, or move the file away.")
    changes = dict(budget.fixed)
    if settings.parent == "imagenet":
        changes |= {"train.parent": budget.imagenet, "train.parent_sha256": budget.imagenet_sha256}
    for name in STAGES:
        stage = getattr(settings, name)
        if stage is not None and budget.max_epochs is not None:
            changes[f"train.{name}.epochs"] = min(stage.epochs, max(budget.max_epochs, *stage.keep_epochs, 1))
    wrong = [key for key in changes if not key.startswith("train.") or key == "train.name"]
    if wrong:
        raise UserError(f"{source}: `fixed.{wrong[0]}`: only keys of training, such as `train.seed`, can be fixed.")
    return Experiment(
        path, with_changes(settings, changes, source=f"{source}: `fixed` in {path}", base=_folder(source))
    )


def _sort_by_parents(experiments: list[Experiment]) -> list[Experiment]:
    """Return parents before children, otherwise in the order of the files. Raise UserError for a cycle."""
    by_name = {experiment.name: experiment for experiment in experiments}
    starts = {experiment.name: experiment.parent_epoch for experiment in experiments}
    graph = {name: [start.run] if start and start.run in by_name else [] for name, start in starts.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = " → ".join(reversed(error.args[1]))
        raise UserError(f"`train.parent` forms a cycle: {cycle}. Start one of them from `imagenet`.") from error
    ordered: dict[str, Experiment] = {}

    def add(experiment: Experiment) -> None:
        for parent in graph[experiment.name]:
            add(by_name[parent])
        ordered.setdefault(experiment.name, experiment)

    for experiment in experiments:
        add(experiment)
    return list(ordered.values())


def _check_parent_epoch(experiment: Experiment, parent: Experiment | None) -> None:
    """Raise UserError if an experiment can't start from its parent's epoch. parent: None if outside of the tree."""
    start = experiment.parent_epoch
    if start is None or parent is None:
        return
    for key in ("architecture", "stride_in_1x1"):
        value, parent_value = getattr(experiment.settings.model, key), getattr(parent.settings.model, key)
        if value != parent_value:
            raise UserError(
                f"{experiment.file}: `train.model.{key}` is {value}, but {parent_value} in its parent "
                f"{experiment.settings.parent}. Give both the same value."
            )
    name = "frozen" if parent.settings.unfrozen is None else "unfrozen"
    stage = getattr(parent.settings, name)
    if start.epoch.isdecimal() and int(start.epoch) not in stage.keep_epochs:
        raise UserError(
            f"{experiment.file}: `train.parent`: {experiment.settings.parent} will not be kept. Add {start.epoch} to "
            f"`train.{name}.keep_epochs` in {parent.file} (now {[*stage.keep_epochs]}), or use @best or @last."
        )
