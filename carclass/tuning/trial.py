"""Training of one trial of a sweep, in a process of Ray Tune.

A trial with one worker is trained in this very process: Ray Train would need two more processes, whose imports take
longer than a small trial. A trial with several workers is a run of Ray Train.
"""

from typing import Any, NamedTuple

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.models import architectures
from carclass.runs.run import Run, begin_run, copy_stage
from carclass.storage import StorageError
from carclass.training import feature_cache, preflight
from carclass.training.photo_store import BlockRefs
from carclass.training.train import TrainResources, load_run_inputs, train_stages
from carclass.tuning import trial_records
from carclass.tuning.search_space import SearchSpace
from carclass.tuning.trial_records import Trial

COMPLETE, FAILURE, STORAGE_FAILURE = "complete", "failure", "storage_failure"
"""Keys of a trial's reports to Ray Tune: True once its model is published; the cause of a failure, the trial's own or
one of the storage."""


class SweepContext(NamedTuple):
    """Data that all trials of a sweep share."""

    space: SearchSpace
    first_run: Run  # of trial 0, whose frozen stage is finished before the other trials start
    photos: dict[str, BlockRefs]  # by dataset; empty if cached features are enough
    resources: TrainResources
    memory: int | None  # bytes per trial
    max_concurrent: int  # number of trials


def train_trial(config: dict[str, Any], context: SweepContext) -> None:
    """Train one trial, or resume it. config: as returned by RecordedSearch.suggest."""
    try:
        _train(Trial(**config["record"]), context)
    except StorageError as error:
        ray.tune.report({"epoch": 0, "val_accuracy": 0.0, STORAGE_FAILURE: str(error)})
    except UserError as error:  # reported instead of raised, as Ray Tune would retry the trial
        ray.tune.report({"epoch": 0, "val_accuracy": 0.0, FAILURE: str(error)})


def _train(trial: Trial, context: SweepContext) -> None:
    run = trial_records.trial_run(context.space, trial)
    rows = [row for row in run.metrics() if row["stage"] == run.stages[-1]]
    for row in rows[:-1]:
        ray.tune.report(row)
    if trial.is_over:
        if not rows:
            raise UserError(
                f"{run.uri} has lost its metrics. Restore it from a copy, or delete it to have it trained again."
            )
        ray.tune.report({**rows[-1], COMPLETE: trial.state == "complete"})
        return
    if rows and run.unfinished_stages:
        ray.tune.report(rows[-1])
    source, parent_sha256 = load_run_inputs(context.space.root, run.settings)
    if context.memory is not None:
        net = architectures.build(run.settings.model, len(source.classes))
        preflight.check_memory(run.settings, source, net, context.memory, use_gpu=context.resources.use_gpu)
    begin_run(run, source, parent_sha256)
    first_run = context.first_run
    if (
        run.unfinished_stages == ["frozen", "unfrozen"]
        and _has_same_frozen(run.settings, first_run.settings)
        and first_run.is_finished("frozen")  # it may have diverged
    ):
        copy_stage(run, first_run, "frozen")
    resources = context.resources._replace(report=ray.tune.report, verbose=False)
    if not resources.in_process:
        resources = resources._replace(report=ray.train.report, callbacks=(TuneReportCallback(),))
    train_stages(run, source, lambda: context.photos[run.settings.dataset], resources, run.unfinished_stages)
    ray.tune.report({**run.metrics()[-1], COMPLETE: True})


def _has_same_frozen(settings: TrainSettings, other: TrainSettings) -> bool:
    """Return True if the frozen stages of two runs train to the same weights."""
    if settings.frozen is None or feature_cache.cache_key(settings) != feature_cache.cache_key(other):
        return False
    keys = ("frozen", "model", "sampling", "seed", "parent", "dataset")
    return all(getattr(settings, key) == getattr(other, key) for key in keys)
