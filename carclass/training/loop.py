"""One stage on one worker: epochs of steps, validation, early stopping. Knows nothing of Ray."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from carclass import config, model
from carclass.training.feed import Batch


class Batches(Protocol):
    """Where samples come from: FeatureBatches or PhotoBatches."""

    num_steps: int

    def train(self, epoch: int) -> Iterator[Batch]:
        """An epoch's steps."""

    def val(self) -> Iterator[Batch]:
        """The val split."""


class Trainee(NamedTuple):
    """What is trained, and how."""

    module: nn.Module  # the classifier (frozen) or the whole network (unfrozen), without DDP
    forward: nn.Module  # the same, wrapped where there are several workers
    optimizer: torch.optim.Optimizer
    stage: config.Stage
    autocast: torch.autocast
    seed: int  # of dropout, another one on each worker


def make_optimizer(parameters: list[nn.Parameter], stage: config.Stage) -> torch.optim.Optimizer:
    """The stage's optimizer; biases and normalisation are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9)
    kind = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=stage.lr)


def learning_rate(stage: config.Stage, progress: float) -> float:
    """The rate after `progress` epochs: a linear warm-up, then constant or a cosine to zero."""
    if progress < stage.warmup_epochs:
        return stage.lr * progress / stage.warmup_epochs
    if stage.schedule == "constant":
        return stage.lr
    share = (progress - stage.warmup_epochs) / max(stage.epochs - stage.warmup_epochs, 1e-9)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def run(
    trainee: Trainee,
    batches: Batches,
    state: dict[str, Any] | None,
    report: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    """Trains until the last epoch or until patience runs out.

    state: what a checkpoint holds, None at the start. report: called after every epoch, on every worker, with the
    epoch's metrics and the state to keep.
    """
    state = state or {"epoch": 0, "best_val_accuracy": -1.0, "best_epoch": 0}
    patience = trainee.stage.patience
    for epoch in range(state["epoch"] + 1, trainee.stage.epochs + 1):
        if patience is not None and state["best_epoch"] and epoch - 1 - state["best_epoch"] >= patience:
            break
        started = time.perf_counter()
        metrics = {"epoch": epoch, **train_epoch(trainee, batches, epoch), **validate(trainee, batches)}
        metrics["seconds"] = time.perf_counter() - started
        state["epoch"] = epoch
        if metrics["val_accuracy"] > state["best_val_accuracy"]:
            state = {**state, "best_val_accuracy": metrics["val_accuracy"], "best_epoch": epoch}
        report(metrics, dict(state))


def train_epoch(trainee: Trainee, batches: Batches, epoch: int) -> dict[str, float]:
    """Every train sample once; returns train_loss, train_accuracy and the epoch's last lr."""
    model.set_train_mode(trainee.module)
    torch.manual_seed(trainee.seed + 1000 * epoch)  # a resumed run drops out what an undisturbed one does
    totals = torch.zeros(3)
    for step, batch in enumerate(batches.train(epoch)):
        rate = learning_rate(trainee.stage, epoch - 1 + (step + 1) / batches.num_steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        with trainee.autocast:
            logits = trainee.forward(batch.inputs)
        loss = functional.cross_entropy(
            logits.float(), batch.labels, reduction="sum", label_smoothing=trainee.stage.label_smoothing
        )
        trainee.optimizer.zero_grad(set_to_none=True)
        (loss * batch.weight).backward()
        trainee.optimizer.step()
        if batch.weight:
            totals += _tally(loss.detach(), logits.detach(), batch.labels)
    loss_sum, correct, count = _over_workers(totals).tolist()
    return {"train_loss": loss_sum / count, "train_accuracy": correct / count, "lr": rate}


@torch.inference_mode()
def validate(trainee: Trainee, batches: Batches) -> dict[str, float]:
    """Every val sample once over all workers: val_loss (without label smoothing) and val_accuracy."""
    trainee.module.eval()
    totals = torch.zeros(3)
    for batch in batches.val():
        if batch.weight:
            with trainee.autocast:
                logits = trainee.module(batch.inputs)
            loss = functional.cross_entropy(logits.float(), batch.labels, reduction="sum")
            totals += _tally(loss, logits, batch.labels)
    loss_sum, correct, count = _over_workers(totals).tolist()
    return {"val_loss": loss_sum / count, "val_accuracy": correct / count}


def _tally(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, hits and samples."""
    return torch.tensor([float(loss), float((logits.argmax(1) == labels).sum()), float(len(labels))])


def _over_workers(totals: Tensor) -> Tensor:
    if distributed.is_initialized():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        shared = totals.to(device)
        distributed.all_reduce(shared)
        return shared.cpu()
    return totals
