"""One worker's part of a training stage."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn
from torchvision.models.resnet import ResNet

from carclass import storage
from carclass.cluster import telemetry
from carclass.models import resnet
from carclass.runs.run import Run
from carclass.runs.saved_model import read_model
from carclass.training import checkpoint, cuda_graphs, feature_cache, loop, pretrained
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.dataloader import PhotoLoader, PhotoSamples
from carclass.training.photo_store import MAX_WAIT, BlockRefs, open_block
from carclass.training.preemption import PreemptionCheck, WorkerContext


class StageJob(NamedTuple):
    """What every worker of a stage is given."""

    run: Run
    stage: resnet.StageName
    classes: list[str]
    digest: str  # of the dataset
    blocks: BlockRefs  # none where features are cached
    num_threads: int
    report: Callable[[dict[str, float]], None] | None = None


def initial_network(job: StageJob) -> resnet.FoldedResNet:
    """The network as a stage finds it: the parent's weights, or the frozen stage's best."""
    settings = job.run.settings
    torch.manual_seed(settings.seed)  # the classifier's first weights, the same on every worker
    net = resnet.build(settings.model, len(job.classes))
    if job.stage == "unfrozen" and settings.frozen is not None:
        net.load_state_dict(read_model(job.run.model_uri("frozen"))[0])
    else:
        pretrained.load_pretrained(net, job.run.root, settings, job.classes)
    return net


def trained_module(net: ResNet, stage: str) -> nn.Module:
    """What a stage's checkpoints hold: the classifier alone, or the whole network."""
    return net.fc if stage == "frozen" else net


def run_train_worker(given: dict[str, Any]) -> bool:
    """What Ray Train runs on a worker."""
    context = ray.train.get_context()
    seat = WorkerContext(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), _is_drained)
    return train_stage(StageJob(**given), seat)


def _is_drained() -> bool:
    return ray.train.get_preemption_info() is not None


SINGLE_WORKER = {
    use_gpu: WorkerContext(0, 1, torch.device("cuda" if use_gpu else "cpu"), lambda: False) for use_gpu in (False, True)
}
"""The seat of an only worker, by whether it has a GPU."""


def train_stage(job: StageJob, seat: WorkerContext) -> bool:
    """A worker's part of a stage; False when it leaves before the end."""
    settings = job.run.settings
    torch.set_num_threads(job.num_threads)
    net = initial_network(job).to(seat.device)
    resnet.prepare_stage(net, job.stage)
    stage = getattr(settings, job.stage)
    batches = _batches(job, net, seat)
    trained = loop.make_trained(trained_module(net, job.stage), stage)
    state = _restore(job, trained)
    return _train(job, seat, _make_trainee(job, seat, net, trained), batches, state)


def _make_trainee(
    job: StageJob, seat: WorkerContext, net: resnet.FoldedResNet, trained: checkpoint.TrainedParts
) -> loop.Trainee:
    """What a worker trains: the classifier, or the whole network."""
    settings, stage = job.run.settings, getattr(job.run.settings, job.stage)
    piece, forward = None, trained.module
    autocast = resnet.autocast("fp32", seat.device)  # a linear layer gains nothing from bf16
    if job.stage == "unfrozen":
        piece, autocast = stage.micro_batch_size, resnet.autocast(settings.precision, seat.device)
    if seat.num_workers > 1:
        forward = ray.train.torch.prepare_model(forward)
    elif job.stage == "unfrozen" and (piece is None or piece >= stage.batch_size):
        forward = cuda_graphs.capture_if_faster(net, stage.batch_size, settings.model.image_size, settings.precision)
    return loop.Trainee(trained, forward, stage, autocast, settings.seed, piece)


def _batches(job: StageJob, net: ResNet, seat: WorkerContext) -> loop.Loader:
    """A worker's share of what the stage trains on."""
    settings = job.run.settings
    share = {"seed": settings.seed, "rank": seat.rank, "num_workers": seat.num_workers}
    # Without a time limit, a worker would hold the CPUs for which the tasks wait that make lost photos again.
    held = [ray.get(refs, timeout=MAX_WAIT) for refs in job.blocks.values()]
    blocks = [[open_block(block, settings.model.image_size) for block in split] for split in held]
    feeds = [PhotoSamples(split, **share) for split in blocks]
    if job.stage == "unfrozen":
        assert settings.unfrozen is not None
        return PhotoLoader(feeds[0], feeds[1], settings.augmentation, settings.unfrozen, seat.device)
    assert settings.frozen is not None
    if feeds:
        feature_cache.write_cache(feature_cache.cache_uri(job.run, job.digest), net, feeds, job.run, seat.device)
    return feature_cache.open_cache(
        feature_cache.cache_uri(job.run, job.digest), settings.frozen.batch_size, seat.device, **share
    )


def _restore(job: StageJob, trained: checkpoint.TrainedParts) -> loop.TrainState:
    """Where the newest checkpoint left the stage; the driver has seen to it that it is sound."""
    uri = storage.join(job.run.uri, job.stage)
    found = checkpoint.resumable_names(uri)
    return (
        loop.TrainState(**checkpoint.restore_checkpoint(storage.join(uri, found[-1]), trained))
        if found
        else loop.TrainState()
    )


def _train(
    job: StageJob, seat: WorkerContext, trainee: loop.Trainee, batches: loop.Loader, state: loop.TrainState
) -> bool:
    """Runs the loop; the first worker writes for all."""
    told = loop.Callbacks(
        finish=partial(_report_epoch, job), leaving=PreemptionCheck(seat), every=job.run.settings.checkpoint_steps
    )
    if seat.rank > 0:
        return loop.train_epochs(trainee, batches, state, told)
    keeper = CheckpointWriter(job.run, job.stage, trainee.trained, state, quiet=job.report is not None)

    def finish(state: loop.TrainState, finished: loop.EpochResult) -> None:
        keeper.finish(state, finished)
        if job.run.folder == "experiments":  # a sweep tells of its trials itself
            telemetry.epoch_finished(job.run.settings.name, job.stage, finished.metrics)
        if job.report is not None:
            keeper.wait_for_metrics()  # whoever is told may end this process at once
            told.finish(state, finished)

    try:
        return loop.train_epochs(trainee, batches, state, told._replace(save=keeper.save, finish=finish))
    finally:
        keeper.wait()


def _report_epoch(job: StageJob, state: loop.TrainState, finished: loop.EpochResult) -> None:
    """Tells of an epoch. Whoever is told may end the stage, so its last epoch is told once the stage is published."""
    if job.report is None or job.stage != job.run.stages[-1]:
        return
    if not loop.is_done(getattr(job.run.settings, job.stage), state):
        job.report(finished.metrics)
