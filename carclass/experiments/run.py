"""Training of a tree of experiments: parents before children, as many concurrent runs as the cluster has room for.

Each run is a Ray task. A run with one worker is trained in the task, one with several workers by Ray Train. Finished
runs are left alone, interrupted ones are resumed, and a failed branch does not stop the others.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import ray

from carclass.cluster import connection
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.data.lease import Lease, hold_lease
from carclass.errors import UserError
from carclass.experiments.replaced_runs import is_half_moved, names_of_replaced_runs, set_aside_run
from carclass.experiments.status import UNFINISHED, RunStatus, tree_status
from carclass.experiments.tree import Experiment, Tree
from carclass.formatting import rate_text
from carclass.ingestion.ingest import ingest_photos
from carclass.models import architectures
from carclass.progress import Throttle
from carclass.runs.metrics_loggers import check_loggers
from carclass.runs.run import MetricsRow, Run, begin_run, find_run
from carclass.training import feature_cache, placement, preflight, pretrained
from carclass.training.photo_store import BlockRefs, PhotoStore
from carclass.training.train import (
    TrainResources,
    check_resources,
    load_run_inputs,
    refit_run,
    train_stages,
    warn_if_unfreezing_hurt,
)

log = logging.getLogger(__name__)
REPORT_EVERY_S = 10.0
"""Seconds between two progress lines."""
MAX_RETRIES = 3
"""Largest number of retries of a run whose process or node is lost."""


@dataclass
class TreeProgress:
    """Progress of the requested experiments."""

    waiting: list[Experiment]
    running: dict[Any, Experiment] = field(default_factory=dict)  # by the task's future
    finished: list[str] = field(default_factory=list)  # names, including those finished before
    failed: dict[str, str] = field(default_factory=dict)  # reason by name

    @property
    def is_over(self) -> bool:
        """Return True if no experiment is waiting or running."""
        return not self.waiting and not self.running

    def fail(self, experiment: Experiment, reason: str) -> None:
        """Record and log a failure."""
        self.failed[experiment.name] = reason
        log.warning("lineage: %s failed: %s", experiment.name, reason)


def run_experiments(tree: Tree, requested: Sequence[Experiment], replace: Collection[str] = ()) -> TreeProgress:
    """Train the unfinished ones of the requested experiments. requested: with their parents, parents first.

    replace: names of those whose run is moved aside first if it is stale or unreadable when its turn comes. Failures of
    single experiments are returned. Raise UserError for wrong data or weights.
    """
    progress, statuses = TreeProgress([]), tree_status(tree)
    for experiment in requested:
        name, status = experiment.name, statuses[experiment.name]
        if status.state == "finished" and not (name in replace and tree.parent(experiment) in progress.waiting):
            progress.finished.append(name)
        elif name in replace or status.state in UNFINISHED:
            progress.waiting.append(experiment)
        elif status.state == "stale":
            progress.failed[name] = f"stale ({status.reason}): the same command with `rerun-stale {name}` retrains it"
        else:
            progress.failed[name] = str(status.reason)
    if progress.waiting:
        connection.check_cluster()
        _check_parents(tree, requested)
        for settings in {one.settings.loggers: one.settings for one in progress.waiting}.values():
            check_loggers(tree.budget.root, settings)
        _check_weights(tree, progress)
    if progress.waiting:
        make_datasets(tree, {experiment.settings.dataset for experiment in progress.waiting})
        _check_replacements(tree, progress.waiting, replace)
        _run_tasks(tree, progress, replace)
    return progress


def find_stale(tree: Tree) -> dict[str, str]:
    """Return the reason of each stale experiment, also of one that was moved aside but not trained again."""
    replaced = names_of_replaced_runs(tree.budget.root)
    found: dict[str, str] = {}
    for name, status in tree_status(tree).items():
        parent = tree.parent(tree[name])
        if status.state == "stale":
            found[name] = str(status.reason)
        elif status.state in UNFINISHED and name in replaced:
            found[name] = "moved aside, not trained again yet"
        elif status.state != "missing" and parent is not None and parent.name in found:
            found[name] = f"{parent.name} is trained again"
    return found


def rerun_stale(tree: Tree, names: Sequence[str]) -> TreeProgress:
    """Train experiments again, with their unfinished parents; stale runs of theirs are moved aside whole.

    Everything is checked before the first run is moved, and each is moved when its training begins. Raise UserError if
    an experiment starts from a stale one that is not named.
    """
    requested, statuses = tree.with_parents(names), tree_status(tree)
    for experiment in requested:
        status = statuses[experiment.name]
        if status.state == "stale" and experiment.name not in names:
            raise UserError(
                f"{experiment.name} is stale ({status.reason}), and {' '.join(names)} would start from it. Retrain it "
                f"too: the same command with `rerun-stale {experiment.name} {' '.join(names)}`."
            )
    return run_experiments(tree, requested, names)


def make_datasets(tree: Tree, names: set[str]) -> None:
    """Publish the missing ones of these datasets. Raise UserError for one that is missing and not in the budget."""
    root = tree.budget.root
    masks = [mask for mask in tree.budget.masks if mask.dataset in names]
    sources = names | {mask.source for mask in masks}
    if tree.budget.ingest is not None and tree.budget.ingest.dataset in sources:
        ingest_photos(root, tree.budget.ingest)
    for mask in masks:
        from carclass.masking.mask import mask_dataset  # imported late: training needs no detector

        mask_dataset(root, mask)
    for name in sorted(names):
        dataset.load_dataset(root, name)


def _check_parents(tree: Tree, experiments: Sequence[Experiment]) -> None:
    """Raise UserError for a parent that does not exist or was trained on other classes.

    Datasets that are not published yet are not checked.
    """
    root = tree.budget.root
    for experiment in experiments:
        parent, start = tree.parent(experiment), experiment.parent_epoch
        if start is not None and parent is None:
            try:
                find_run(root, start.run)
            except UserError as error:
                message = f"{experiment.file}: `train.parent` is {experiment.settings.parent}, but {error}"
                raise UserError(message) from error
        own = dataset.find_dataset(root, experiment.settings.dataset)
        other = None if parent is None else dataset.find_dataset(root, parent.settings.dataset)
        if own is not None and other is not None and own.classes != other.classes:
            raise UserError(
                f"{experiment.file}: dataset `{own.name}` ({len(own.classes)} classes) and `{other.name}` "
                f"({len(other.classes)} classes) of `train.parent` {experiment.settings.parent} have different "
                "classes. Choose datasets of the same classes, or start from `imagenet`."
            )


def _check_weights(tree: Tree, progress: TreeProgress) -> None:
    """Fetch and check the weights files of the waiting experiments, and those of detectors, before any work.

    An experiment with unusable weights fails. Raise UserError for those of the detector of a missing dataset.
    """
    root, reasons = tree.budget.root, dict[Any, str | None]()
    for experiment in [experiment for experiment in progress.waiting if experiment.parent_epoch is None]:
        settings = experiment.settings
        key = settings.parent, settings.parent_sha256, settings.model.architecture
        if key not in reasons:
            reasons[key] = _unusable_weights(root, settings)
        if (reason := reasons[key]) is not None:
            progress.waiting.remove(experiment)
            progress.fail(experiment, reason)
    names = {experiment.settings.dataset for experiment in progress.waiting}
    for mask in tree.budget.masks:
        if mask.dataset in names and dataset.find_dataset(root, mask.dataset) is None:
            from carclass.masking.mask import pin_detector  # imported late: training needs no detector

            pin_detector(root, mask)


def _unusable_weights(root: str, settings: TrainSettings) -> str | None:
    """Return the reason if the weights that an experiment starts from are unusable."""
    try:
        pretrained.check_parent(root, settings)
    except UserError as error:
        return str(error)
    return None


def _check_replacements(tree: Tree, waiting: Sequence[Experiment], replace: Collection[str]) -> None:
    """Raise UserError if an experiment to be replaced can't be trained, as far as that is known before its parents."""
    for experiment in waiting:
        if experiment.name in replace:
            _check_trainable(tree, experiment)
            if tree.parent(experiment) not in waiting:
                load_run_inputs(tree.budget.root, experiment.settings)


def _run_tasks(tree: Tree, progress: TreeProgress, replace: Collection[str]) -> None:
    """Run the waiting experiments until all are finished or failed."""
    connection.connect({"root": tree.budget.root})
    stores: dict[tuple[str, int], PhotoStore] = {}
    leases: dict[str, Lease] = {}
    throttle = Throttle(REPORT_EVERY_S)
    with ExitStack() as held:
        while not progress.is_over:
            for experiment in take_ready(tree, progress):
                lease = leases[experiment.name] = hold_lease(_run(tree, experiment).uri, "lineage")
                try:
                    held.enter_context(lease)
                    old = tree_status(tree)[experiment.name] if experiment.name in replace else None
                    if old is not None and old.state == "finished":  # its parent has the same weights again
                        lease.release()
                        progress.finished.append(experiment.name)
                        continue
                    task = _start_task(tree, experiment, stores, old)
                except UserError as error:
                    lease.release()
                    progress.fail(experiment, str(error))
                else:
                    progress.running[task] = experiment
            for task in ray.wait(list(progress.running), timeout=1.0)[0] if progress.running else []:
                experiment = progress.running.pop(task)
                leases[experiment.name].release()
                _end_task(tree, experiment, task, progress)
            if progress.running and throttle.is_ready():
                _log_progress(tree, progress)


def take_ready(tree: Tree, progress: TreeProgress) -> list[Experiment]:
    """Remove the experiments that can start from the waiting ones, and return them.

    An experiment waits for its parent, and for features that another one is computing for the cache. It fails if its
    parent failed.
    """
    running = [experiment for experiment in progress.running.values() if experiment.settings.frozen is not None]
    computing = [_features_key(experiment) for experiment in running if not _metrics(tree, experiment)]
    ready: list[Experiment] = []
    waiting: list[Experiment] = []
    for experiment in progress.waiting:
        parent = tree.parent(experiment)
        if parent is not None and parent.name in progress.failed:
            progress.failed[experiment.name] = f"its parent {parent.name} failed"
        elif parent is not None and parent.name not in progress.finished:
            waiting.append(experiment)
        elif experiment.settings.frozen is None:
            ready.append(experiment)
        elif _features_key(experiment) in computing:
            waiting.append(experiment)
        else:
            ready.append(experiment)
            computing.append(_features_key(experiment))
    progress.waiting = waiting
    return ready


def _features_key(experiment: Experiment) -> Any:
    """Return the inputs of an experiment's cached features."""
    return feature_cache.cache_key(experiment.settings), experiment.settings.dataset, experiment.settings.parent


def _metrics(tree: Tree, experiment: Experiment) -> list[MetricsRow]:
    return _run(tree, experiment).metrics()


def _run(tree: Tree, experiment: Experiment) -> Run:
    return Run(tree.budget.root, experiment.settings)


def _start_task(
    tree: Tree, experiment: Experiment, stores: dict[tuple[str, int], PhotoStore], old: RunStatus | None
) -> Any:
    """Submit an experiment to the cluster and return its future. Raise UserError if it can't be trained.

    old: status of a run to be replaced, which is moved aside if it is stale or unreadable, or a kill interrupted that.
    """
    root, settings, devices_per_worker = tree.budget.root, experiment.settings, tree.budget.devices_per_worker
    source, use_gpu = _check_trainable(tree, experiment)
    if old is not None and (old.state in ("stale", "unreadable") or is_half_moved(old.run)):
        load_run_inputs(root, settings)
        log.info("lineage: the old run %s, %s, is moved to %s", experiment.name, old.state, set_aside_run(old.run))
    store = stores.setdefault((settings.dataset, settings.model.image_size), PhotoStore(settings, source))
    in_process = settings.workers == (1, 1)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": MAX_RETRIES}
    if in_process and use_gpu:
        options |= {"num_gpus": devices_per_worker, "num_cpus": 1}
    elif in_process:
        options |= {"num_cpus": devices_per_worker}
    task: Any = ray.remote(train_experiment).options(name=experiment.name, **options)
    resources = TrainResources(use_gpu, devices_per_worker, in_process=in_process, verbose=False)
    return task.remote(root, settings, store.get(), resources)


def _check_trainable(tree: Tree, experiment: Experiment) -> tuple[dataset.Dataset, bool]:
    """Return an experiment's dataset, and True if GPUs are used. Raise UserError if the cluster can't train it."""
    root, settings = tree.budget.root, experiment.settings
    source = dataset.load_dataset(root, settings.dataset)
    use_gpu = check_resources(root, settings, source)
    _check_placement(settings, source, tree.budget.devices_per_worker, use_gpu=use_gpu)
    return source, use_gpu


def _check_placement(
    settings: TrainSettings, source: dataset.Dataset, devices_per_worker: float, *, use_gpu: bool
) -> None:
    """Raise UserError if a run does not fit on the cluster or into its share of memory."""
    placement.check_sharing(settings, devices_per_worker, use_gpu=use_gpu)
    slots = placement.count_slots(settings.workers[0], devices_per_worker, use_gpu=use_gpu)
    memory = placement.memory_per_run(settings, devices_per_worker, slots, use_gpu=use_gpu)
    if memory is not None:
        net = architectures.build(settings.model, len(source.classes))
        preflight.check_memory(settings, source, net, memory, use_gpu=use_gpu)


def train_experiment(root: str, settings: TrainSettings, photos: BlockRefs, resources: TrainResources) -> str | None:
    """Train an experiment, or resume it, in a Ray task. Return the reason if it can't be trained."""
    try:
        source, parent_sha256 = load_run_inputs(root, settings)
        run = begin_run(Run(root, settings), source, parent_sha256)
        train_stages(run, source, lambda: photos, resources, run.unfinished_stages)
        refit_run(run, source, lambda: photos, resources)
    except UserError as error:  # returned instead of raised, as Ray would retry the task
        return str(error)
    return None


def _end_task(tree: Tree, experiment: Experiment, task: Any, progress: TreeProgress) -> None:
    """Record the result of a task."""
    try:
        reason = ray.get(task)
    except ray.exceptions.RayError as error:  # a bug, or a process or node that was lost too often
        reason = str(error).strip().splitlines()[-1][:300]
    if reason is not None:
        progress.fail(experiment, reason)
        return
    progress.finished.append(experiment.name)
    run = _run(tree, experiment)
    log.info("lineage: %s finished, val accuracy %s", experiment.name, rate_text(run.best_val_accuracy(run.best_stage)))
    warn_if_unfreezing_hurt(run, dataset.load_dataset(run.root, run.settings.dataset))


def _log_progress(tree: Tree, progress: TreeProgress) -> None:
    """Log one line on all experiments."""
    parts = []
    for experiment in progress.running.values():
        rows = _metrics(tree, experiment)
        if rows:
            stage, epoch, accuracy = rows[-1]["stage"], rows[-1]["epoch"], rows[-1]["val_accuracy"]
            num_epochs = getattr(experiment.settings, stage).epochs
            parts.append(f"{experiment.name} {stage} {epoch:.0f}/{num_epochs} val {rate_text(accuracy)}")
    num_starting = len(progress.running) - len(parts)
    parts += [f"{num_starting} starting or waiting for resources"] if num_starting else []
    num_over = len(progress.finished) + len(progress.failed)
    total = num_over + len(progress.running) + len(progress.waiting)
    log.info("lineage: %d of %d over; %s", num_over, total, ", ".join(parts))
