"""One worker's part of a training stage."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch

from carclass import storage
from carclass.cluster import telemetry
from carclass.cluster.device import choose_device
from carclass.config.schema import StageName
from carclass.data import formats
from carclass.errors import UserError
from carclass.models import classifier
from carclass.models.classifier import Classifier
from carclass.models.gpu_memory import report_out_of_memory
from carclass.runs.environment import record_environment
from carclass.runs.run import Run
from carclass.training import checkpoint, cuda_graphs, feature_cache, loop, pretrained
from carclass.training.allocator import keep_freed_memory
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.dataloader import PhotoLoader, PhotoSamples
from carclass.training.learner import Learner, make_learner
from carclass.training.photo_store import BlockRefs, get_blocks
from carclass.training.preemption import StepCheck, WorkerContext, checkpoint_on_interrupt, is_node_draining
from carclass.training.stage_progress import StageProgress

OUT_OF_MEMORY_REMEDIES: dict[str, str] = {
    "frozen": "Use fewer `train.frozen.views` or a smaller `train.model.image_size`, under another `train.name`, or "
    "GPUs with more memory.",
    "unfrozen": "Set a lower `train.unfrozen.micro_batch_size`, which may change when a run resumes, or use GPUs with "
    "more memory, and run the same command again.",
}


DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
"""Statistics of BatchNorm never change, and gradients need no copy of their own."""


class StageJob(NamedTuple):
    """Arguments of a stage's workers, the same for all."""

    run: Run
    stage: StageName
    classes: list[str]
    dataset_digest: str
    blocks: BlockRefs  # empty if features are cached
    num_threads: int
    report: Callable[[loop.Metrics], None] | None = None  # this and the next: see TrainResources
    verbose: bool = True
    is_refit: bool = False  # train on val photos too


def cache_uri(job: StageJob) -> str:
    """Return the URI of the features of a job's frozen stage."""
    digest = f"{job.dataset_digest}, train and val" if job.is_refit else job.dataset_digest
    return feature_cache.cache_uri(job.run, digest)


def run_train_worker(job_fields: dict[str, Any]) -> bool:
    """Train a stage in a worker of Ray Train. Return False if preempted."""
    context = ray.train.get_context()
    worker = WorkerContext(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), is_node_draining
    )
    return train_stage(StageJob(**job_fields), worker)


def train_stage_in_process(job: StageJob, *, use_gpu: bool) -> bool:
    """Train a stage by a single worker in this process, without Ray Train. Return False if preempted."""
    device = choose_device(use_gpu)
    with nullcontext() if use_gpu else keep_freed_memory():
        return train_stage(job, WorkerContext(0, 1, device, lambda: False))


def train_stage(job: StageJob, worker: WorkerContext) -> bool:
    """Train a stage from its newest checkpoint. Return False if preempted."""
    with report_out_of_memory(OUT_OF_MEMORY_REMEDIES[job.stage]):
        return _train_from_checkpoint(job, worker)


def _train_from_checkpoint(job: StageJob, worker: WorkerContext) -> bool:
    settings, stage = job.run.settings, getattr(job.run.settings, job.stage)
    torch.set_num_threads(job.num_threads)
    net = pretrained.initial_network(job.run, job.stage, job.classes).to(worker.device)
    net.prepare_stage(stage)
    loader = _make_loader(job, net, worker)
    precision = "fp32" if job.stage == "frozen" else settings.precision  # a linear layer gains nothing from bf16
    autocast = classifier.autocast(precision, worker.device)
    learner = make_learner(checkpoint.trained_module(net, job.stage), stage, autocast, settings.seed)
    state = _restore(job, learner)
    learner = _wrap_forward(learner, job, net, worker)
    return _train(job, worker, learner, loader, state)


def _wrap_forward(learner: Learner, job: StageJob, net: Classifier, worker: WorkerContext) -> Learner:
    """Return the learner with DDP if there are several workers, or with CUDA graphs if they are faster."""
    settings, stage = job.run.settings, learner.stage
    if worker.num_workers > 1:
        return learner._replace(forward=ray.train.torch.prepare_model(learner.module, parallel_strategy_kwargs=DDP))
    if job.stage == "unfrozen" and (learner.micro_batch_size or stage.batch_size) >= stage.batch_size:
        forward = cuda_graphs.capture_if_faster(net, stage.batch_size, settings.train_size, settings.precision)
        return learner._replace(forward=forward)
    return learner


def _make_loader(job: StageJob, net: Classifier, worker: WorkerContext) -> loop.Loader:
    """Return the worker's loader: of photos (unfrozen) or cached features (frozen), which are computed if missing."""
    settings = job.run.settings
    share = {"seed": settings.seed, "rank": worker.rank, "num_workers": worker.num_workers}
    share |= {"balanced": settings.sampling == "balanced"}
    samples = [PhotoSamples(blocks, **share) for blocks in get_blocks(job.blocks, settings.model.image_size)]
    if job.stage == "unfrozen":
        assert settings.unfrozen is not None
        return PhotoLoader(
            samples[0], samples[1], settings.augmentation, settings.unfrozen, worker.device, net.normalisation
        )
    assert settings.frozen is not None
    uri = cache_uri(job)
    if samples:
        feature_cache.write_cache(uri, net, samples, job.run, worker.device)
    return feature_cache.open_cache(uri, settings.frozen.batch_size, worker.device, **share)


def _restore(job: StageJob, learner: Learner) -> loop.TrainState:
    """Load the newest checkpoint, which the driver has verified, and return its state."""
    uri = storage.join(job.run.uri, job.stage)
    names = checkpoint.resumable_names(uri)
    if not names:
        return loop.TrainState()
    newest = storage.join(uri, names[-1])
    state = checkpoint.restore_checkpoint(newest, learner)
    return formats.build(loop.TrainState, state, "checkpoint", newest)


def _train(job: StageJob, worker: WorkerContext, learner: Learner, loader: loop.Loader, state: loop.TrainState) -> bool:
    """Run the loop; rank 0 writes checkpoints and metrics."""
    if worker.rank > 0:
        callbacks = loop.Callbacks(on_epoch_end=partial(_report_epoch, job), after_step=StepCheck(worker))
        return loop.train_epochs(learner, loader, state, callbacks)
    record_environment(job.run.uri, job.stage, worker.device, job.run.settings.precision)
    writer = CheckpointWriter(job.run, job.stage, learner, state)
    check = StepCheck(worker, writer.is_checkpoint_due)
    progress = StageProgress(f"{job.run.settings.name} {job.stage}", learner.stage, loader.num_steps, state)
    progress.shows_val = not job.is_refit

    def after_step(step: int) -> loop.StepSignal:
        if job.verbose:
            progress.report_step(step)
        return check(step)

    def on_epoch_end(state: loop.TrainState, metrics: loop.Metrics, steps: list[loop.Metrics]) -> None:
        """Write, then report: the report may end this process at once."""
        if job.verbose:
            progress.report_epoch(metrics)
        writer.finish_epoch(state, metrics, steps)
        if job.run.folder == "experiments":  # a sweep exports the metrics of its trials itself
            telemetry.report_epoch(job.run.settings.name, job.stage, metrics)
        if job.report is not None:
            writer.wait_for_metrics()
            _report_epoch(job, state, metrics, steps)

    callbacks = loop.Callbacks(writer.save, on_epoch_end, after_step)
    try:
        with checkpoint_on_interrupt():
            return loop.train_epochs(learner, loader, state, callbacks)
    except loop.DivergedError:
        if job.run.folder == "experiments":
            telemetry.report_divergence(job.run.settings.name, job.stage)
        with suppress(UserError):  # of a write: the divergence is the cause to tell
            writer.wait()
        raise
    finally:
        writer.wait()


def _report_epoch(job: StageJob, state: loop.TrainState, metrics: loop.Metrics, _steps: list[loop.Metrics]) -> None:
    """Report an epoch of the last stage, except its last epoch: it is reported once the stage is published."""
    if job.report is None or job.stage != job.run.stages[-1]:
        return
    if not loop.is_done(getattr(job.run.settings, job.stage), state):
        job.report(metrics)
