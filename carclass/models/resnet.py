"""ResNet50 and smaller ones, with frozen BatchNorm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings
from carclass.models.classifier import LARGEST_DEPTH, Classifier, make_head

DEPTHS = {"layer3": 1.0, "layer2": 2.0, "layer1": 3.0, "bn1": LARGEST_DEPTH, "conv1": LARGEST_DEPTH}
"""Depths of the parameters by the first part of their names, see Classifier.depths; of others 0."""


class FoldedBottleneck(Bottleneck):
    """torchvision's Bottleneck with frozen BatchNorm folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N,C',H',W') of (N,C,H,W), as torchvision's block."""
        shortcut = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        x = self.relu(conv_norm(self.conv1, self.bn1, x))
        x = self.relu(conv_norm(self.conv2, self.bn2, x))
        x = conv_norm(self.conv3, self.bn3, x)
        x += shortcut
        return self.relu(x)


class FoldedResNet(Classifier, ResNet):
    """torchvision's ResNet of FoldedBottlenecks, with the same tensor names."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    relu: nn.ReLU
    maxpool: nn.MaxPool2d
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    avgpool: nn.AdaptiveAvgPool2d
    fc: nn.Sequential

    def __init__(self, num_blocks: list[int]) -> None:
        super().__init__(FoldedBottleneck, num_blocks)

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (N,2048 or 512) of float normalised RGB (N,3,S,S)."""
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def depths(self) -> dict[str, float]:
        """Return the depths of all parameters: each of the four layers has one."""
        return {name: DEPTHS.get(name.split(".")[0], 0.0) for name, _ in self.named_parameters()}

    def published_name(self, name: str) -> str:
        """Return torchvision's name of a tensor."""
        return name.replace("fc.1.", "fc.")

    def prepare_export(self) -> None:
        """Take torchvision's forward pass: exporters fold its BatchNorms once, ours would fold them in every pass."""
        for module in self.modules():
            if isinstance(module, FoldedBottleneck):
                module.__class__ = Bottleneck
        self.__class__ = ResNet


class NarrowResNet(FoldedResNet):
    """FoldedResNet with a quarter of the planes in every block and the stem at full width."""

    def _make_layer(self, block: type, planes: int, *args: int, **kwargs: object) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **kwargs)


class FrozenNorm(torch.autograd.Function):
    """BatchNorm with frozen statistics on a GPU, by the kernels of SyncBatchNorm.

    With the kernels of BatchNorm the backward pass takes three times as long and converts every gradient to another
    memory format: half of the step time of ResNet50 in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        """Return x (N,C,H,W) normalised. weight, bias: those of norm."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        ctx.save_for_backward(x, weight, norm.running_mean, scale)
        return torch.batch_norm_elemt(x, weight, bias, norm.running_mean, scale, norm.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        """Return the gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        gradient, zeros = gradient.contiguous(memory_format=torch.channels_last), torch.zeros_like(mean)
        _, _, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            gradient, x, mean, scale, weight, input_g=True, weight_g=True, bias_g=True
        )
        return torch.batch_norm_elemt(gradient, weight, zeros, zeros, scale, 0.0), None, weight_grad, bias_grad


ARCHITECTURES: dict[str, tuple[type[FoldedResNet], list[int], int]] = {
    "resnet50": (FoldedResNet, [3, 4, 6, 3], 2048),
    "resnet26-narrow": (NarrowResNet, [2, 2, 2, 2], 512),
}
"""Name → type, blocks per layer, width of the features."""


def build(settings: ModelSettings, num_classes: int) -> FoldedResNet:
    """Build the untrained network: float normalised RGB (N,3,S,S) → logits (N,num_classes)."""
    network_type, num_blocks, width = ARCHITECTURES[settings.architecture]
    net = network_type(num_blocks)
    if settings.stride_in_1x1:
        for module in net.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    net.fc = make_head(settings.dropout, width, num_classes)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution equal to `conv` followed by `norm` in eval mode.

    norm: any module with BatchNorm's tensors. The result is differentiable in all tensors of both.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Apply a convolution and its BatchNorm: folded into one on a CPU with frozen statistics, else one by one.

    Folding changes outputs and gradients by rounding only. It scales a few million weights per pass instead of many
    times more activations, and keeps no activations of BatchNorm for the backward pass.
    """
    if norm.training:
        return norm(conv(x))
    if x.device.type != "cpu":  # folding would launch hundreds of small kernels
        x = conv(x)
        return FrozenNorm.apply(x, norm, norm.weight, norm.bias) if x.is_cuda and torch.is_grad_enabled() else norm(x)
    weight, bias = fold(conv, norm)
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
