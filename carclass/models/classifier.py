"""Classifiers: a backbone with a dropout and linear head, and the trainable parameters of each stage."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from carclass.config.schema import StageSettings, UnfrozenSettings
from carclass.models import preprocessing
from carclass.models.precision import Precision, uses_bf16
from carclass.models.preprocessing import IMAGENET, Normalisation
from carclass.models.sample_rng import random_bits

LARGEST_DEPTH = 4.0
"""Depth of a backbone's first layers, see Classifier.depths."""


class SampleDropout(nn.Dropout):
    """Dropout of (N,width) features with a mask drawn per sample from (seed, epoch, id), before each step.

    The masks are therefore independent of the number of workers and of restarts.
    """

    def __init__(self, p: float, width: int) -> None:
        super().__init__(p)
        self.width = width
        self.keep: Tensor | None = None

    def draw(self, seed: int, epoch: int, ids: np.ndarray, device: torch.device) -> None:
        """Draw the masks of the next step's samples. ids: uint64 (N,)."""
        if self.p:
            bits = random_bits(seed, epoch, ids, -(-self.width // 4)).view(np.uint16)[:, : self.width]
            self.keep = preprocessing.to_device(bits >= round(self.p * 2**16), device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs (N,width), masked in train mode only."""
        if not self.training or not self.p:
            return inputs
        assert self.keep is not None, "no masks were drawn for these samples"
        return inputs * self.keep * (1 / (1 - self.p) if self.p < 1 else 0)


class Classifier(nn.Module, ABC):
    """A backbone with the head `fc`, and all that other rooms need to know of an architecture."""

    fc: nn.Sequential  # SampleDropout and Linear
    normalisation: Normalisation = IMAGENET
    """Scale of the input."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (N,num_features) of float normalised RGB (N,3,S,S)."""

    @abstractmethod
    def depths(self) -> dict[str, float]:
        """Return the distance of each parameter from the head by its name: 0 of the last block to LARGEST_DEPTH."""

    @abstractmethod
    def published_name(self, name: str) -> str:
        """Return the name of a tensor in files for other programs. name: its key in the state dict."""

    def prepare_export(self) -> None:
        """Replace, in place, what exporters do not trace well. The network can then only be run."""

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits (N,num_classes) of float normalised RGB (N,3,S,S)."""
        return self.classify(self.features(x))

    def classify(self, features: Tensor) -> Tensor:
        """Return float32 logits (N,num_classes) of pooled features (N,num_features).

        In float32 under autocast too: bfloat16 has 8 bits, so that logits of different classes would be equal.
        """
        if features.is_meta:  # a device without autocast, on which memory is estimated
            logits: Tensor = self.fc(features)
            return logits
        with torch.autocast(features.device.type, enabled=False):
            logits = self.fc(features.float())
            return logits

    @property
    def num_features(self) -> int:
        """Return the width of the features that the head takes."""
        return linear_layer(self.fc).in_features

    @property
    def device(self) -> torch.device:
        """Return the device of the head, and so of the network."""
        return next(self.fc.parameters()).device

    def prepare_stage(self, settings: StageSettings) -> None:
        """Set the trainable parameters of a stage, and train mode.

        frozen: the head only. unfrozen: the last `blocks` of the network too. BatchNorm statistics stay frozen in
        both, as in the Keras project.
        """
        depths = self.depths()
        trained = settings.blocks if isinstance(settings, UnfrozenSettings) else 0
        for name, parameter in self.named_parameters():
            is_head = name.startswith("fc.")
            parameter.requires_grad_(is_head or depths[name] < trained or trained == LARGEST_DEPTH)
        set_train_mode(self)


def make_head(dropout: float, num_features: int, num_classes: int) -> nn.Sequential:
    """Return an untrained head."""
    linear = nn.Linear(num_features, num_classes)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(SampleDropout(dropout, num_features), linear)


def linear_layer(head: nn.Sequential) -> nn.Linear:
    """Return the layer of a head that has weights."""
    layer = head[1]
    assert isinstance(layer, nn.Linear)
    return layer


def set_train_mode(module: nn.Module) -> None:
    """Put a classifier, or its head, in train mode, but BatchNorm in eval mode."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def autocast(precision: Precision, device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Return the autocast context of a forward pass. cached: reuse the bf16 casts of weights within the context."""
    enabled = uses_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cached)
