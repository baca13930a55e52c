"""Pairs of runs compared on their common test photos, and groups of runs that differ in the treatment of
photos alone: masked, cropped or as they are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from carclass.experiments.results import TREATMENTS, ComparedRun, Comparison
from carclass.experiments.significance import AccuracyDifference, compare


class Pair(NamedTuple):
    """Two runs and their difference in test accuracy."""

    first: ComparedRun
    second: ComparedRun
    reason: str
    """Reason for the comparison, or description of the second run: `its parent`."""
    result: AccuracyDifference | None
    """None if a run is not evaluated or the two have no test photos in common."""

    @property
    def missing_reason(self) -> str:
        """Return the reason why there is no result."""
        names = [run.name for run in (self.first, self.second) if run.test is None]
        return f"{' and '.join(names)} not evaluated" if names else "no test photos in common"


class RecipeGroup(NamedTuple):
    """Runs of one recipe on photos with different treatments."""

    runs: list[ComparedRun]
    pairs: list[Pair]


def compare_pair(first: ComparedRun, second: ComparedRun, reason: str, seed: int) -> Pair:
    """Compare two runs on the test photos that both have, by key and content. seed: of the bootstrap."""
    if first.test is None or second.test is None:
        return Pair(first, second, reason, None)
    _, i, j = np.intersect1d(first.test.keys, second.test.keys, assume_unique=True, return_indices=True)
    if first.test.image_ids is not None and second.test.image_ids is not None:
        is_same = np.array(first.test.image_ids)[i] == np.array(second.test.image_ids)[j]
        i, j = i[is_same], j[is_same]
    result = compare(first.test.correct[i], second.test.correct[j], seed) if len(i) else None
    return Pair(first, second, reason, result)


def pairs_with_best(comparison: Comparison) -> list[Pair]:
    """Compare the best run with its parent, with the second best on val, and with the best of each other treatment."""
    best, reasons = comparison.best, dict[str, list[str]]()
    parent = comparison.parent(best)
    if parent:
        reasons[parent.name] = ["its parent"]
    others = comparison.finished[1:]
    if others:
        place = "equal on val" if comparison.tied else "second best on val"
        reasons.setdefault(others[0].name, []).append(place)
    for treatment in dict.fromkeys(run.treatment for run in others if run.treatment != best.treatment):
        run = next(run for run in others if run.treatment == treatment)
        reasons.setdefault(run.name, []).append(f"best with {run.treatment_label}")
    by_name = {run.name: run for run in comparison.runs}
    return [compare_pair(best, by_name[name], ", ".join(why), comparison.seed) for name, why in reasons.items()]


def recipe_groups(comparison: Comparison) -> list[RecipeGroup]:
    """Group the runs by recipe and compare the best run of each treatment with that of every other.

    Recipes with a single treatment are left out.
    """
    by_recipe: dict[str, list[ComparedRun]] = {}
    for run in comparison.runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    groups = []
    for runs in by_recipe.values():
        best = _best_by_treatment(runs)
        if len(best) < 2:
            continue
        pairs = [
            compare_pair(first, second, f"{first.treatment_label} against {second.treatment_label}", comparison.seed)
            for i, second in enumerate(best)
            for first in best[i + 1 :]
        ]
        groups.append(RecipeGroup(runs, pairs))
    return groups


def _best_by_treatment(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Return the best run of each treatment, finished ones first, in the order of TREATMENTS."""
    best: dict[str, ComparedRun] = {}
    for run in sorted(runs, key=lambda run: (run.state != "finished", -run.rank)):
        best.setdefault(run.treatment, run)
    return sorted(best.values(), key=lambda run: [*TREATMENTS, run.treatment].index(run.treatment))


def seed_repeats(comparison: Comparison) -> list[list[str]]:
    """Return groups of names of runs that differ only in their seed."""
    groups: dict[tuple[str, str, str], dict[Any, str]] = {}
    for run in comparison.runs:
        groups.setdefault((run.recipe, run.dataset, run.parent), {})[run.settings.get("seed")] = run.name
    return [list(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1]
