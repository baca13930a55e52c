"""A dataset → a run: one Ray Train run per stage, frozen then unfrozen, each resumed from its checkpoints."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch

from carclass import storage
from carclass.cluster import connection, resources
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.models import resnet
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model
from carclass.training import checkpoint, feature_cache, loop, preflight, pretrained
from carclass.training.photo_store import BlockRefs, PhotoStore
from carclass.training.preemption import TorchConfig
from carclass.training.worker import (
    SINGLE_WORKER,
    StageJob,
    initial_network,
    run_train_worker,
    train_stage,
    trained_module,
)

log = logging.getLogger(__name__)
MAX_RESTARTS_WITHOUT_PROGRESS = 3
"""How often workers are replaced without any checkpoint in between: then it is the program that fails."""
MALLOC_ENV = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_ARENA_MAX": "1"}
"""For glibc, in workers on CPUs: what a step gives back, the next one takes again. By default every large tensor would
be asked from the system anew, which clears its pages: a tenth of a step's time."""


class TrainResources(NamedTuple):
    """What a run is trained with."""

    use_gpu: bool
    devices_per_worker: float | None = None  # GPUs, or CPUs, of each worker; None: one GPU, or as many CPUs as there is room for
    in_process: bool = False  # by the only worker, in this process and without Ray Train
    report: Callable[[dict[str, float]], None] | None = (
        None  # of the last stage's epochs but its very last; called by every worker
    )
    callbacks: Sequence[Any] = ()  # of Ray Train


def train_run(root: str, settings: TrainSettings) -> Run:
    """Trains `<root>/experiments/<name>`, or what is missing of it. UserError for wrong settings, data or weights."""
    source, parent_sha256 = load_origin(root, settings)
    this = Run(root, settings)
    missing = this.unfinished_stages
    # Checked before anything is written: a run that is refused can be begun with other settings.
    use_gpu = check_resources(root, settings, source) if missing else False
    this = begin_run(this, source, parent_sha256)
    if not missing:
        log.info("train: run %s is finished, nothing to do", settings.name)
        return this
    train_stages(this, source, PhotoStore(settings, source).get, TrainResources(use_gpu), missing)
    return this


def load_origin(root: str, settings: TrainSettings) -> tuple[dataset.Dataset, str]:
    """The dataset that a run is trained on, and its parent's sha256. UserError where either can't be used."""
    source = dataset.load_dataset(root, settings.dataset)
    for split in ("train", "val"):
        if not source.manifest["splits"][split]:
            raise UserError(f"dataset `{settings.dataset}` has no {split} photos; give it some, or change its split.")
    return source, pretrained.load_pretrained(
        resnet.build(settings.model, len(source.classes)), root, settings, source.classes
    )


def check_resources(root: str, settings: TrainSettings, source: dataset.Dataset) -> bool:
    """Joins the cluster; UserError when a run can't end well on it. Returns whether GPUs are used."""
    connection.connect()
    fewest, _ = settings.workers
    use_gpu = resources.decide_gpus(settings.use_gpu, fewest, "train.use_gpu", resources.TRAIN)
    resources.check_cpus(0 if use_gpu else fewest, "train.num_workers")
    store, memory = resources.object_store_bytes(), resources.memory_bytes(use_gpu)
    preflight.check_run(root, settings, source, use_gpu=use_gpu, object_store=store, memory=memory)
    return use_gpu


def train_stages(
    this: Run,
    source: dataset.Dataset,
    photos: Callable[[], BlockRefs],
    means: TrainResources,
    stages: Sequence[resnet.StageName],
) -> None:
    """Trains stages of a run that has begun, and publishes them. photos: asked for when they are needed."""
    for stage in stages:
        job = StageJob(this, stage, source.classes, source.digest, {}, 1, means.report)
        _fit_stage(job, photos, means)
        _publish(job)


def _fit_stage(job: StageJob, photos: Callable[[], BlockRefs], means: TrainResources) -> None:
    """Runs a stage to its end. Workers that leave or are lost are replaced, as long as that gains anything."""
    uri, vain = storage.join(job.run.uri, job.stage), 0
    newest = checkpoint.newest_valid(uri)
    while True:
        num_threads = (
            1 if means.use_gpu else int(means.devices_per_worker or resources.cpus_per_worker(job.run.settings.workers[1]))
        )
        is_cached = job.stage == "frozen" and storage.exists(feature_cache.cache_uri(job.run, job.digest))
        job = job._replace(blocks={} if is_cached else photos(), num_threads=num_threads)
        before, error = newest, None
        try:
            if train_stage(job, SINGLE_WORKER[means.use_gpu]) if means.in_process else _run_workers(job, means):
                return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            error = failure
        newest = checkpoint.newest_valid(uri)
        vain = vain + 1 if newest == before else 0
        if error is not None and vain == MAX_RESTARTS_WITHOUT_PROGRESS:
            raise error
        what = "workers left" if error is None else f"workers were lost ({str(error).strip().splitlines()[-1][:200]})"
        log.warning("train: %s; going on from %s", what, newest or "the start")


def _run_workers(job: StageJob, means: TrainResources) -> bool:
    """One group of workers, until the stage's end or, False, until they leave."""
    filesystem, path = storage.locate(job.run.uri)
    fewest, most = job.run.settings.workers
    trainer = ray.train.torch.TorchTrainer(
        run_train_worker,  # type: ignore[arg-type]  # it may return something
        train_loop_config=job._asdict(),
        torch_config=TorchConfig(),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
            use_gpu=means.use_gpu,
            resources_per_worker={"GPU": means.devices_per_worker or 1} if means.use_gpu else {"CPU": job.num_threads},
            label_selector=resources.node_selector(resources.TRAIN) if means.use_gpu else None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            name=job.stage,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[*means.callbacks],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # an epoch is one line, ours
            worker_runtime_env={} if means.use_gpu else {"env_vars": MALLOC_ENV},
        ),
    )
    result: Any = trainer.fit()
    return bool(result.return_value)


def _publish(job: StageJob) -> None:
    """Writes the whole network as the stage's best epoch left it."""
    settings, uri = job.run.settings, storage.join(job.run.uri, job.stage)
    net = initial_network(job)
    state = loop.TrainState(**checkpoint.restore_best(uri, trained_module(net, job.stage)))
    facts = {
        "run": settings.name,
        "stage": job.stage,
        "epoch": state.epoch,
        "val_accuracy": state.val_accuracies[-1],
        "classes": job.classes,
        "model": settings.model.model_dump(),
        "precision": settings.precision,
    }
    publish_model(job.run.model_uri(job.stage), net, facts)
