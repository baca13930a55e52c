"""A search file → a sweep: Ray Tune tries settings, each in a run of its own, and ends early those that promise little.

What is known lies in the trials' records and runs, and not in Ray Tune's state, which forgets its scheduler when it is
restored. A sweep that goes on is begun anew, and the trials of before tell again what they told: those that are over
at once, the others before they go on from their newest checkpoint.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.tune
from ray.tune import schedulers, search
from ray.tune.trainable.function_trainable import wrap_function

from carclass import storage
from carclass.cluster.telemetry import trial_accuracy
from carclass.data import dataset
from carclass.errors import UserError
from carclass.runs.run import begin_run
from carclass.training import checkpoint, feature_cache, placement
from carclass.training.photo_store import PhotoStore
from carclass.training.train import TrainResources, check_resources, load_origin, train_stages
from carclass.tuning import sampler, trial_records
from carclass.tuning.collect import collect_sweep
from carclass.tuning.results import NUM_REPEATED
from carclass.tuning.search_space import Space
from carclass.tuning.trial import FAILURE, LAST, SweepContext, train_trial
from carclass.tuning.trial_records import Trial, TrialRecords

log = logging.getLogger(__name__)
MAX_FAILURES = 3
"""How often a trial begins again, where it was, when its process or node was lost or its program failed."""


def run_sweep(space: Space, *, resume: bool = False) -> None:
    """Runs a sweep, or what is missing of it. UserError for wrong settings, data or weights."""
    scheduler = _scheduler(space)
    book = trial_records.find_records(space, resume=resume)
    for one in [*book.found.values()]:
        if one.state == "failed":
            book.put(replace(one, state="begun", reason=None))
    searched = range(space.search.num_trials + 1)
    shared = None
    if book.left(searched):
        shared = _prepare(space, book)
        log.info("tune: %d trials, %d at a time", len(searched), shared.at_once)
        _fit(shared, book, searched, scheduler)
    repeated = _repeats(space, book)
    if book.left(repeated):
        shared = shared or _prepare(space, book)
        log.info("tune: the best settings with other seeds, %d runs", len(repeated))
        _fit(shared, book, repeated, schedulers.FIFOScheduler())
    for one in book.found.values():
        _remove_checkpoints(space, one)


def _prepare(space: Space, book: TrialRecords) -> SweepContext:
    """Joins the cluster and does what trials share: the experiment's own frozen stage, and photos in memory."""
    settings = space.settings(space.defaults, "trial-0", space.base.seed)
    source, parent_sha256 = load_origin(space.root, settings)
    use_gpu = check_resources(space.root, settings, source)
    each, limit = space.search.devices_per_worker, space.search.max_concurrent_trials
    at_once = placement.count_concurrent_runs(space.base, each, limit, use_gpu=use_gpu)
    sources = {name: dataset.load_dataset(space.root, name) for name in _datasets(space)}
    decoded = all(one.key != "train.model.image_size" for one in space.dimensions)
    held = {name: PhotoStore(settings, one, decoded=decoded) for name, one in sources.items()}
    trial_records.begin_records(space)  # not before: a sweep that is refused can be begun with other settings
    if 0 not in book.found:
        book.put(Trial(number=0, values=space.defaults, seed=settings.seed, **_devices(space, use_gpu)))
    first = begin_run(trial_records.trial_run(space, book.found[0]), source, parent_sha256)
    if "frozen" in first.unfinished_stages:
        log.info("tune: the frozen stage of the experiment as it stands, which trials share")
        train_stages(first, source, held[settings.dataset].get, TrainResources(use_gpu), ["frozen"])
    photos = {name: one.get() for name, one in held.items()} if _need_photos(space) else {}
    memory = placement.memory_per_run(space.base, each, at_once * space.base.workers[1], use_gpu=use_gpu)
    means = TrainResources(use_gpu, each, in_process=space.base.workers == (1, 1))
    return SweepContext(space, first, photos, means, memory, at_once)


def _devices(space: Space, use_gpu: bool) -> dict[str, Any]:
    """What a trial's record says of what it is trained on."""
    return {
        "device": placement.device_name(use_gpu),
        "devices": space.base.workers[1] * space.search.devices_per_worker,
    }


def _datasets(space: Space) -> list[str]:
    """The datasets that trials may be trained on."""
    varied = next((one.choices for one in space.dimensions if one.key == "train.dataset"), None)
    return [str(name) for name in varied or (space.base.dataset,)]


def _need_photos(space: Space) -> bool:
    """Whether a trial needs more than the cached features of trial 0."""
    if space.base.unfrozen is not None:
        return True
    first = feature_cache.cache_key(space.base)
    for one in space.dimensions:
        for value in one.choices or (one.low, one.high):
            changed = space.settings({**space.defaults, one.key: value}, "probe", space.base.seed)
            if one.key in ("train.dataset", "train.parent") or feature_cache.cache_key(changed) != first:
                return True
    return False


def _scheduler(space: Space) -> schedulers.TrialScheduler:
    """What ends trials early."""
    wanted, longest, grace = space.search.scheduler, space.max_epochs, space.min_epochs
    if wanted == "none" or (longest == 1 and space.search.min_epochs is None):
        return schedulers.FIFOScheduler()
    if grace >= longest:
        raise UserError(f"`min_epochs` is {grace}, and trials have {longest} epochs: none would be ended early.")
    if wanted == "median":
        return _spare_first_trial(schedulers.MedianStoppingRule(time_attr="epoch", grace_period=grace))
    factor = space.search.reduction_factor
    if wanted == "hyperband":
        return schedulers.HyperBandScheduler(time_attr="epoch", max_t=longest, reduction_factor=factor)
    return _spare_first_trial(
        schedulers.ASHAScheduler(
            time_attr="epoch",
            max_t=longest - 1,  # no rung at the last epoch, which would only end a trial where it ends
            grace_period=grace,
            reduction_factor=factor,
            stop_last_trials=False,
        )
    )


def _spare_first_trial(scheduler: schedulers.TrialScheduler) -> schedulers.TrialScheduler:
    """A scheduler that lets trial 0, with which the others are compared, come to its end."""
    judge = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = judge(controller, trial, result)
        return schedulers.TrialScheduler.CONTINUE if trial.config["record"]["number"] == 0 else decision

    scheduler.on_trial_result = on_trial_result  # type: ignore[assignment]
    return scheduler


def _fit(
    shared: SweepContext, book: TrialRecords, numbers: Sequence[int], scheduler: schedulers.TrialScheduler
) -> None:
    """Runs trials of these numbers by Ray Tune. SystemExit when the user ends it before they are over."""
    space, means = shared.space, shared.means
    devices = {placement.device_name(means.use_gpu): space.search.devices_per_worker}
    if not means.in_process:  # Ray Train's workers have them; a byte, since Ray Tune wants to reserve something
        devices = {"memory": 1}
    short = space.stage == "frozen"
    filesystem, path = storage.locate(trial_records.sweep_uri(space.root, space.search.name))
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(_named(shared, space.search.name if short else None), {"CPU": 0, **devices}),
        tune_config=ray.tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=RecordedSearch(space, book, numbers, _devices(space, means.use_gpu)),
            scheduler=scheduler,
            num_samples=len(numbers),
            max_concurrent_trials=shared.at_once,
            reuse_actors=short,  # trials of seconds, and starting a process takes as long
            trial_name_creator=lambda one: one.config["trial"]["title"],
            trial_dirname_creator=lambda one: one.config["trial"]["name"],
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the one in use, which `verbose` doesn't silence
    results = tuner.fit()
    book.reload()  # Ray Tune has written in a copy
    for result in (results[i] for i in range(len(results))):
        if result.error is not None and result.config is not None:
            reason = str(result.error).strip().splitlines()[-1][:300]
            book.put(replace(book.found[result.config["record"]["number"]], state="failed", reason=reason))
    if book.left(numbers):
        raise SystemExit("tune: interrupted; the same command goes on with it")


def _named(shared: SweepContext, name: str | None) -> type:
    """What Ray Tune runs. On the dashboard its processes are called by their trials, or where several trials share one
    by a name.
    """

    class TrialProcess(wrap_function(ray.tune.with_parameters(train_trial, shared=shared))):  # type: ignore[misc]
        def __repr__(self) -> str:
            return name or str(self.trial_name)

    return TrialProcess


class RecordedSearch(search.Searcher):
    """Tells Ray Tune which trials to run, and records how they end. Its own state is the trials' records."""

    def __init__(self, space: Space, book: TrialRecords, numbers: Sequence[int], devices: dict[str, Any]) -> None:
        super().__init__(metric="val_accuracy", mode="max")
        self.space, self.book, self.all, self.coming, self.devices = space, book, numbers, [*numbers], devices
        self.untidy: list[Trial] = []
        self.numbers: dict[str, int] = {}
        self.accuracies = {n: trial_records.told_settings(space, one) for n, one in book.found.items() if one.is_over}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The settings of the next trial: of one that was begun before, or new ones."""
        number = self.coming.pop(0)
        self.numbers[trial_id] = number
        if number not in self.book.found:
            values, seed = self._propose(number), self.space.base.seed
            self.book.put(Trial(number=number, values=values, seed=seed, **self.devices))
        trial = self.book.found[number]
        return {"trial": {"number": number, "title": trial.title, "name": trial.name}, "record": asdict(trial)}

    def _propose(self, number: int) -> dict[str, Any]:
        searched = self.space.search
        known = [
            sampler.KnownTrial(one.values, one.state, self.accuracies.get(one.number, {}))
            for one in self.book.found.values()
            if one.number < number
        ]
        return sampler.suggest_values(
            self.space.dimensions, known, searched.sampler, searched.seed, number, searched.num_trials
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remembers an epoch."""
        if FAILURE in result:
            return
        number = self.numbers[trial_id]
        self.accuracies.setdefault(number, {})[result["epoch"]] = result["val_accuracy"]
        trial_accuracy(self.space.search.name, self.book.found[number].title, result["val_accuracy"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Records how a trial ended; one that told of it again ended as it did then."""
        trial = self.book.found[self.numbers[trial_id]]
        told = {} if result is None else result
        if "epoch" in told:
            self.on_trial_result(trial_id, told)
        if trial.is_over:
            return
        failed, done = error or FAILURE in told, told.get(LAST)
        state: trial_records.State = "failed" if failed else "complete" if done else "pruned"
        self.book.put(replace(trial, state=state, reason=told.get(FAILURE)))
        self._say(self.book.found[trial.number])
        for one in self.untidy:  # those before it, which by now write nothing any more
            _remove_checkpoints(self.space, one)
        self.untidy = [self.book.found[trial.number]]

    def _say(self, trial: Trial) -> None:
        num_over = len(self.all) - len(self.book.left(self.all))
        best = {number: max(self.accuracies[number].values()) for number in self.all if self.accuracies.get(number)}
        reached = f", val accuracy {best[trial.number]:.3f}" if trial.number in best else ""
        top = max(best, key=lambda number: best[number], default=trial.number)
        log.info(
            "tune: %d of %d over: %s %s%s; best so far %.3f by %s",
            num_over, len(self.all), trial.name, trial.state, reached, best.get(top, 0.0), self.book.found[top].name,
        )  # fmt: skip

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all is in the records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: all is in the records."""


def _repeats(space: Space, book: TrialRecords) -> list[int]:
    """The numbers of the runs that repeat the best settings, and the experiment as it stands, with other seeds."""
    found = collect_sweep(space.root, space.search.name)
    wanted = [one.trial for one in found.complete[:NUM_REPEATED]]
    wanted += [one.trial for one in found.complete[NUM_REPEATED:] if one.trial.number == 0]
    there = {(one.repeats, one.seed): one.number for one in book.found.values()}
    numbers = []
    for trial in wanted:
        for seed in range(trial.seed + 1, trial.seed + space.search.num_seeds):
            if (trial.number, seed) not in there:
                number = max(book.found) + 1
                book.put(replace(trial, number=number, seed=seed, repeats=trial.number, state="begun"))
                there[trial.number, seed] = number
            numbers.append(there[trial.number, seed])
    return numbers


def _remove_checkpoints(space: Space, trial: Trial) -> None:
    """Removes what a trial that is over would have gone on from; its model and metrics stay."""
    if trial.state in ("complete", "pruned"):
        this = trial_records.trial_run(space, trial)
        for stage in this.stages:
            checkpoint.prune(storage.join(this.uri, stage), [])
