"""Sweeps: trials of an experiment with other settings, run by Ray Tune and pruned early where results are poor.

The state of a sweep is in the trials' records and runs. Ray Tune's own state is not restored, as it lacks the
scheduler's. When a sweep is resumed, all of its trials start again and first report their recorded epochs: trials that
are over then end, the others resume from their newest checkpoint.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.tune
from ray.tune import schedulers
from ray.tune.trainable.function_trainable import wrap_function

from carclass import storage
from carclass.cluster import connection
from carclass.cluster.interrupts import keep_interrupt_handler
from carclass.cluster.ray_storage import ray_filesystem
from carclass.data import dataset
from carclass.data.lease import hold_lease
from carclass.data.same_photos import have_same_photos
from carclass.errors import UserError
from carclass.runs.run import Run, begin_run, changed_inputs
from carclass.training import feature_cache, placement
from carclass.training.loop import DivergedError
from carclass.training.photo_store import PhotoStore
from carclass.training.pretrained import check_parent
from carclass.training.train import TrainResources, all_resources, check_resources, load_run_inputs, train_stages
from carclass.tuning import trial_records
from carclass.tuning.collect import collect_sweep
from carclass.tuning.search_space import SearchSpace
from carclass.tuning.searcher import RecordedSearch, remove_checkpoints
from carclass.tuning.trial import STORAGE_FAILURE, SweepContext, train_trial
from carclass.tuning.trial_records import Trial, TrialRecords

log = logging.getLogger(__name__)
MAX_FAILURES = 3
"""Largest number of retries of a trial whose process or node is lost or whose program fails."""


def run_sweep(space: SearchSpace, *, resume: bool = False) -> None:
    """Run a sweep, or the rest of it: the search, then the best settings with other seeds.

    Raise UserError for wrong settings, data or weights. resume: the sweep must exist.
    """
    scheduler = make_scheduler(space)
    trial_records.find_records(space, resume=resume)
    with hold_lease(trial_records.sweep_uri(space.root, space.search.name), "tune") as lease:
        records = trial_records.find_records(space, resume=resume)  # another job may have begun or advanced it
        _run_search(space, records, scheduler)
        lease.check()
        for trial in records.trials.values():
            remove_checkpoints(space, trial)


def _run_search(space: SearchSpace, records: TrialRecords, scheduler: schedulers.TrialScheduler) -> None:
    """Run the unfinished trials, then the repeats of the best settings."""
    _refuse_changed_inputs(space, records)
    reopen_trials(space, records)
    numbers = records.searched(space.search.num_trials)
    context = None
    if records.unfinished(numbers):
        context = prepare_sweep(space, records)
        log.info("tune: %d trials, %d at a time", len(numbers), context.max_concurrent)
        _run_trials(context, records, numbers, scheduler)
    trial_records.begin_records(space)  # again: `num_seeds` may have changed since
    repeats = _add_repeats(space, records)
    if records.unfinished(repeats):
        context = context or prepare_sweep(space, records)
        log.info("tune: the best settings with other seeds, %d runs", len(repeats))
        _run_trials(context, records, repeats, schedulers.FIFOScheduler())


def _refuse_changed_inputs(space: SearchSpace, records: TrialRecords) -> None:
    """Raise UserError if trials were trained on another version of their dataset or from other weights."""
    inputs: dict[tuple[str, str, str], tuple[str, str]] = {}
    for trial in records.trials.values():
        run = trial_records.trial_run(space, trial)
        if not trial_records.is_begun(space, trial):
            continue
        key = run.settings.dataset, run.settings.parent, run.settings.model.architecture
        if key not in inputs:
            source, parent_sha256 = load_run_inputs(space.root, run.settings)
            inputs[key] = source.digest, parent_sha256
        if changed := changed_inputs(run, *inputs[key]):
            raise UserError(
                f"sweep `{space.search.name}` in {space.root} was begun with other data ({', '.join(changed)}; trial "
                f"{trial.number}). Give this one another `name`, or delete {run.uri.rpartition('/trials/')[0]}; "
                "`--analyse` shows the trials as they are."
            )


def reopen_trials(space: SearchSpace, records: TrialRecords) -> None:
    """Record the trials as unfinished that failed or whose folder was deleted; warn of those that are lost."""
    for trial in [*records.trials.values()]:
        if trial.state == "failed" or (trial.is_over and not trial_records.is_begun(space, trial)):
            records.put(replace(trial, state="begun", reason=None))
    for lost in collect_sweep(space.root, space.search.name).lost if records.trials else []:
        log.warning("tune: trial %d is lost: %s", lost.trial.number, lost.trial.reason)


def prepare_sweep(space: SearchSpace, records: TrialRecords) -> SweepContext:
    """Connect to the cluster, train the frozen stage of trial 0 and load the photos that trials share."""
    settings = space.trial_settings(space.base_values, "trial-0", space.base_settings.seed)
    connection.check_cluster()
    source, parent_sha256 = load_run_inputs(space.root, settings)
    use_gpu = check_resources(space.root, settings, source)
    devices_per_worker, limit = space.search.devices_per_worker, space.search.max_concurrent_trials
    max_concurrent = placement.count_concurrent_runs(space.base_settings, devices_per_worker, limit, use_gpu=use_gpu)
    sources = {name: dataset.load_dataset(space.root, name) for name in _dataset_names(space)}
    check_same_val(sources, space.source)
    _check_weights(space)
    has_one_size = all(dimension.key != "train.model.image_size" for dimension in space.dimensions)
    stores = {name: PhotoStore(settings, each, decoded=has_one_size) for name, each in sources.items()}
    trial_records.begin_records(space)  # after all checks, so that a refused sweep can begin with other settings
    if 0 not in records.trials:
        devices = _device_fields(space, use_gpu)
        records.put(Trial(number=0, values=space.base_values, seed=settings.seed, **devices))
    first_run = begin_run(trial_records.trial_run(space, records.trials[0]), source, parent_sha256)
    if "frozen" in first_run.unfinished_stages:
        log.info("tune: the frozen stage of the unchanged experiment, which trials share")
        _train_shared_stage(space, first_run, source, stores[settings.dataset], use_gpu=use_gpu)
    photos = {name: store.get() for name, store in stores.items()} if _needs_photos(space) else {}
    num_slots = max_concurrent * space.base_settings.workers[1]
    memory = placement.memory_per_run(space.base_settings, devices_per_worker, num_slots, use_gpu=use_gpu)
    resources = TrainResources(use_gpu, devices_per_worker, in_process=space.base_settings.workers == (1, 1))
    return SweepContext(space, first_run, photos, resources, memory, max_concurrent)


def _train_shared_stage(
    space: SearchSpace, first_run: Run, source: dataset.Dataset, photos: PhotoStore, *, use_gpu: bool
) -> None:
    """Train the frozen stage of trial 0. Raise DivergedError if it diverges, and that of all trials with it."""
    try:
        train_stages(first_run, source, photos.get, all_resources(first_run.settings, use_gpu=use_gpu), ["frozen"])
    except DivergedError as error:
        if all(dimension.key.startswith("train.unfrozen.") for dimension in space.dimensions):
            raise
        log.warning("tune: the unchanged experiment fails: %s", error)


def _device_fields(space: SearchSpace, use_gpu: bool) -> dict[str, Any]:
    """Return the fields `device` and `devices` of a trial's record."""
    return {
        "device": placement.device_name(use_gpu),
        "devices": space.base_settings.workers[1] * space.search.devices_per_worker,
    }


def _dataset_names(space: SearchSpace) -> list[str]:
    """Return the names of all datasets that trials can be trained on."""
    choices = next((one.choices for one in space.dimensions if one.key == "train.dataset"), None)
    return [str(name) for name in choices or (space.base_settings.dataset,)]


def check_same_val(sources: dict[str, dataset.Dataset], source: str) -> None:
    """Raise UserError if the datasets of a sweep differ in their val photos. source: search file, for messages."""
    if not have_same_photos(list(sources.values()), "val"):
        raise UserError(
            f"{source}: `space.train.dataset`: {' and '.join(sources)} have other val photos, so the val accuracies of "
            "their trials can't be compared. Mask one dataset in several ways, or tune on each dataset by itself."
        )


def _check_weights(space: SearchSpace) -> None:
    """Fetch and check the weights that trials start from. Raise UserError for unusable ones."""
    for dimension in space.dimensions:
        if dimension.key in ("train.parent", "train.model.architecture"):
            for choice in dimension.choices or ():
                values = {**space.base_values, dimension.key: choice}
                check_parent(space.root, space.trial_settings(values, "probe", space.base_settings.seed))


def _needs_photos(space: SearchSpace) -> bool:
    """Return True if a trial can need more than the cached features of trial 0."""
    if space.base_settings.unfrozen is not None:
        return True
    base_key = feature_cache.cache_key(space.base_settings)
    for dimension in space.dimensions:
        for value in dimension.choices or (dimension.low, dimension.high):
            values = {**space.base_values, dimension.key: value}
            changed = space.trial_settings(values, "probe", space.base_settings.seed)
            if dimension.key in ("train.dataset", "train.parent") or feature_cache.cache_key(changed) != base_key:
                return True
    return False


def make_scheduler(space: SearchSpace) -> schedulers.TrialScheduler:
    """Return Ray Tune's scheduler, which prunes trials. Raise UserError if it could never prune any."""
    name, max_epochs, min_epochs = space.search.scheduler, space.max_epochs, space.min_epochs
    if name == "none" or (max_epochs == 1 and space.search.min_epochs is None):
        return schedulers.FIFOScheduler()
    if name == "hyperband" and space.search.min_epochs is not None:
        raise UserError("`min_epochs` has no effect with `scheduler: hyperband`, which sets its own. Leave it out.")
    if min_epochs >= max_epochs:
        raise UserError(
            f"`min_epochs` is {min_epochs} and trials have {max_epochs} epochs: none could be pruned. Lower it."
        )
    if name == "median":
        return _spare_first_trial(schedulers.MedianStoppingRule(time_attr="epoch", grace_period=min_epochs))
    factor = space.search.reduction_factor
    if name == "hyperband":
        return schedulers.HyperBandScheduler(time_attr="epoch", max_t=max_epochs, reduction_factor=factor)
    return _spare_first_trial(
        schedulers.ASHAScheduler(
            time_attr="epoch",
            max_t=max_epochs - 1,  # a rung at the last epoch would only end trials that end there anyway
            grace_period=min_epochs,
            reduction_factor=factor,
            stop_last_trials=False,
        )
    )


def _spare_first_trial(scheduler: schedulers.TrialScheduler) -> schedulers.TrialScheduler:
    """Patch a scheduler so that it never prunes trial 0, with which the others are compared."""
    decide = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = decide(controller, trial, result)
        return schedulers.TrialScheduler.CONTINUE if trial.config["record"]["number"] == 0 else decision

    scheduler.on_trial_result = on_trial_result  # type: ignore[assignment]
    return scheduler


def _run_trials(
    context: SweepContext, records: TrialRecords, numbers: Sequence[int], scheduler: schedulers.TrialScheduler
) -> None:
    """Run the trials of these numbers with Ray Tune.

    Raise StorageError if storage failed in any, and SystemExit if the user interrupts them.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # `verbose` silences the old output only
    with keep_interrupt_handler():
        grid = _make_tuner(context, records, numbers, scheduler).fit()
    records.reload()  # Ray Tune wrote through a copy of the searcher
    for result in (grid[i] for i in range(len(grid))):
        if result.error is not None and result.config is not None:
            reason = str(result.error).strip().splitlines()[-1][:300]
            number = result.config["record"]["number"]
            records.put(replace(records.trials[number], state="failed", reason=reason))
    failures = [(grid[i].metrics or {}).get(STORAGE_FAILURE) for i in range(len(grid))]
    if failed := list(filter(None, failures)):
        raise storage.StorageError(f"{failed[0]} {len(failed)} of {len(numbers)} trials are unfinished.")
    if records.unfinished(numbers):
        raise SystemExit("tune: interrupted; the same command resumes the sweep")


def _make_tuner(
    context: SweepContext, records: TrialRecords, numbers: Sequence[int], scheduler: schedulers.TrialScheduler
) -> ray.tune.Tuner:
    """Return Ray Tune's tuner of the trials of these numbers."""
    space, use_gpu = context.space, context.resources.use_gpu
    devices = {placement.device_name(use_gpu): space.search.devices_per_worker}
    if not context.resources.in_process:  # Ray Train's workers reserve the devices; Ray Tune refuses an empty request
        devices = {"memory": 1}
    is_short = space.stage == "frozen"
    filesystem, path = ray_filesystem(trial_records.sweep_uri(space.root, space.search.name))
    return ray.tune.Tuner(
        ray.tune.with_resources(_make_trainable(context, is_short), {"CPU": 0, **devices}),
        tune_config=ray.tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=RecordedSearch(space, records, numbers, _device_fields(space, use_gpu)),
            scheduler=scheduler,
            num_samples=len(numbers),
            max_concurrent_trials=context.max_concurrent,
            reuse_actors=is_short,  # such trials take seconds, as long as the start of a process
            trial_name_creator=lambda trial: trial.config["trial"]["title"],
            trial_dirname_creator=lambda trial: trial.config["trial"]["name"],
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )


def _make_trainable(context: SweepContext, share_processes: bool) -> type:
    """Return Ray Tune's trainable.

    The dashboard shows its processes by the trial's name, or by the sweep's where trials share processes.
    """
    name = context.space.search.name if share_processes else None  # the class must not capture the whole context

    class TrialProcess(wrap_function(ray.tune.with_parameters(train_trial, context=context))):  # type: ignore[misc]
        def __repr__(self) -> str:
            return name or str(self.trial_name)

    return TrialProcess


def _add_repeats(space: SearchSpace, records: TrialRecords) -> list[int]:
    """Record a trial for each repeat of the best settings and of trial 0 with another seed; return their numbers."""
    sweep = collect_sweep(space.root, space.search.name)
    existing = {(trial.repeats, trial.seed): trial.number for trial in records.trials.values()}
    numbers = []
    for trial in (result.trial for result in sweep.repeated):
        for seed in range(trial.seed + 1, trial.seed + space.search.num_seeds):
            if (trial.number, seed) not in existing:
                number = max(records.trials) + 1
                records.put(replace(trial, number=number, seed=seed, repeats=trial.number, state="begun"))
                existing[trial.number, seed] = number
            numbers.append(existing[trial.number, seed])
    return numbers
