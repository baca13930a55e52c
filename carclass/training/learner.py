"""A stage's module with its optimizer, moving average and learning rates."""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from carclass.config.schema import StageSettings, UnfrozenSettings
from carclass.models import classifier
from carclass.models.classifier import Classifier


class StepParts(NamedTuple):
    """Parts of a module and its average that every step uses; walking through the modules takes a millisecond."""

    parameters: list[nn.Parameter]
    averages: list[nn.Parameter]  # of the parameters; empty without an average
    dropouts: list[classifier.SampleDropout]


class Learner(NamedTuple):
    """Everything that a training step reads or updates."""

    module: nn.Module  # the classifier (frozen) or the whole network (unfrozen), without DDP
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # exponential moving average of the module's weights
    forward: nn.Module  # the module, as DDP or with CUDA graphs where it runs so
    stage: StageSettings
    autocast: torch.autocast
    seed: int
    parts: "StepParts"

    @property
    def eval_module(self) -> nn.Module:
        """Return the module to validate and publish: the moving average, if there is one."""
        return self.module if self.ema is None else self.ema

    @property
    def micro_batch_size(self) -> int | None:
        """Return the samples of a worker per forward pass; None: its whole share of a step."""
        return self.stage.micro_batch_size if isinstance(self.stage, UnfrozenSettings) else None


def make_learner(module: nn.Module, stage: StageSettings, autocast: torch.autocast, seed: int) -> Learner:
    """Return a stage's learner before its first step; its forward pass is the module's."""
    ema = None if stage.ema_decay is None else copy.deepcopy(module).requires_grad_(False)
    dropouts = [part for part in module.modules() if isinstance(part, classifier.SampleDropout)]
    parts = StepParts([*module.parameters()], [] if ema is None else [*ema.parameters()], dropouts)
    return Learner(module, make_optimizer(module, stage), ema, module, stage, autocast, seed, parts)


def make_optimizer(module: nn.Module, stage: StageSettings) -> torch.optim.Optimizer:
    """Return the stage's optimizer of the trainable parameters; biases and normalisation have no weight decay.

    The learning rate of a block is the stage's own times `layer_decay` to the power of the block's depth.
    """
    layer_decay = stage.layer_decay if isinstance(stage, UnfrozenSettings) else 1.0
    depths = module.depths() if isinstance(module, Classifier) else {}
    parameters: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameters.setdefault((depths.get(name, 0.0), parameter.ndim > 1), []).append(parameter)
    groups = [
        {"params": group, "scale": layer_decay**depth, "weight_decay": stage.weight_decay if is_decayed else 0.0}
        for (depth, is_decayed), group in sorted(parameters.items(), key=lambda item: item[0])
    ]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=0.9, fused=True)
    optimizer = torch.optim.AdamW if stage.optimizer == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=stage.lr, fused=True)


def learning_rate(stage: StageSettings, progress: float) -> float:
    """Return the rate after `progress` epochs: a linear warm-up, then constant or a cosine to zero."""
    if progress < stage.warmup_epochs:
        return stage.lr * progress / stage.warmup_epochs
    if stage.schedule == "constant":
        return stage.lr
    share = (progress - stage.warmup_epochs) / max(stage.epochs - stage.warmup_epochs, 1e-9)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def step_rate(stage: StageSettings, step: int, num_steps: int) -> float:
    """Return the rate of a step. step: counted over all epochs of the stage, from 1. num_steps: steps per epoch.

    The cosine is zero at the end of the last step, which would train nothing: it has the rate at its middle.
    """
    return learning_rate(stage, step / num_steps) or learning_rate(stage, (step - 0.5) / num_steps)


def set_learning_rate(learner: Learner, step: int, num_steps: int) -> None:
    """Set the rate of every parameter group for a step, see step_rate."""
    rate = step_rate(learner.stage, step, num_steps)
    for group in learner.optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def clip_gradients(learner: Learner) -> None:
    """Scale the gradients down to the stage's largest norm, if it has one."""
    if learner.stage.clip_grad_norm is not None:
        clip_grad_norm_(learner.parts.parameters, learner.stage.clip_grad_norm)


def has_finite_weights(learner: Learner) -> bool:
    """Return True if no weight of the module or its moving average is NaN or infinite; waits for the device."""
    parameters = [*learner.parts.parameters, *learner.parts.averages]
    return bool(get_total_norm([parameter.detach() for parameter in parameters]).isfinite())


@torch.no_grad()
def update_ema(learner: Learner, step: int) -> None:
    """Update the moving average, if there is one. step: from 1; the decay is lower in the first steps."""
    if learner.ema is None:
        return
    assert learner.stage.ema_decay is not None
    decay = min(learner.stage.ema_decay, (1 + step) / (10 + step))  # as in TensorFlow's ExponentialMovingAverage
    get_ema_multi_avg_fn(decay)(learner.parts.averages, learner.parts.parameters, None)
