"""One trial of a sweep, in a process of Ray Tune's, which imports no more than it needs.

A trial with one worker is trained in that very process, as Ray Train won't do it within Ray Tune: two processes less to
start, whose imports take longer than a small trial itself. One with several workers is a run of Ray Train.
"""

from typing import Any, NamedTuple

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from carclass.config.schema import TrainSettings
from carclass.errors import UserError
from carclass.models import resnet
from carclass.runs.run import Run, adopt_stage, begin_run
from carclass.training import feature_cache, preflight
from carclass.training.photo_store import BlockRefs
from carclass.training.train import TrainResources, load_origin, train_stages
from carclass.tuning import trial_records
from carclass.tuning.search_space import Space
from carclass.tuning.trial_records import Trial

LAST = "last"
"""In what a trial tells: whether it is at its end, and its model published."""


FAILURE = "failure"
"""There, too: why it can't be trained."""


class SweepContext(NamedTuple):
    """What all trials of a sweep have in common."""

    space: Space
    first: Run  # trial 0's, whose frozen stage is there before any other trial begins
    photos: dict[str, BlockRefs]  # by dataset; none where trials need none
    means: TrainResources
    memory: int | None  # bytes for each trial
    at_once: int  # trials


def train_trial(given: dict[str, Any], shared: SweepContext) -> None:
    """One trial, from its beginning or from where it was interrupted."""
    try:
        _train(Trial(**given["record"]), shared)
    except UserError as error:  # no crash, after which Ray Tune would begin it again
        ray.tune.report({"epoch": 0, "val_accuracy": 0.0, FAILURE: str(error)})


def _train(trial: Trial, shared: SweepContext) -> None:
    this = trial_records.trial_run(shared.space, trial)
    rows = [row for row in this.metrics() if row["stage"] == this.stages[-1]]
    for row in rows[:-1]:
        ray.tune.report(row)
    if trial.is_over:
        ray.tune.report({**rows[-1], LAST: trial.state == "complete"})
        return
    if rows and this.unfinished_stages:
        ray.tune.report(rows[-1])
    source, parent_sha256 = load_origin(shared.space.root, this.settings)
    if shared.memory is not None:
        net = resnet.build(this.settings.model, len(source.classes))
        preflight.check_memory(this.settings, source, net, shared.memory, use_gpu=shared.means.use_gpu)
    begin_run(this, source, parent_sha256)
    if this.unfinished_stages == ["frozen", "unfrozen"] and _same_frozen(this.settings, shared.first.settings):
        adopt_stage(this, shared.first, "frozen")
    means = shared.means._replace(report=ray.tune.report)
    if not means.in_process:
        means = means._replace(report=ray.train.report, callbacks=(TuneReportCallback(),))
    train_stages(this, source, lambda: shared.photos[this.settings.dataset], means, this.unfinished_stages)
    ray.tune.report({**this.metrics()[-1], LAST: True})


def _same_frozen(one: TrainSettings, other: TrainSettings) -> bool:
    """Whether two runs have the same frozen stage."""
    if one.frozen is None or feature_cache.cache_key(one) != feature_cache.cache_key(other):
        return False
    return all(getattr(one, key) == getattr(other, key) for key in ("frozen", "model", "seed", "parent", "dataset"))
