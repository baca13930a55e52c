"""The training loop of a stage on one worker: epochs of steps, validation, early stopping. Without Ray."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from carclass.config.schema import StageSettings
from carclass.errors import UserError
from carclass.models import classifier
from carclass.training.dataloader import Batch
from carclass.training.distributed import sum_over_workers
from carclass.training.learner import (
    Learner,
    clip_gradients,
    has_finite_weights,
    set_learning_rate,
    step_rate,
    update_ema,
)
from carclass.training.sample_order import DROPOUT

Metrics = dict[str, float]
"""Of an epoch: `epoch`, `train_loss`, `train_accuracy`, `lr`, `val_loss`, `val_accuracy`, `seconds`. Of a step: `step`
(from 1), `loss`, `accuracy`, `lr`."""


class DivergedError(UserError):
    """Error of a training whose loss, logits or weights are not finite.

    step: of the epoch, from 1. quantity: `loss`, `weights` or `val loss`.
    """

    def __init__(self, message: str, epoch: int = 1, step: int = 1, quantity: str = "loss") -> None:
        super().__init__(message)  # defaults: unpickling passes the message alone, then restores the rest
        self.epoch, self.step, self.quantity = epoch, step, quantity


class Loader(Protocol):
    """The batches of a worker: a FeatureLoader or a PhotoLoader."""

    num_steps: int

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the train batches of an epoch after its first `start` samples."""

    def val(self) -> Iterator[Batch]:
        """Yield the val batches."""


@dataclass
class TrainState:
    """The progress of a stage, as its checkpoints record it."""

    epoch: int = 0  # completed epochs
    val_accuracies: list[float] = field(default_factory=list)  # of the completed epochs
    steps: list[list[float]] = field(default_factory=list)  # of the current epoch: summed loss, hits, samples
    seconds: float = 0.0  # spent on the current epoch

    @property
    def samples(self) -> int:
        """Return the number of samples of the current epoch that have been trained on."""
        return int(sum(count for _, _, count in self.steps))

    @property
    def best_epoch(self) -> int:
        """Return the first epoch, from 1, with the highest val accuracy."""
        return self.val_accuracies.index(max(self.val_accuracies)) + 1


class StepSignal(NamedTuple):
    """Interruption of an epoch after a step, the same on every worker."""

    is_preempted: bool = False
    is_checkpoint_due: bool = False


class Callbacks(NamedTuple):
    """Hooks of the loop, called on every worker at the same step."""

    save: Callable[[TrainState], None] = lambda _: None  # a checkpoint to resume from
    on_epoch_end: Callable[[TrainState, Metrics, list[Metrics]], None] = lambda *_: None  # (state, epoch's, steps')
    after_step: Callable[[int], StepSignal] = lambda _: StepSignal()  # (step of the stage, from 1)


def train_epochs(learner: Learner, loader: Loader, state: TrainState, callbacks: Callbacks) -> bool:
    """Train from a state until the last epoch or until patience runs out. Return False if preempted."""
    while not is_done(learner.stage, state):
        if not train_epoch(learner, loader, state, callbacks):
            return False
        callbacks.on_epoch_end(state, *finish_epoch(learner, loader, state))
    return True


def is_done(stage: StageSettings, state: TrainState) -> bool:
    """Return True if a stage has had its last epoch or is out of patience."""
    epochs_without_gain = state.epoch - state.best_epoch if state.epoch else 0
    out_of_patience = stage.patience is not None and epochs_without_gain >= stage.patience
    return state.epoch >= stage.epochs or (out_of_patience and state.epoch >= max(stage.keep_epochs, default=0))


def train_epoch(learner: Learner, loader: Loader, state: TrainState, callbacks: Callbacks) -> bool:
    """Train on the samples of the current epoch that are left. Return False if preempted.

    Raise DivergedError at the next checkpoint, or at the end of the epoch, if a loss or a weight is not finite.
    """
    classifier.set_train_mode(learner.module)
    started = time.perf_counter() - state.seconds
    tallies: list[Tensor] = []  # on the device, so that no step waits for the previous one
    for batch in loader.train(state.epoch + 1, state.samples):
        step = state.epoch * loader.num_steps + len(state.steps) + len(tallies) + 1
        tallies.append(train_step(learner, batch, step, loader.num_steps))
        signal = callbacks.after_step(step)
        if any(signal):
            _record_steps(learner, loader, state, tallies, started)
            callbacks.save(state)
        if signal.is_preempted:
            return False
    _record_steps(learner, loader, state, tallies, started)
    return True


def _record_steps(learner: Learner, loader: Loader, state: TrainState, tallies: list[Tensor], started: float) -> None:
    """Move the tallies of steps, summed over workers, to the state. Raise DivergedError before any is saved."""
    if tallies:
        state.steps += sum_over_workers(torch.stack(tallies)).tolist()
        tallies.clear()
    state.seconds = time.perf_counter() - started
    finite = [math.isfinite(loss) for loss, _, _ in state.steps]
    if not all(finite):
        raise _diverged(learner.stage, "loss", state.epoch + 1, finite.index(False) + 1, loader.num_steps)
    if not has_finite_weights(learner):
        raise _diverged(learner.stage, "weights", state.epoch + 1, len(finite), loader.num_steps)


def _diverged(stage: StageSettings, what: str, epoch: int, step: int, num_steps: int) -> DivergedError:
    rate = step_rate(stage, (epoch - 1) * num_steps + step, num_steps)
    precision = ", `train.precision: fp32`" if stage.name == "unfrozen" else ""
    return DivergedError(
        f"training diverged in the {stage.name} stage: {what} not finite in epoch {epoch}, step {step} of {num_steps} "
        f"(learning rate {rate:.3g}). Nothing after the last checkpoint is kept. Start a run of another `train.name` "
        f"with a lower `train.{stage.name}.lr`, more `warmup_epochs`, `clip_grad_norm: 1`{precision}, or several of "
        "these.",
        *(epoch, step, what),
    )


def train_step(learner: Learner, batch: Batch, step: int, num_steps: int) -> Tensor:
    """Update the weights and return this worker's tally, see _tally.

    step: counted over all epochs of the stage, from 1. num_steps: steps per epoch.
    """
    epoch = (step - 1) // num_steps + 1
    set_learning_rate(learner, step, num_steps)
    learner.optimizer.zero_grad(set_to_none=True)
    *first, last = split_batch(batch, learner.micro_batch_size)
    with learner.forward.no_sync() if isinstance(learner.forward, DistributedDataParallel) else nullcontext():
        tallies = [backward(learner, micro_batch, epoch) for micro_batch in first]
    tallies.append(backward(learner, last, epoch))  # workers exchange the gradients of all micro-batches at once
    clip_gradients(learner)
    learner.optimizer.step()
    update_ema(learner, step)
    return torch.stack(tallies).sum(0)


def split_batch(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Yield micro-batches of at most `size` samples; None: the whole batch."""
    size = size or len(batch.ids)
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        yield Batch(batch.inputs[part], batch.labels[part], batch.weight, batch.ids[part])


def backward(learner: Learner, batch: Batch, epoch: int) -> Tensor:
    """Add the gradients of a batch and return this worker's tally."""
    for dropout in learner.parts.dropouts:
        dropout.draw(learner.seed + DROPOUT, epoch, batch.ids, batch.inputs.device)
    with learner.autocast:
        logits = learner.forward(batch.inputs)
    loss = functional.cross_entropy(
        logits.float(), batch.labels, reduction="sum", label_smoothing=learner.stage.label_smoothing
    )
    (loss * batch.weight).backward()
    return _tally(loss.detach(), logits.detach(), batch)


def finish_epoch(learner: Learner, loader: Loader, state: TrainState) -> tuple[Metrics, list[Metrics]]:
    """Validate, advance the state to the next epoch, and return the metrics of the epoch and of each step.

    Raise DivergedError, with the state unchanged, if the val loss is not finite.
    """
    started, epoch, num_steps = time.perf_counter(), state.epoch + 1, loader.num_steps
    loss, hits, count = (math.fsum(column) for column in zip(*state.steps, strict=True))
    metrics: Metrics = {"epoch": epoch, "train_loss": loss / count, "train_accuracy": hits / count}
    metrics |= {"lr": step_rate(learner.stage, epoch * num_steps, num_steps), **validate(learner, loader)}
    if not math.isfinite(metrics["val_loss"]):
        raise _diverged(learner.stage, "val loss", epoch, num_steps, num_steps)
    metrics["seconds"] = state.seconds + time.perf_counter() - started
    steps = []
    for step, (loss, hits, count) in enumerate(state.steps, 1):
        lr = step_rate(learner.stage, (epoch - 1) * num_steps + step, num_steps)
        steps.append({"step": step, "loss": loss / count, "accuracy": hits / count, "lr": lr})
    state.epoch, state.steps, state.seconds = epoch, [], 0.0
    state.val_accuracies.append(metrics["val_accuracy"])
    return metrics, steps


@torch.inference_mode()
def validate(learner: Learner, loader: Loader) -> Metrics:
    """Return val_loss (without label smoothing) and val_accuracy, over the val samples of all workers."""
    module = learner.eval_module.eval()
    tallies = []
    for batch in loader.val():
        with learner.autocast:
            logits = module(batch.inputs)
        loss = functional.cross_entropy(logits.float(), batch.labels, reduction="sum")
        tallies.append(_tally(loss, logits, batch))
    loss_sum, hits, count = sum_over_workers(torch.stack(tallies).sum(0)).tolist()
    return {"val_loss": loss_sum / count, "val_accuracy": hits / count}


def _tally(loss: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """Return summed loss, hits and number of samples: float64 (3,); zeros for samples that another worker counts."""
    hits = (logits.argmax(1) == batch.labels).sum()
    tally = torch.stack([loss.double(), hits.double(), hits.new_full((), len(logits)).double()])
    return tally if batch.weight else torch.zeros_like(tally)
