"""Training of a run, frozen then unfrozen, each stage resumed from its checkpoints.

A stage is a run of Ray Train; with a single worker on CPUs of a cluster of the job's own, it is trained in the job.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch

from carclass import storage
from carclass.cluster import connection, resources
from carclass.cluster.interrupts import keep_interrupt_handler
from carclass.cluster.ray_storage import ray_filesystem
from carclass.config.schema import StageName, TrainSettings
from carclass.data import dataset, formats
from carclass.data.lease import hold_lease
from carclass.errors import UserError, find_user_error
from carclass.formatting import count_text, rate_text
from carclass.models import architectures
from carclass.runs.divergence_record import record_divergence, remove_divergence
from carclass.runs.metrics_loggers import check_loggers
from carclass.runs.preprocessing_record import record_preprocessing
from carclass.runs.run import REFIT, Run, begin_run, record_best_stage
from carclass.runs.saved_model import publish_model, read_model
from carclass.training import checkpoint, preflight, pretrained, refit
from carclass.training.allocator import WORKER_ENV
from carclass.training.loop import DivergedError, Metrics, TrainState
from carclass.training.memory_probe import measure_step
from carclass.training.photo_store import BlockRefs, PhotoStore
from carclass.training.preemption import TorchConfig
from carclass.training.worker import StageJob, cache_uri, run_train_worker, train_stage_in_process

log = logging.getLogger(__name__)
MAX_RESTARTS_WITHOUT_PROGRESS = 3
"""Failures of the workers in a row without a new checkpoint after which the error is raised."""


class TrainResources(NamedTuple):
    """Devices of a run's workers, and the receiver of its metrics."""

    use_gpu: bool
    devices_per_worker: float | None = None  # GPUs or CPUs; None: one GPU, or an equal share of the CPUs
    in_process: bool = False  # train by one worker in this process, without Ray Train
    # Called on every worker with the metrics of each epoch of the last stage, except its last epoch.
    report: Callable[[Metrics], None] | None = None
    verbose: bool = True  # print a line per epoch
    callbacks: Sequence[Any] = ()  # of Ray Train


def train_run(root: str, settings: TrainSettings) -> Run:
    """Train the unfinished stages of `<root>/experiments/<name>`.

    Raise UserError if settings, data, weights or cluster don't fit, before anything is written.
    """
    run = Run(root, settings)
    if not is_trained(run):
        connection.check_cluster()
    source, parent_sha256 = load_run_inputs(root, settings)
    if is_trained(run):
        begin_run(run, source, parent_sha256)
        for name in {*run.stages, run.model_name}:
            read_model(run.model_uri(name))  # an error if it is damaged
        log.info("train: run %s is finished, nothing to do", settings.name)
        warn_if_unfreezing_hurt(run, source)
        return run
    use_gpu = check_resources(root, settings, source, probe=True)
    with hold_lease(run.uri, "train"):
        begin_run(run, source, parent_sha256)
        log_resumed(run)
        train_resources = all_resources(settings, use_gpu=use_gpu)
        photos = PhotoStore(settings, source)
        train_stages(run, source, photos.get, train_resources, run.unfinished_stages)
        refit_run(run, source, photos.get, train_resources)
    warn_if_unfreezing_hurt(run, source)
    return run


def is_trained(run: Run) -> bool:
    """Return True if all stages of a run are finished, and its refit."""
    return not run.unfinished_stages and (not run.settings.refit or run.has_model(REFIT))


def refit_run(
    run: Run, source: dataset.Dataset, get_photos: Callable[[], BlockRefs], train_resources: TrainResources
) -> None:
    """Train and publish the refit of a run whose stages are finished, if its settings ask for one that it lacks."""
    if is_trained(run):
        return
    again = refit.begin_refit(run, source)
    joined = lambda: refit.join_splits(get_photos())  # noqa: E731
    train_stages(again, source, joined, train_resources, again.unfinished_stages, is_refit=True)
    refit.publish_refit(run, again)


def log_resumed(run: Run) -> None:
    """Log how many epochs of each stage an interrupted job has finished and saved, if it has begun any."""
    trained = Counter(row["stage"] for row in run.metrics())
    if not trained:
        return
    done = {stage: trained[stage] for stage in run.stages}
    for stage in run.unfinished_stages:
        saved = checkpoint.resumable_names(storage.join(run.uri, stage))
        done[stage] = int(saved[-1].split("-")[1]) if saved else 0
    if not any(done.values()):
        log.info("train: run %s begins again, as it was interrupted before its first checkpoint", run.settings.name)
        return
    counts = [f"{done[stage]} of {getattr(run.settings, stage).epochs} {stage} epochs" for stage in run.stages]
    log.info("train: run %s is resumed, %s are done", run.settings.name, " and ".join(counts))


def load_run_inputs(root: str, settings: TrainSettings) -> tuple[dataset.Dataset, str]:
    """Return the dataset to train on and the sha256 of the parent's weights. Raise UserError if either is unusable."""
    source = dataset.load_dataset(root, settings.dataset)
    preflight.check_splits(source)
    net = architectures.build(settings.model, len(source.classes))
    return source, pretrained.load_pretrained(net, root, settings, source.classes)


def check_resources(root: str, settings: TrainSettings, source: dataset.Dataset, *, probe: bool = False) -> bool:
    """Connect to the cluster and run the preflight check. Return True if GPUs are used.

    probe: measure the memory of a step on a free GPU, which takes some seconds, instead of estimating it.
    """
    check_loggers(root, settings)
    connection.connect({"root": root})
    min_workers, _ = settings.workers
    use_gpu = resources.decide_gpus(settings.use_gpu, min_workers, "train.use_gpu", resources.TRAIN)
    resources.check_cpus(0 if use_gpu else min_workers, "train.num_workers")
    object_store, memory, step = resources.object_store_bytes(), resources.memory_bytes(use_gpu), None
    if probe and use_gpu and settings.unfrozen is not None and memory is not None:
        step = resources.run_on_gpu(measure_step, settings, len(source.classes))
    preflight.check_run(root, settings, source, use_gpu=use_gpu, object_store=object_store, memory=memory, step=step)
    return use_gpu


def all_resources(settings: TrainSettings, *, use_gpu: bool) -> TrainResources:
    """Return the resources of a run that has the cluster to itself."""
    # Ray Train's processes take long to start, and could not outlive this one on a cluster of its own.
    in_process = settings.workers == (1, 1) and not use_gpu and connection.has_own_cluster()
    return TrainResources(use_gpu, in_process=in_process)


def train_stages(
    run: Run,
    source: dataset.Dataset,
    get_photos: Callable[[], BlockRefs],
    train_resources: TrainResources,
    stages: Sequence[StageName],
    *,
    is_refit: bool = False,
) -> None:
    """Train and publish stages of a run that has begun. get_photos: called by stages that need photos."""
    record_preprocessing(run, source)
    for stage in stages:
        job = StageJob(run, stage, source.classes, source.digest, {}, 1)
        job = job._replace(report=train_resources.report, verbose=train_resources.verbose, is_refit=is_refit)
        try:
            _fit_stage(job, get_photos, train_resources)
        except DivergedError as error:
            with suppress(UserError):  # an error of the write: report the divergence instead, the cause
                record_divergence(run, stage, error.epoch, error.step, error.quantity)
            raise
        _publish(job)
        remove_divergence(run, stage)
    if not run.unfinished_stages:
        record_best_stage(run)


def warn_if_unfreezing_hurt(run: Run, source: dataset.Dataset) -> None:
    """Warn if the unfrozen stage of a finished run is worse on val than the frozen one, beyond chance.

    source: the dataset of the run. A smaller difference is logged as within chance.
    """
    unfrozen, num_photos = run.settings.unfrozen, source.manifest["splits"]["val"]
    if unfrozen is None or run.best_stage == "unfrozen":
        return
    before, after = run.best_val_accuracy("frozen"), run.best_val_accuracy("unfrozen")
    if before == after:
        return
    if is_chance(before, after, num_photos):
        log.info(
            "train: run %s has val accuracy %.3f unfrozen and %.3f frozen: within chance for %s. Its model is the "
            "frozen stage's best epoch.",
            *(run.settings.name, after, before, count_text(num_photos, "val photo")),
        )
    else:
        log.warning(
            "train: unfreezing made run %s worse: val accuracy %.3f (unfrozen) after %.3f (frozen). Its model is the "
            "frozen stage's best epoch. To gain from unfreezing, try a lower `train.unfrozen.lr` (now %g), more "
            "`warmup_epochs` (now %g) or `epochs` (now %d), or `clip_grad_norm: 1`, under another `train.name`.",
            *(run.settings.name, after, before, unfrozen.lr, unfrozen.warmup_epochs, unfrozen.epochs),
        )


def describe_stages(run: Run) -> dict[str, str]:
    """Return the val accuracy of each stage of a finished run by its name in tables.

    That of the unfrozen stage has its gain over the frozen one in parentheses, if the run has both and its dataset is
    still there.
    """
    texts = {f"{stage} val accuracy": rate_text(run.best_val_accuracy(stage)) for stage in run.stages}
    source = dataset.find_dataset(run.root, run.settings.dataset)
    if len(run.stages) > 1 and source is not None:
        before, after = map(run.best_val_accuracy, run.stages)
        verdict = "within chance" if is_chance(before, after, source.manifest["splits"]["val"]) else "beyond chance"
        texts[f"{run.stages[-1]} val accuracy"] += f" ({after - before:+.3f}, {verdict})"
    return texts


def is_chance(first: float, second: float, num_photos: int) -> bool:
    """Return True if two accuracies on as many photos are within 1.96 standard errors of each other.

    Binomial standard error of the difference of independent samples. Which photos are correct is not recorded for
    val; on the same photos the error is usually smaller, so a gap beyond it is rarely chance.
    """
    mean = (first + second) / 2
    return abs(first - second) <= 1.96 * math.sqrt(2 * mean * (1 - mean) / num_photos)


def _fit_stage(job: StageJob, get_photos: Callable[[], BlockRefs], train_resources: TrainResources) -> None:
    """Train a stage to its end. Restart preempted or lost workers, while checkpoints advance."""
    uri, failures = storage.join(job.run.uri, job.stage), 0
    newest = checkpoint.newest_valid(uri)
    while True:
        job = job._replace(
            blocks={} if _has_cached_features(job) else get_photos(), num_threads=_count_threads(job, train_resources)
        )
        previous, error = newest, None
        try:
            if _run_workers(job, train_resources):
                return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            if (cause := find_user_error(failure)) is not None:  # a restart would not help
                raise cause from failure
            error = failure
        newest = checkpoint.newest_valid(uri)
        failures = failures + 1 if newest == previous else 0
        if error is not None and failures >= MAX_RESTARTS_WITHOUT_PROGRESS:
            if has_crashed_process(error):
                raise _lasting_crash(job, error) from error
            raise error
        reason = "workers were preempted"
        if error is not None:
            reason = f"workers were lost ({str(error).strip().splitlines()[-1][:200]})"
        log.warning("train: %s; resuming from %s", reason, newest or "the start")


def has_crashed_process(error: Exception) -> bool:
    """Return True if a worker's process ended by itself: the others fail in consequence, with errors of their own."""
    failures = [error, getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    causes = [getattr(failure, "health_check_failure", failure) for failure in failures]
    return any(isinstance(cause, ray.exceptions.RayActorError) for cause in causes)


def _lasting_crash(job: StageJob, error: Exception) -> UserError:
    return UserError(
        f"{job.run.settings.name}: workers of the {job.stage} stage crashed {MAX_RESTARTS_WITHOUT_PROGRESS} times in a "
        f"row without a new checkpoint ({str(error).strip().splitlines()[-1][:200]}). The usual cause is too little "
        "memory: set `train.unfrozen.micro_batch_size`, use nodes with more memory, or run fewer jobs at once. Then "
        "run the same command again; it resumes."
    )


def _has_cached_features(job: StageJob) -> bool:
    return job.stage == "frozen" and storage.exists(cache_uri(job))


def _count_threads(job: StageJob, train_resources: TrainResources) -> int:
    """Return the CPU threads of each worker."""
    if train_resources.use_gpu:
        return 1
    return int(train_resources.devices_per_worker or resources.cpus_per_worker(job.run.settings.workers[1]))


def _run_workers(job: StageJob, train_resources: TrainResources) -> bool:
    """Run a group of workers until the end of the stage. Return False if they are preempted."""
    use_gpu = train_resources.use_gpu
    if train_resources.in_process:
        return train_stage_in_process(job, use_gpu=use_gpu)
    filesystem, path = ray_filesystem(storage.join(job.run.uri, job.stage))
    min_workers, max_workers = job.run.settings.workers
    if job.verbose:
        log.info("train: starting %s of the %s stage", count_text(max_workers, "worker"), job.stage)
    devices = {"GPU": train_resources.devices_per_worker or 1} if use_gpu else {"CPU": job.num_threads}
    trainer = ray.train.torch.TorchTrainer(
        run_train_worker,  # type: ignore[arg-type]  # it may return something
        train_loop_config=job._asdict(),
        torch_config=TorchConfig(),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            num_workers=max_workers if min_workers == max_workers else (min_workers, max_workers),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=devices,
            label_selector=resources.node_selector(resources.TRAIN) if use_gpu else None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            name=ray_run_name(job.run, job.stage),
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[*train_resources.callbacks],
            # Workers print lines about epochs, and errors are told here; Ray's own stay in the logs of its session.
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            worker_runtime_env={} if use_gpu else {"env_vars": WORKER_ENV},
        ),
    )
    with keep_interrupt_handler():
        return bool(trainer.fit().return_value)  # type: ignore[attr-defined]  # mypy sees Train V1's


def ray_run_name(run: Run, stage: str) -> str:
    """Return a stage's name on Ray's dashboard: `first-frozen`, or `head-007_lr=3e-4-frozen` in the sweep `head`."""
    return "-".join([*run.folder.split("/")[1:2], run.settings.name, stage])


def _publish(job: StageJob) -> None:
    """Publish the whole network with the weights of the stage's best epoch; of a refit, of the last one."""
    settings, uri = job.run.settings, storage.join(job.run.uri, job.stage)
    net = pretrained.initial_network(job.run, job.stage, job.classes)
    module = checkpoint.trained_module(net, job.stage)
    restored = checkpoint.restore_last(uri, module) if job.is_refit else checkpoint.restore_best(uri, module)
    state = formats.build(TrainState, restored, "checkpoint", uri)
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
