"""Backbones of timm: the architectures `timm:NAME`.

timm is imported by the functions that need it, as that takes a second.
"""

import copy
import os
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from carclass.config.model_settings import TIMM, ModelSettings
from carclass.errors import UserError, suggest_names
from carclass.models.classifier import LARGEST_DEPTH, Classifier, make_head
from carclass.models.preprocessing import Normalisation

KEY = "train.model.architecture"
HUB = "https://huggingface.co"
"""Host of the weights that timm's authors publish; HF_ENDPOINT names a mirror, as for the hub's own tools."""


class TimmClassifier(Classifier):
    """A network of timm without its classifier, as `backbone`, and the head."""

    backbone: Any

    def __init__(self, settings: ModelSettings, num_classes: int) -> None:
        super().__init__()
        self.backbone = _create_backbone(settings)
        if not hasattr(self.backbone, "group_matcher"):
            raise UserError(
                f"`{KEY}`: timm does not tell the groups of layers of {settings.architecture.removeprefix(TIMM)}, "
                "which learning rates depend on. Choose another network."
            )
        self.normalisation = normalisation(settings.architecture)
        self.head_name = str(pretrained_config(settings.architecture).classifier)
        width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.fc = make_head(settings.dropout, int(width), num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (N,num_features) of float normalised RGB (N,3,S,S)."""
        features: Tensor = self.backbone(x)
        return features

    def depths(self) -> dict[str, float]:
        """Return the depths of all parameters: those of timm's layer groups, over the same range as a ResNet's."""
        from timm.models import group_parameters

        numbers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=False), reverse=True)
        last = max(numbers.values())
        depths = {f"backbone.{name}": LARGEST_DEPTH * (1 - number / last) for name, number in numbers.items()}
        return {name: depths.get(name, 0.0) for name, _ in self.named_parameters()}

    def published_name(self, name: str) -> str:
        """Return timm's name of a tensor."""
        if name.startswith("fc.1."):
            return f"{self.head_name}.{name.removeprefix('fc.1.')}"
        return name.removeprefix("backbone.")


def build(settings: ModelSettings, num_classes: int) -> TimmClassifier:
    """Build the untrained network. Raise UserError if timm has no such architecture, or it takes other photos."""
    net = TimmClassifier(settings, num_classes)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


@cache
def pretrained_config(architecture: str) -> Any:
    """Return timm's record of an architecture's published weights. Raise UserError if timm has no such architecture."""
    import timm

    name = architecture.removeprefix(TIMM)
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # of an unknown tag
        config = None
    if config is None:
        plain, _, tag = name.partition(".")
        known = timm.list_models(pretrained=True) if tag and timm.is_model(plain) else timm.list_models()
        hint = suggest_names(name, known, TIMM)
        raise UserError(
            f"`{KEY}`: timm {timm.__version__} has no model {name}{f'; {hint}' if hint else '. Correct the name.'}"
        )
    if not isinstance(config.classifier, str):
        raise UserError(f"`{KEY}`: {name} has several classifiers, which is not supported. Choose another network.")
    return config


def normalisation(architecture: str) -> Normalisation:
    """Return the scale of the input that an architecture's published weights expect."""
    config = pretrained_config(architecture)
    return Normalisation(tuple(config.mean), tuple(config.std))


def weights_uri(architecture: str) -> str:
    """Return the URI of an architecture's published weights. Raise UserError if there are none."""
    config = pretrained_config(architecture)
    if config.hf_hub_id is None:
        raise UserError(
            f"`train.parent`: no weights of {architecture} are published as safetensors. Give the URI of a file, or "
            "choose another architecture."
        )
    host = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    return f"{host}/{config.hf_hub_id}/resolve/main/model.safetensors"


def _create_backbone(settings: ModelSettings) -> nn.Module:
    """Return timm's network without a classifier. Raise UserError if it takes photos of another size only."""
    import timm

    config, name = pretrained_config(settings.architecture), settings.architecture.removeprefix(TIMM)
    plain = timm.create_model(name, num_classes=0)
    if not config.fixed_input_size:
        return plain
    size = settings.image_size
    for options in ({"dynamic_img_size": True}, {"img_size": size}):  # adapts its positions, or is built for the size
        with suppress(TypeError, AssertionError, RuntimeError):
            net = timm.create_model(name, num_classes=0, **options)
            copy.deepcopy(net).to("meta")(torch.zeros(1, 3, size, size, device="meta"))
            if _shapes(net) == _shapes(plain):  # published weights fit
                return net
    raise UserError(
        f"`train.model.image_size` is {size}, which {name} cannot take. Set it to {config.input_size[-1]}, or choose "
        "another architecture."
    )


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}
