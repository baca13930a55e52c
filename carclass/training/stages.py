"""A dataset → a run: one Ray Train run per stage, frozen then unfrozen, each resumed under its own name."""

import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from torch import nn
from torchvision.models.resnet import ResNet

from carclass import cluster, config, dataset, lineage, model, storage
from carclass.errors import UserError
from carclass.progress import say
from carclass.training import checkpoint, features, loop
from carclass.training.feed import Block, FeatureBatches, Feed, PhotoBatches, pixels_of

log = logging.getLogger(__name__)
DECODE_ROWS = 128
"""Photos per decoded block: 20 MB at 224 pixels."""


class Job(NamedTuple):
    """What every worker of a stage is given."""

    run: lineage.Run
    stage: model.StageName
    classes: list[str]
    digest: str  # of the dataset
    blocks: dict[str, list[ray.ObjectRef]]  # decoded photos by split
    num_threads: int


def run(root: str, settings: config.Train) -> lineage.Run:
    """Trains `<root>/experiments/<name>`, or what is missing of it. UserError for wrong settings, data or weights."""
    source = dataset.load(root, settings.dataset)
    for split in ("train", "val"):
        if not source.manifest["splits"][split]:
            raise UserError(f"dataset `{settings.dataset}` has no {split} photos; give it some, or change its split.")
    parent_sha256 = model.load_parent(model.build(settings.model, len(source.classes)), settings)
    this = lineage.begin(root, settings, source, parent_sha256)
    missing = [stage for stage in this.stages if not this.is_finished(stage)]
    if not missing:
        log.info("train: run %s is finished, nothing to do", settings.name)
        return this
    cluster.connect()
    use_gpu = cluster.gpus(settings.use_gpu, settings.num_workers, "train.use_gpu")
    cluster.check_cpus(0 if use_gpu else settings.num_workers, "train.num_workers")
    blocks = {split: decode(source, split, settings.model.image_size) for split in ("train", "val")}
    for stage in missing:
        job = Job(this, stage, source.classes, source.digest, blocks, _threads(settings, use_gpu))
        _publish(job, _fit(job, use_gpu))
    return this


def _threads(settings: config.Train, use_gpu: bool) -> int:
    """Threads of a worker: all of the machine's cores on CPUs, shared among the workers."""
    return 1 if use_gpu else max(1, int(ray.cluster_resources()["CPU"]) // settings.num_workers)


def decode(source: dataset.Dataset, split: str, size: int) -> list[ray.ObjectRef]:
    """A split's photos, decoded once through Ray Data; the blocks stay in the object store."""
    rows = cluster.stream(source, ["image_id", "key", "label", "image"], split)
    index = {name: i for i, name in enumerate(source.classes)}
    decode_rows = partial(decode_batch, index=index, size=size)
    decoded = rows.map_batches(decode_rows, batch_size=DECODE_ROWS, batch_format="pyarrow")
    return list(decoded.materialize().to_numpy_refs())


def decode_batch(batch: pa.Table, index: dict[str, int], size: int) -> dict[str, np.ndarray]:
    """A Block's arrays from a dataset's rows."""
    names = [f"{i}/{key}" for i, key in zip(batch["image_id"].to_pylist(), batch["key"].to_pylist(), strict=True)]
    ids = np.array([int(storage.sha256(name.encode())[:16], 16) for name in names], np.uint64)
    labels = np.array([index[label] for label in batch["label"].to_pylist()], np.int64)
    return {"pixels": pixels_of(batch["image"].to_pylist(), size), "labels": labels, "ids": ids}


def _fit(job: Job, use_gpu: bool) -> ray.train.Checkpoint:
    """Runs a stage on its workers, or goes on with it; returns the checkpoint of its best epoch."""
    filesystem, path = storage.locate(job.run.uri)
    settings = job.run.settings
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config=job._asdict(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1} if use_gpu else {"CPU": job.num_threads},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            name=job.stage,
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # an epoch is one line, ours
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=settings.keep_checkpoints, checkpoint_score_attribute="score"
            ),
        ),
    )
    best = trainer.fit().get_best_checkpoint("score", "max")
    assert best is not None, f"stage {job.stage} of {settings.name} ended without a checkpoint"
    return best


def _publish(job: Job, best: ray.train.Checkpoint) -> None:
    """Writes the whole network as the stage's best epoch left it."""
    settings = job.run.settings
    net = start_of(job)
    module = trained_part(net, job.stage)
    with best.as_directory() as folder:
        optimizer = loop.make_optimizer(list(module.parameters()), getattr(settings, job.stage))
        state = checkpoint.load_folder(Path(folder), module, optimizer)
    facts = {
        "run": settings.name,
        "stage": job.stage,
        "epoch": state["epoch"],
        "val_accuracy": state["best_val_accuracy"],
        "classes": job.classes,
        "model": settings.model.model_dump(),
        "precision": settings.precision,
    }
    checkpoint.publish_model(job.run.best(job.stage), net, facts)


def start_of(job: Job) -> ResNet:
    """The network as a stage finds it: the parent's weights, or the frozen stage's best."""
    settings = job.run.settings
    torch.manual_seed(settings.seed)  # the classifier's first weights, the same on every worker
    net = model.build(settings.model, len(job.classes))
    if job.stage == "unfrozen" and settings.frozen is not None:
        net.load_state_dict(checkpoint.read_model(job.run.best("frozen"))[0])
    else:
        model.load_parent(net, settings)
    return net


def trained_part(net: ResNet, stage: str) -> nn.Module:
    """What a stage's checkpoints hold: the classifier alone, or the whole network."""
    return net.fc if stage == "frozen" else net


def _work(given: dict[str, Any]) -> None:
    """A worker's part of a stage."""
    job = Job(**given)
    settings, context = job.run.settings, ray.train.get_context()
    torch.set_num_threads(job.num_threads)
    device = ray.train.torch.get_device()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    feeds = [
        Feed(
            [Block(**block) for block in ray.get(job.blocks[s])], seed=settings.seed, rank=rank, num_workers=num_workers
        )
        for s in ("train", "val")
    ]
    net = start_of(job).to(device)
    parameters = model.prepare_stage(net, job.stage)
    stage = getattr(settings, job.stage)
    batches: loop.Batches
    if job.stage == "frozen":
        cached = features.load_or_compute(net, feeds[0], feeds[1], job.run, job.digest, device)
        batches = FeatureBatches(feeds[0], feeds[1], cached, stage.batch_size, device)
    else:
        batches = PhotoBatches(feeds[0], feeds[1], settings.augmentation, stage.batch_size, device)
    module = trained_part(net, job.stage)
    optimizer = loop.make_optimizer(parameters, stage)
    precision = "fp32" if job.stage == "frozen" else settings.precision  # a linear layer gains nothing from bf16
    forward = ray.train.torch.prepare_model(module) if num_workers > 1 else module
    trainee = loop.Trainee(module, forward, optimizer, stage, model.autocast(precision, device), settings.seed + rank)
    state = None
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            state = checkpoint.load_folder(Path(folder), module, optimizer)
    loop.run(trainee, batches, state, lambda metrics, kept: _report(job, trainee, metrics, kept))


def _report(job: Job, trainee: loop.Trainee, metrics: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes an epoch's metrics and checkpoint, and tells Ray; the first worker does it for all."""
    # Of equal epochs the first is the best, for Ray's choice of checkpoints as for ours.
    scored = {**metrics, "score": metrics["val_accuracy"] - 1e-9 * metrics["epoch"]}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(scored)
        return
    job.run.add_metrics({"stage": job.stage, **metrics, "time": time.time()})
    say(
        f"{job.run.settings.name} {job.stage} {metrics['epoch']}/{trainee.stage.epochs}: "
        f"loss {metrics['train_loss']:.3f}, val accuracy {metrics['val_accuracy']:.3f}, {metrics['seconds']:.1f} s"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_folder(Path(folder), trainee.module, trainee.optimizer, state)
        ray.train.report(
            scored,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"epoch-{metrics['epoch']:04d}",
        )
