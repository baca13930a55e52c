"""A dataset → a run: one Ray Train run per stage, frozen then unfrozen, each resumed from its checkpoints."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from torch import nn
from torchvision.models.resnet import ResNet

from carclass import capacity, cluster, config, dataset, lineage, model, storage, telemetry
from carclass.errors import UserError
from carclass.training import checkpoint, features, graphed, loop, parent, preflight
from carclass.training.departure import Departure, Seat, TorchConfig
from carclass.training.feed import Block, Encoded, Feed, PhotoBatches, pixels_of
from carclass.training.keeper import Keeper

log = logging.getLogger(__name__)
Blocks = dict[str, list[ray.ObjectRef]]
"""A dataset's photos in the object store, of train and val, in this order."""
READ_ROWS = 128
"""Photos per block: 20 MB when decoded to 224 pixels."""
MAX_VAIN = 3
"""How often workers are replaced without any checkpoint in between: then it is the program that fails."""
MAX_WAIT = 120.0
"""Seconds until photos in the object store are taken for lost."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_ARENA_MAX": "1"}
"""For glibc, in workers on CPUs: what a step gives back, the next one takes again. By default every large tensor would
be asked from the system anew, which clears its pages: a tenth of a step's time."""


class Means(NamedTuple):
    """What a run is trained with."""

    use_gpu: bool
    devices: float | None = None  # GPUs, or CPUs, of each worker; None: one GPU, or as many CPUs as there is room for
    here: bool = False  # by the only worker, in this process and without Ray Train
    tell: Callable[[dict[str, float]], None] | None = (
        None  # of the last stage's epochs but its very last; called by every worker
    )
    callbacks: Sequence[Any] = ()  # of Ray Train


class Job(NamedTuple):
    """What every worker of a stage is given."""

    run: lineage.Run
    stage: model.StageName
    classes: list[str]
    digest: str  # of the dataset
    blocks: Blocks  # none where features are cached
    num_threads: int
    tell: Callable[[dict[str, float]], None] | None = None


def run(root: str, settings: config.Train) -> lineage.Run:
    """Trains `<root>/experiments/<name>`, or what is missing of it. UserError for wrong settings, data or weights."""
    source, parent_sha256 = origin(root, settings)
    this = lineage.Run(root, settings)
    missing = this.missing
    # Checked before anything is written: a run that is refused can be begun with other settings.
    use_gpu = check(root, settings, source) if missing else False
    this = lineage.begin(this, source, parent_sha256)
    if not missing:
        log.info("train: run %s is finished, nothing to do", settings.name)
        return this
    train(this, source, Held(settings, source).get, Means(use_gpu), missing)
    return this


def origin(root: str, settings: config.Train) -> tuple[dataset.Dataset, str]:
    """The dataset that a run is trained on, and its parent's sha256. UserError where either can't be used."""
    source = dataset.load(root, settings.dataset)
    for split in ("train", "val"):
        if not source.manifest["splits"][split]:
            raise UserError(f"dataset `{settings.dataset}` has no {split} photos; give it some, or change its split.")
    return source, parent.load(model.build(settings.model, len(source.classes)), root, settings, source.classes)


def check(root: str, settings: config.Train, source: dataset.Dataset) -> bool:
    """Joins the cluster; UserError when a run can't end well on it. Returns whether GPUs are used."""
    cluster.connect()
    fewest, _ = settings.workers
    use_gpu = capacity.gpus(settings.use_gpu, fewest, "train.use_gpu", capacity.TRAIN)
    capacity.check_cpus(0 if use_gpu else fewest, "train.num_workers")
    store, memory = capacity.object_store(), capacity.memory(use_gpu)
    preflight.check(root, settings, source, use_gpu=use_gpu, object_store=store, memory=memory)
    return use_gpu


def train(
    this: lineage.Run,
    source: dataset.Dataset,
    photos: Callable[[], Blocks],
    means: Means,
    stages: Sequence[model.StageName],
) -> None:
    """Trains stages of a run that has begun, and publishes them. photos: asked for when they are needed."""
    for stage in stages:
        job = Job(this, stage, source.classes, source.digest, {}, 1, means.tell)
        _fit(job, photos, means)
        _publish(job)


class Held:
    """The train and val photos of a dataset in the object store, where every stage finds them.

    decoded: to the size of the settings, where they fit into memory; encoded ones serve every size.
    """

    def __init__(self, settings: config.Train, source: dataset.Dataset, *, decoded: bool = True) -> None:
        self.settings, self.source, self.decoded = settings, source, decoded
        self.nodes: set[str] = set()
        self.blocks: Blocks = {}

    def get(self) -> Blocks:
        """The blocks of each split; read again once a node is lost, which takes some along."""
        if not self.blocks or self.nodes - capacity.nodes():
            self.nodes, size = capacity.nodes(), None
            if self.decoded:
                size = preflight.decoded_size(self.settings, self.source, capacity.object_store())
            self.blocks = {split: read(self.source, split, size) for split in ("train", "val")}
        return self.blocks


def read(source: dataset.Dataset, split: str, size: int | None) -> list[ray.ObjectRef]:
    """A split's photos, streamed once through Ray Data; the blocks stay in the object store.

    size: pixels of the sides they are decoded to; None: they stay encoded.
    """
    rows = cluster.stream(source, ["image_id", "key", "label", "image"], split)
    index = {name: i for i, name in enumerate(source.classes)}
    held = rows.map_batches(partial(read_batch, index=index, size=size), batch_size=READ_ROWS, batch_format="pyarrow")
    held = held.materialize()
    return list(held.to_arrow_refs() if size is None else held.to_numpy_refs())


def read_batch(batch: pa.Table, index: dict[str, int], size: int | None) -> pa.Table | dict[str, np.ndarray]:
    """A Block's columns from a dataset's rows."""
    names = [f"{i}/{key}" for i, key in zip(batch["image_id"].to_pylist(), batch["key"].to_pylist(), strict=True)]
    ids = np.array([int(storage.sha256(name.encode())[:16], 16) for name in names], np.uint64)
    labels = np.array([index[label] for label in batch["label"].to_pylist()], np.int64)
    if size is None:
        return pa.table({"images": batch["image"], "labels": labels, "ids": ids})
    return {"pixels": pixels_of(batch["image"].to_pylist(), size), "labels": labels, "ids": ids}


def block_of(held: pa.Table | dict[str, np.ndarray], size: int) -> Block:
    """Photos as they lie in the object store, where they stay: nothing is copied."""
    if isinstance(held, dict):
        return Block(**held)
    images = held["images"].combine_chunks()
    return Block(Encoded(images, size), held["labels"].to_numpy(), held["ids"].to_numpy())


def _fit(job: Job, photos: Callable[[], Blocks], means: Means) -> None:
    """Runs a stage to its end. Workers that leave or are lost are replaced, as long as that gains anything."""
    uri, vain = storage.join(job.run.uri, job.stage), 0
    newest = checkpoint.newest_sound(uri)
    while True:
        num_threads = 1 if means.use_gpu else int(means.devices or capacity.cpus_each(job.run.settings.workers[1]))
        is_cached = job.stage == "frozen" and storage.exists(features.place(job.run, job.digest))
        job = job._replace(blocks={} if is_cached else photos(), num_threads=num_threads)
        before, error = newest, None
        try:
            if work(job, ALONE[means.use_gpu]) if means.here else _run_workers(job, means):
                return
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as failure:
            error = failure
        newest = checkpoint.newest_sound(uri)
        vain = vain + 1 if newest == before else 0
        if error is not None and vain == MAX_VAIN:
            raise error
        what = "workers left" if error is None else f"workers were lost ({str(error).strip().splitlines()[-1][:200]})"
        log.warning("train: %s; going on from %s", what, newest or "the start")


def _run_workers(job: Job, means: Means) -> bool:
    """One group of workers, until the stage's end or, False, until they leave."""
    filesystem, path = storage.locate(job.run.uri)
    fewest, most = job.run.settings.workers
    trainer = ray.train.torch.TorchTrainer(
        _work,  # type: ignore[arg-type]  # it may return something
        train_loop_config=job._asdict(),
        torch_config=TorchConfig(),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            num_workers=most if fewest == most else (fewest, most),  # type: ignore[arg-type]
            use_gpu=means.use_gpu,
            resources_per_worker={"GPU": means.devices or 1} if means.use_gpu else {"CPU": job.num_threads},
            label_selector=capacity.selector(capacity.TRAIN) if means.use_gpu else None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees Train V1's
            name=job.stage,
            storage_path=path,
            storage_filesystem=filesystem,
            callbacks=[*means.callbacks],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),  # an epoch is one line, ours
            worker_runtime_env={} if means.use_gpu else {"env_vars": KEEP_MEMORY},
        ),
    )
    result: Any = trainer.fit()
    return bool(result.return_value)


def _publish(job: Job) -> None:
    """Writes the whole network as the stage's best epoch left it."""
    settings, uri = job.run.settings, storage.join(job.run.uri, job.stage)
    net = start_of(job)
    state = loop.State(**checkpoint.restore_best(uri, trained_part(net, job.stage)))
    facts = {
        "run": settings.name,
        "stage": job.stage,
        "epoch": state.epoch,
        "val_accuracy": state.val_accuracies[-1],
        "classes": job.classes,
        "model": settings.model.model_dump(),
        "precision": settings.precision,
    }
    checkpoint.publish_model(job.run.best(job.stage), net, facts)


def start_of(job: Job) -> model.FoldedResNet:
    """The network as a stage finds it: the parent's weights, or the frozen stage's best."""
    settings = job.run.settings
    torch.manual_seed(settings.seed)  # the classifier's first weights, the same on every worker
    net = model.build(settings.model, len(job.classes))
    if job.stage == "unfrozen" and settings.frozen is not None:
        net.load_state_dict(checkpoint.read_model(job.run.best("frozen"))[0])
    else:
        parent.load(net, job.run.root, settings, job.classes)
    return net


def trained_part(net: ResNet, stage: str) -> nn.Module:
    """What a stage's checkpoints hold: the classifier alone, or the whole network."""
    return net.fc if stage == "frozen" else net


def _work(given: dict[str, Any]) -> bool:
    """What Ray Train runs on a worker."""
    context = ray.train.get_context()
    seat = Seat(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), _is_drained)
    return work(Job(**given), seat)


def _is_drained() -> bool:
    return ray.train.get_preemption_info() is not None


ALONE = {use_gpu: Seat(0, 1, torch.device("cuda" if use_gpu else "cpu"), lambda: False) for use_gpu in (False, True)}
"""The seat of an only worker, by whether it has a GPU."""


def work(job: Job, seat: Seat) -> bool:
    """A worker's part of a stage; False when it leaves before the end."""
    settings = job.run.settings
    torch.set_num_threads(job.num_threads)
    net = start_of(job).to(seat.device)
    model.prepare_stage(net, job.stage)
    stage = getattr(settings, job.stage)
    batches = _batches(job, net, seat)
    trained = loop.make_trained(trained_part(net, job.stage), stage)
    state = _restore(job, trained)
    return _train(job, seat, _trainee(job, seat, net, trained), batches, state)


def _trainee(job: Job, seat: Seat, net: model.FoldedResNet, trained: checkpoint.Trained) -> loop.Trainee:
    """What a worker trains: the classifier, or the whole network."""
    settings, stage = job.run.settings, getattr(job.run.settings, job.stage)
    piece, forward = None, trained.module
    autocast = model.autocast("fp32", seat.device)  # a linear layer gains nothing from bf16
    if job.stage == "unfrozen":
        piece, autocast = stage.micro_batch_size, model.autocast(settings.precision, seat.device)
    if seat.num_workers > 1:
        forward = ray.train.torch.prepare_model(forward)
    elif job.stage == "unfrozen" and (piece is None or piece >= stage.batch_size):
        forward = graphed.faster(net, stage.batch_size, settings.model.image_size, settings.precision)
    return loop.Trainee(trained, forward, stage, autocast, settings.seed, piece)


def _batches(job: Job, net: ResNet, seat: Seat) -> loop.Batches:
    """A worker's share of what the stage trains on."""
    settings = job.run.settings
    share = {"seed": settings.seed, "rank": seat.rank, "num_workers": seat.num_workers}
    # Without a time limit, a worker would hold the CPUs for which the tasks wait that make lost photos again.
    held = [ray.get(refs, timeout=MAX_WAIT) for refs in job.blocks.values()]
    blocks = [[block_of(block, settings.model.image_size) for block in split] for split in held]
    feeds = [Feed(split, **share) for split in blocks]
    if job.stage == "unfrozen":
        assert settings.unfrozen is not None
        return PhotoBatches(feeds[0], feeds[1], settings.augmentation, settings.unfrozen, seat.device)
    assert settings.frozen is not None
    if feeds:
        features.write(features.place(job.run, job.digest), net, feeds, job.run, seat.device)
    return features.read(features.place(job.run, job.digest), settings.frozen.batch_size, seat.device, **share)


def _restore(job: Job, trained: checkpoint.Trained) -> loop.State:
    """Where the newest checkpoint left the stage; the driver has seen to it that it is sound."""
    uri = storage.join(job.run.uri, job.stage)
    found = checkpoint.to_go_on_from(uri)
    return loop.State(**checkpoint.restore(storage.join(uri, found[-1]), trained)) if found else loop.State()


def _train(job: Job, seat: Seat, trainee: loop.Trainee, batches: loop.Batches, state: loop.State) -> bool:
    """Runs the loop; the first worker writes for all."""
    told = loop.Keeping(finish=partial(_tell, job), leaving=Departure(seat), every=job.run.settings.checkpoint_steps)
    if seat.rank > 0:
        return loop.run(trainee, batches, state, told)
    keeper = Keeper(job.run, job.stage, trainee.trained, state, quiet=job.tell is not None)

    def finish(state: loop.State, finished: loop.Finished) -> None:
        keeper.finish(state, finished)
        if job.run.folder == "experiments":  # a sweep tells of its trials itself
            telemetry.epoch_finished(job.run.settings.name, job.stage, finished.metrics)
        if job.tell is not None:
            keeper.wait_for_metrics()  # whoever is told may end this process at once
            told.finish(state, finished)

    try:
        return loop.run(trainee, batches, state, told._replace(save=keeper.save, finish=finish))
    finally:
        keeper.wait()


def _tell(job: Job, state: loop.State, finished: loop.Finished) -> None:
    """Tells of an epoch. Whoever is told may end the stage, so its last epoch is told once the stage is published."""
    if job.tell is None or job.stage != job.run.stages[-1]:
        return
    if not loop.is_done(getattr(job.run.settings, job.stage), state):
        job.tell(finished.metrics)
