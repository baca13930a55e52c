"""Optimisation of a detection network for inference: folded BatchNorm, cast weights and, on CPUs, fused layers."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from carclass.masking.detectron import BasicStem, BottleneckBlock
from carclass.models.precision import Precision, uses_bf16
from carclass.models.resnet import fold


def optimise_for_inference(network: nn.Module, precision: Precision, device: torch.device) -> None:
    """Fold BatchNorm, cast weights to the precision, move them to the device and fuse layers on CPUs, all in place.

    A fused network can only be run: it has no weights to be saved or moved.
    """
    in_bf16 = uses_bf16(precision, device)
    for module in network.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and hasattr(norm, "running_var"):
            assert norm is not None
            module.weight, module.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in fold(module, norm))
            module.norm = None  # type: ignore[assignment]
        if in_bf16 and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(torch.bfloat16)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.to(device)
    if device.type == "cpu" and _can_fuse(in_bf16=in_bf16):
        _fuse(network)


def _can_fuse(*, in_bf16: bool) -> bool:
    """Return True if oneDNN has convolutions of the precision for the CPU; measured on x86 only."""
    is_available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return (
        is_available
        and platform.machine() in ("x86_64", "AMD64")
        and (not in_bf16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _fuse(network: nn.Module) -> None:
    """Replace `forward` of the convolutions, and of residual blocks around them."""
    fused: dict[nn.Module, FusedConv] = {}
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and module.padding_mode == "zeros":
            has_relu = isinstance(getattr(module, "activation", None), nn.ReLU)
            if getattr(module, "norm", None) is None and (has_relu or getattr(module, "activation", None) is None):
                fused[module] = FusedConv(module, "relu" if has_relu else "none")
    for module in network.modules():
        parts = {name: fused.get(part) for name, part in module.named_children()}
        if type(module) is BottleneckBlock and all(parts.values()):
            module.forward = FusedBottleneck(**parts)  # type: ignore[arg-type]
        elif type(module) is BasicStem and (convolution := parts["conv1"]):
            module.forward = _stem(convolution)
    for module, convolution in fused.items():
        module.forward = convolution
        module.weight = module.bias = None  # type: ignore[assignment]


class FusedConv:
    """A convolution with its activation and sums in one pass, and weights in the order that oneDNN computes in."""

    def __init__(self, layer: nn.Conv2d, activation: str) -> None:
        self.bias, self.dtype, self.activation = layer.bias, layer.weight.dtype, activation
        self.geometry: Any = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *self.geometry)

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Return the output for (N,C,H,W), channels_last, in the dtype of the weights."""
        x = x.to(self.dtype)
        activation = activation or self.activation
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, activation, [], "")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the output for x plus another tensor, after a ReLU."""
        arguments = (x.to(self.dtype), other, self.weight, self.bias, *self.geometry)
        return torch.ops.mkldnn._convolution_pointwise.binary(*arguments, "add", 1.0, "relu", [], "")


class FusedBottleneck:
    """Forward pass of Detectron2's BottleneckBlock."""

    def __init__(self, conv1: FusedConv, conv2: FusedConv, conv3: FusedConv, shortcut: FusedConv | None = None) -> None:
        self.convolutions, self.shortcut = (conv1, conv2, conv3), shortcut

    def __call__(self, x: Tensor) -> Tensor:
        conv1, conv2, conv3 = self.convolutions
        shortcut = x.to(conv1.dtype) if self.shortcut is None else self.shortcut(x)
        return conv3.add(conv2(conv1(x, "relu"), "relu"), shortcut)


def _stem(convolution: FusedConv) -> Callable[[Tensor], Any]:
    """Return the forward pass of Detectron2's BasicStem."""
    return lambda x: functional.max_pool2d(convolution(x, "relu"), kernel_size=3, stride=2, padding=1)
