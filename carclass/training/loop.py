"""One stage on one worker: epochs of steps, validation, early stopping. Knows nothing of Ray."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from carclass.config.schema import StageSettings, UnfrozenSettings
from carclass.models import resnet
from carclass.training.checkpoint import TrainedParts
from carclass.training.dataloader import DROPOUT, Batch


class Loader(Protocol):
    """Where samples come from: FeatureBatches or PhotoBatches."""

    num_steps: int

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's steps after its first `start` samples."""

    def val(self) -> Iterator[Batch]:
        """The val split."""


@dataclass
class TrainState:
    """How far a stage is: what its checkpoints hold besides tensors."""

    epoch: int = 0  # those completed
    val_accuracies: list[float] = field(default_factory=list)  # of them
    steps: list[list[float]] = field(default_factory=list)  # of the next one: each step's summed loss, hits, samples
    seconds: float = 0.0  # spent on the next one

    @property
    def samples(self) -> int:
        """How many samples of the next epoch's order have been trained on."""
        return int(sum(count for _, _, count in self.steps))

    @property
    def best_epoch(self) -> int:
        """The first of the epochs with the highest val accuracy."""
        return self.val_accuracies.index(max(self.val_accuracies)) + 1


class EpochResult(NamedTuple):
    """What is told of an epoch."""

    metrics: dict[str, float]
    steps: list[dict[str, float]]  # `step` counted from 1, and the mean loss, accuracy and lr of each


class Callbacks(NamedTuple):
    """What a loop does besides training, on every worker alike."""

    save: Callable[[TrainState, bool], None] = lambda *_: None  # where training is; whether it must be
    finish: Callable[[TrainState, EpochResult], None] = lambda *_: None  # the epoch just finished
    leaving: Callable[[], bool] = lambda: False  # asked after every step; the answer is the same on every worker
    every: int | None = None  # steps between checkpoints


class Trainee(NamedTuple):
    """What is trained, and how."""

    trained: TrainedParts  # the classifier (frozen) or the whole network (unfrozen), without DDP
    forward: nn.Module  # its module, wrapped where there are several workers
    stage: StageSettings
    autocast: torch.autocast
    seed: int
    piece: int | None = None  # samples that a worker computes at once; None: its share of a step


def make_trained(module: nn.Module, stage: StageSettings) -> TrainedParts:
    """A module as a stage begins, with all that checkpoints hold of it."""
    average = None if stage.ema_decay is None else copy.deepcopy(module).requires_grad_(False)
    return TrainedParts(module, make_optimizer(module, stage), average)


def make_optimizer(module: nn.Module, stage: StageSettings) -> torch.optim.Optimizer:
    """The stage's optimizer for what trains; biases and normalisation are not decayed. Fused: one pass over it all.

    Each block's rate is the one above's times the stage's layer_decay, that of the last block and the classifier 1.
    """
    layer_decay = stage.layer_decay if isinstance(stage, UnfrozenSettings) else 1.0
    grouped: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            grouped.setdefault((resnet.depth_from_head(name), parameter.ndim > 1), []).append(parameter)
    groups = [
        {"params": found, "scale": layer_decay**above, "weight_decay": stage.weight_decay if decayed else 0.0}
        for (above, decayed), found in sorted(grouped.items(), key=lambda item: item[0])
    ]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9, fused=True)
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=stage.lr, fused=True)


def learning_rate(stage: StageSettings, progress: float) -> float:
    """The rate after `progress` epochs: a linear warm-up, then constant or a cosine to zero."""
    if progress < stage.warmup_epochs:
        return stage.lr * progress / stage.warmup_epochs
    if stage.schedule == "constant":
        return stage.lr
    share = (progress - stage.warmup_epochs) / max(stage.epochs - stage.warmup_epochs, 1e-9)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def train_epochs(trainee: Trainee, batches: Loader, state: TrainState, keeping: Callbacks) -> bool:
    """Trains on from a state until the last epoch or until patience runs out; False when told to leave before."""
    while not is_done(trainee.stage, state):
        if not train_epoch(trainee, batches, state, keeping):
            return False
        keeping.finish(state, finish_epoch(trainee, batches, state))
    return True


def is_done(stage: StageSettings, state: TrainState) -> bool:
    """Whether a stage is at its end."""
    waited = state.epoch - state.best_epoch if state.epoch else 0
    out_of_patience = stage.patience is not None and waited >= stage.patience
    return state.epoch >= stage.epochs or (out_of_patience and state.epoch >= max(stage.keep_epochs, default=0))


def train_epoch(trainee: Trainee, batches: Loader, state: TrainState, keeping: Callbacks) -> bool:
    """Every train sample that state's epoch has not seen yet, once; False when told to leave before its end."""
    resnet.set_train_mode(trainee.trained.module)
    started = time.perf_counter() - state.seconds
    fresh: list[Tensor] = []  # stays on the device, so that no step waits for the one before
    left = False
    for batch in batches.train(state.epoch + 1, state.samples):
        step = state.epoch * batches.num_steps + len(state.steps) + len(fresh) + 1
        fresh.append(train_step(trainee, batch, step, batches.num_steps))
        left = keeping.leaving()
        due = keeping.every is not None and step % keeping.every == 0
        if left or due:
            state.steps += _sum_over_workers(torch.stack(fresh)).tolist()
            state.seconds = time.perf_counter() - started
            fresh.clear()
            keeping.save(state, left)
        if left:
            return False
    if fresh:
        state.steps += _sum_over_workers(torch.stack(fresh)).tolist()
    state.seconds = time.perf_counter() - started
    return True


def train_step(trainee: Trainee, batch: Batch, step: int, num_steps: int) -> Tensor:
    """One step; returns this worker's tally. step: counted from the stage's start, from 1; num_steps: of an epoch."""
    epoch = (step - 1) // num_steps + 1
    for group in trainee.trained.optimizer.param_groups:
        group["lr"] = learning_rate(trainee.stage, step / num_steps) * group["scale"]
    trainee.trained.optimizer.zero_grad(set_to_none=True)
    *others, last = split_batch(batch, trainee.piece)
    tallies = []
    with trainee.forward.no_sync() if isinstance(trainee.forward, DistributedDataParallel) else nullcontext():
        tallies += [backward(trainee, piece, epoch) for piece in others]
    tallies.append(backward(trainee, last, epoch))  # workers exchange the sum of all pieces' gradients
    trainee.trained.optimizer.step()
    if trainee.trained.average is not None:
        update_average(trainee, step)
    return torch.stack(tallies).sum(0)


def split_batch(batch: Batch, size: int | None) -> Iterator[Batch]:
    """A batch in pieces of at most `size` samples; None: whole."""
    size = size or len(batch.ids)
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        yield Batch(batch.inputs[part], batch.labels[part], batch.weight, batch.ids[part])


def backward(trainee: Trainee, batch: Batch, epoch: int) -> Tensor:
    """Adds to the gradients; returns this worker's tally."""
    for module in trainee.trained.module.modules():
        if isinstance(module, resnet.SampleDropout):
            module.draw(trainee.seed + DROPOUT, epoch, batch.ids, batch.inputs.device)
    with trainee.autocast:
        logits = trainee.forward(batch.inputs)
    loss = functional.cross_entropy(
        logits.float(), batch.labels, reduction="sum", label_smoothing=trainee.stage.label_smoothing
    )
    (loss * batch.weight).backward()
    return _count_batch(loss.detach(), logits.detach(), batch)


@torch.no_grad()
def update_average(trainee: Trainee, step: int) -> None:
    """Moves the average towards the weights: an exponential moving average, younger where few steps were taken."""
    assert trainee.trained.average is not None
    assert trainee.stage.ema_decay is not None
    decay = min(trainee.stage.ema_decay, (1 + step) / (10 + step))  # as in TensorFlow's ExponentialMovingAverage
    ours, theirs = ([*module.parameters()] for module in (trainee.trained.average, trainee.trained.module))
    get_ema_multi_avg_fn(decay)(ours, theirs, None)


def finish_epoch(trainee: Trainee, batches: Loader, state: TrainState) -> EpochResult:
    """Validates, and moves state on to the next epoch."""
    started, epoch, lr = time.perf_counter(), state.epoch + 1, partial(learning_rate, trainee.stage)
    loss, hits, count = (math.fsum(column) for column in zip(*state.steps, strict=True))
    metrics = {"epoch": epoch, "train_loss": loss / count, "train_accuracy": hits / count, "lr": lr(epoch)}
    metrics |= validate(trainee, batches)
    metrics["seconds"] = state.seconds + time.perf_counter() - started
    steps = [
        {"step": i, "loss": loss / count, "accuracy": hits / count, "lr": lr(epoch - 1 + i / batches.num_steps)}
        for i, (loss, hits, count) in enumerate(state.steps, 1)
    ]
    state.epoch, state.steps, state.seconds = epoch, [], 0.0
    state.val_accuracies.append(metrics["val_accuracy"])
    return EpochResult(metrics, steps)


@torch.inference_mode()
def validate(trainee: Trainee, batches: Loader) -> dict[str, float]:
    """Every val sample once over all workers: val_loss (without label smoothing) and val_accuracy."""
    module = trainee.trained.best.eval()
    tallies = []
    for batch in batches.val():
        with trainee.autocast:
            logits = module(batch.inputs)
        tallies.append(
            _count_batch(functional.cross_entropy(logits.float(), batch.labels, reduction="sum"), logits, batch)
        )
    loss, hits, count = _sum_over_workers(torch.stack(tallies).sum(0)).tolist()
    return {"val_loss": loss / count, "val_accuracy": hits / count}


def _count_batch(loss: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """float64 (3,) on the device: summed loss, hits and samples; zeros for samples that another worker counts."""
    hits = (logits.argmax(1) == batch.labels).sum()
    tally = torch.stack([loss.double(), hits.double(), hits.new_full((), len(logits)).double()])
    return tally if batch.weight else torch.zeros_like(tally)


def _sum_over_workers(totals: Tensor) -> Tensor:
    if distributed.is_initialized():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        shared = totals.to(device)
        distributed.all_reduce(shared)
        return shared.cpu()
    return totals
