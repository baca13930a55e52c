"""ResNet50 with a dropout and linear head, its frozen BatchNorm, and the trainable parameters of each stage."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings, StageName
from carclass.models import preprocessing
from carclass.models.sample_rng import random_bits

Precision = Literal["bf16", "fp32"]


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


class FoldedResNet(ResNet):
    """torchvision's ResNet of FoldedBottlenecks, with the same tensor names."""

    def __init__(self, num_blocks: list[int]) -> None:
        super().__init__(FoldedBottleneck, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 logits (N,num_classes) of float normalised RGB (N,3,S,S)."""
        return self.classify(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (N,2048 or 512) of float normalised RGB (N,3,S,S)."""
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return float32 logits (N,num_classes) of pooled features (N,2048 or 512).

        In float32 under autocast too: bfloat16 has 8 bits, so that logits of different classes would be equal.
        """
        if features.is_meta:  # a device without autocast, on which memory is estimated
            return self.fc(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.fc(features.float())


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
    net.fc = nn.Sequential(SampleDropout(settings.dropout, width), nn.Linear(width, num_classes))
    nn.init.zeros_(net.fc[1].bias)
    return net.to(memory_format=torch.channels_last)


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


def prepare_stage(net: ResNet, stage: StageName) -> None:
    """Set the trainable parameters of a stage, and train mode.

    frozen: the head only. unfrozen: all parameters. BatchNorm statistics stay frozen in both, as in the Keras project.
    """
    net.requires_grad_(stage == "unfrozen")
    net.fc.requires_grad_(True)
    set_train_mode(net)


def depth_from_head(name: str) -> int:
    """Return a tensor's distance from layer4: 0 for layer4 and the head, 4 for the stem. name: its state dict key."""
    return {"layer3": 1, "layer2": 2, "layer1": 3, "bn1": 4, "conv1": 4}.get(name.split(".")[0], 0)


def set_train_mode(net: nn.Module) -> None:
    """Put the network in train mode, but BatchNorm in eval mode."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def num_features(net: ResNet) -> int:
    """Return the width of the features that the head takes: 2048 or 512."""
    return int(net.get_submodule("fc.1").in_features)


def autocast(precision: Precision, device: torch.device, *, cached: bool = True) -> torch.autocast:
    """Return the autocast context of a forward pass. cached: reuse the bf16 casts of weights within the context."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=cached)
