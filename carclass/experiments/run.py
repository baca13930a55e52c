"""Runs the experiments of a tree: parents before children, as many at a time as the cluster has room for.

Each is a task of Ray's. A run with one worker is trained in it; one with several workers is a run of Ray Train.
What is finished is left alone, what was interrupted goes on, and a branch that fails stops no other.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from carclass.cluster import connection
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.experiments import status
from carclass.experiments.tree import Experiment, Tree
from carclass.ingestion.ingest import ingest_photos
from carclass.models import resnet
from carclass.runs.run import MetricsRow, Run, begin_run, find_run
from carclass.training import feature_cache, placement, preflight
from carclass.training.photo_store import BlockRefs, PhotoStore
from carclass.training.train import MALLOC_ENV, TrainResources, check_resources, load_origin, train_stages

log = logging.getLogger(__name__)
SAY_EVERY = 10.0
"""Seconds between two lines on how far the runs are."""
MAX_RETRIES = 3
"""How often a run goes on elsewhere when its process or node is lost."""


@dataclass
class TreeProgress:
    """How far the wanted experiments are."""

    waiting: list[Experiment]
    running: dict[Any, Experiment] = field(default_factory=dict)  # by the task's future
    finished: list[str] = field(default_factory=list)  # by name, those that were finished before too
    failed: dict[str, str] = field(default_factory=dict)  # name → why

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return not self.waiting and not self.running


def run_experiments(tree: Tree, wanted: Sequence[Experiment]) -> TreeProgress:
    """Trains what is missing of experiments and their parents (all in `wanted`, parents first).

    UserError for wrong data or weights; what goes wrong with one of them is in what is returned.
    """
    progress, found = TreeProgress([]), status.tree_status(tree)
    for one in wanted:
        state, reason = found[one.name].state, found[one.name].reason
        if state == "finished":
            progress.finished.append(one.name)
        elif state == "stale":
            progress.failed[one.name] = f"stale ({reason}): `jobs/lineage.py rerun-stale` trains it anew"
        else:
            progress.waiting.append(one)
    if progress.waiting:
        _check_parents(tree, wanted)
        make_datasets(tree, {one.settings.dataset for one in progress.waiting})
        _train(tree, progress)
    return progress


def rerun_stale(tree: Tree) -> TreeProgress:
    """Trains anew what is stale; what the old runs said of themselves is kept, see standing.put_aside."""
    found = status.tree_status(tree)
    stale = [name for name, one in found.items() if one.state == "stale"]
    for name in stale:
        log.info("lineage: %s (%s); it is kept as %s", name, found[name].reason, status.set_aside_run(found[name].run))
    return run_experiments(tree, tree.with_parents(stale))


def make_datasets(tree: Tree, needed: set[str]) -> None:
    """Publishes those of the budget's datasets that are needed and aren't there; what isn't the budget's must be."""
    root = tree.budget.root
    masks = [mask for mask in tree.budget.masks if mask.dataset in needed]
    sources = needed | {mask.source for mask in masks}
    if tree.budget.ingest is not None and tree.budget.ingest.dataset in sources:
        ingest_photos(root, tree.budget.ingest)
    for mask in masks:
        from carclass.masking.mask import mask_dataset  # here: what only trains needs no detector

        mask_dataset(root, mask)
    for name in sorted(needed):
        dataset.load_dataset(root, name)


def _check_parents(tree: Tree, wanted: Sequence[Experiment]) -> None:
    """UserError when a parent is neither in the tree nor on the root, or has a dataset of other classes.

    Of datasets that are still to be made nothing is known yet.
    """
    for one in wanted:
        parent = tree.parent(one)
        if one.start is not None and parent is None:
            try:
                find_run(tree.budget.root, one.start.run)
            except UserError as error:
                raise UserError(f"{one.file}: `train.parent` is {one.settings.parent}, but {error}") from error
        ours = dataset.find_dataset(tree.budget.root, one.settings.dataset)
        theirs = None if parent is None else dataset.find_dataset(tree.budget.root, parent.settings.dataset)
        if ours is not None and theirs is not None and ours.classes != theirs.classes:
            raise UserError(
                f"{one.file}: dataset `{ours.name}` has {len(ours.classes)} classes, and `train.parent` "
                f"{one.settings.parent} was trained on `{theirs.name}` with {len(theirs.classes)} or others. "
                "Choose datasets of the same classes, or start from `imagenet`."
            )


def _train(tree: Tree, progress: TreeProgress) -> None:
    connection.connect()
    held: dict[tuple[str, int], PhotoStore] = {}
    said = time.monotonic()
    while not progress.is_over:
        for one in _ready(tree, progress):
            progress.waiting.remove(one)
            if (why := _begin(tree, one, held, progress)) is not None:
                progress.failed[one.name] = why
                log.warning("lineage: %s failed: %s", one.name, why)
        for task in ray.wait(list(progress.running), timeout=1.0)[0] if progress.running else []:
            one = progress.running.pop(task)
            _end(tree, one, task, progress)
        if time.monotonic() - said > SAY_EVERY and progress.running:
            said = time.monotonic()
            _say(tree, progress)


def _ready(tree: Tree, progress: TreeProgress) -> list[Experiment]:
    """Those whose parent is finished, but for those whose cached features another is computing for all of them.

    One whose parent failed fails with it.
    """
    ready: list[Experiment] = []
    computed = [_features(one) for one in progress.running.values() if one.settings.frozen and not _epochs(tree, one)]
    for one in [*progress.waiting]:
        parent = tree.parent(one)
        if parent is not None and parent.name in progress.failed:
            progress.waiting.remove(one)
            progress.failed[one.name] = f"{parent.name}, which it starts from, failed"
        elif parent is not None and parent.name not in progress.finished:
            continue
        elif one.settings.frozen is None:
            ready.append(one)
        elif (needed := _features(one)) not in computed:
            ready.append(one)
            computed.append(needed)
    return ready


def _features(one: Experiment) -> Any:
    """What the cached features of an experiment with a frozen stage depend on."""
    return feature_cache.cache_key(one.settings), one.settings.dataset, one.settings.parent


def _epochs(tree: Tree, one: Experiment) -> list[MetricsRow]:
    return Run(tree.budget.root, one.settings).metrics()


def _begin(tree: Tree, one: Experiment, held: dict[tuple[str, int], PhotoStore], progress: TreeProgress) -> str | None:
    """Hands an experiment to the cluster; why it can't be trained, if so."""
    root, settings, each = tree.budget.root, one.settings, tree.budget.devices_per_worker
    try:
        source = dataset.load_dataset(root, settings.dataset)
        use_gpu = check_resources(root, settings, source)
        _check_share(settings, source, each, use_gpu=use_gpu)
    except UserError as error:
        return str(error)
    photos = held.setdefault((settings.dataset, settings.model.image_size), PhotoStore(settings, source))
    here = settings.workers == (1, 1)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": MAX_RETRIES}
    if here:
        options |= {"num_gpus": each, "num_cpus": 1} if use_gpu else {"num_cpus": each}
        options |= {} if use_gpu else {"runtime_env": {"env_vars": MALLOC_ENV}}
    task: Any = ray.remote(train_one).options(name=one.name, **options)
    means = TrainResources(use_gpu, each, in_process=here, report=_tell_nobody)
    progress.running[task.remote(root, settings, photos.get(), means)] = one
    return None


def _check_share(settings: TrainSettings, source: dataset.Dataset, each: float, *, use_gpu: bool) -> None:
    """UserError when a run doesn't fit beside as many others as the cluster has room for."""
    slots = placement.count_slots(settings.workers[0], each, use_gpu=use_gpu)
    memory = placement.memory_per_run(settings, each, slots, use_gpu=use_gpu)
    if memory is not None:
        net = resnet.build(settings.model, len(source.classes))
        preflight.check_memory(settings, source, net, memory, use_gpu=use_gpu)


def train_one(root: str, settings: TrainSettings, photos: BlockRefs, means: TrainResources) -> str | None:
    """Trains an experiment or what is missing of it, in a task of Ray's; why it can't be, if so."""
    try:
        source, parent_sha256 = load_origin(root, settings)
        this = begin_run(Run(root, settings), source, parent_sha256)
        train_stages(this, source, lambda: photos, means, this.unfinished_stages)
    except UserError as error:  # no crash, after which Ray would try again
        return str(error)
    return None


def _tell_nobody(metrics: dict[str, float]) -> None:
    """The epochs of several runs at a time would be a muddle: the driver says how far all are."""


def _end(tree: Tree, one: Experiment, task: Any, progress: TreeProgress) -> None:
    try:
        why = ray.get(task)
    except ray.exceptions.RayError as error:  # a program's, or of a process or node that was lost too often
        why = str(error).strip().splitlines()[-1][:300]
    if why is not None:
        progress.failed[one.name] = why
        log.warning("lineage: %s failed: %s", one.name, why)
        return
    progress.finished.append(one.name)
    this = Run(tree.budget.root, one.settings)
    accuracy = this.best_val_accuracy(this.stages[-1])
    log.info("lineage: %s finished, val accuracy %.3f", one.name, accuracy)


def _say(tree: Tree, progress: TreeProgress) -> None:
    """One line on all of them."""
    parts = []
    for one in progress.running.values():
        rows = _epochs(tree, one)
        if rows:
            last = rows[-1]
            epochs = getattr(one.settings, last["stage"]).epochs
            parts.append(f"{one.name} {last['stage']} {last['epoch']:.0f}/{epochs} val {last['val_accuracy']:.3f}")
    rest = len(progress.running) - len(parts)
    parts += [f"{rest} begin or wait for room"] if rest else []
    over = len(progress.finished) + len(progress.failed)
    total = over + len(progress.running) + len(progress.waiting)
    log.info("lineage: %d of %d over; %s", over, total, ", ".join(parts))
