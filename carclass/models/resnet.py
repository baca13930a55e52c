"""ResNet50 as the original used it: what it is made of, and what of it trains in a stage."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings
from carclass.models import preprocessing
from carclass.models.sample_rng import random_bits

StageName = Literal["frozen", "unfrozen"]
Precision = Literal["bf16", "fp32"]


class FoldedBottleneck(Bottleneck):
    """torchvision's block, whose BatchNorms with frozen statistics are part of the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C',H',W'), as torchvision's."""
        shortcut = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x)
        x = self.relu(conv_norm(self.conv1, self.bn1, x))
        x = self.relu(conv_norm(self.conv2, self.bn2, x))
        x = conv_norm(self.conv3, self.bn3, x)
        x += shortcut
        return self.relu(x)


class FoldedResNet(ResNet):
    """torchvision's ResNet, names of tensors included, of FoldedBottlenecks."""

    def __init__(self, num_blocks: list[int]) -> None:
        super().__init__(FoldedBottleneck, num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N,3,S,S) float normalised RGB → (N,num_classes) logits."""
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """(N,3,S,S) float normalised RGB → (N,2048 or 512) what the classifier sees."""
        x = self.maxpool(self.relu(conv_norm(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


class NarrowResNet(FoldedResNet):
    """A quarter of the planes in every block; the stem keeps its width."""

    def _make_layer(self, block: type, planes: int, *args: int, **kwargs: object) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **kwargs)


class FrozenNorm(torch.autograd.Function):
    """BatchNorm with frozen statistics on a GPU, in the kernels that PyTorch has for SyncBatchNorm.

    With those of BatchNorm itself, made for training, the backward pass takes three times as long and turns every
    gradient to another layout: half of all the time of ResNet50 in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        """(N,C,H,W) → (N,C,H,W); weight, bias: norm's."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        ctx.save_for_backward(x, weight, norm.running_mean, scale)
        return torch.batch_norm_elemt(x, weight, bias, norm.running_mean, scale, norm.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        gradient, none = gradient.contiguous(memory_format=torch.channels_last), torch.zeros_like(mean)
        _, _, to_weight, to_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, scale, weight, input_g=True, weight_g=True, bias_g=True
        )
        return torch.batch_norm_elemt(gradient, weight, none, none, scale, 0.0), None, to_weight, to_bias


class SampleDropout(nn.Dropout):
    """Dropout of (N,width) features whose choices are drawn for each sample, before each step, from its id.

    So neither the number of workers nor a restart changes them.
    """

    def __init__(self, p: float, width: int) -> None:
        super().__init__(p)
        self.width = width
        self.keep: Tensor | None = None

    def draw(self, seed: int, epoch: int, ids: np.ndarray, device: torch.device) -> None:
        """Chooses what the samples of the next step keep. ids: uint64 (N,)."""
        if self.p:
            draws = random_bits(seed, epoch, ids, -(-self.width // 4)).view(np.uint16)[:, : self.width]
            self.keep = preprocessing.upload(draws >= round(self.p * 2**16), device)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N,width) → (N,width); in evaluation as it is."""
        if not self.training or not self.p:
            return inputs
        assert self.keep is not None, "nothing was drawn for these samples"
        return inputs * self.keep * (1 / (1 - self.p) if self.p < 1 else 0)


def build(settings: ModelSettings, num_classes: int) -> FoldedResNet:
    """The untrained network: (N,3,S,S) float normalised RGB → (N,num_classes) logits."""
    if settings.architecture == "resnet50":
        net, num_features = FoldedResNet([3, 4, 6, 3]), 2048
    else:
        net, num_features = NarrowResNet([2, 2, 2, 2]), 512
    if settings.stride_in_1x1:
        for module in net.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    net.fc = nn.Sequential(SampleDropout(settings.dropout, num_features), nn.Linear(num_features, num_classes))
    nn.init.zeros_(net.fc[1].bias)
    return net.to(memory_format=torch.channels_last)


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does what a convolution and its BatchNorm's statistics do together.

    norm: anything with BatchNorm's tensors. Gradients pass through to all of them.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A convolution and its BatchNorm: folded on CPUs where statistics are frozen, else one after the other.

    Folded is the same function with the same gradients, up to rounding. The few million weights are scaled at every
    pass instead of many times more activations, which BatchNorm would also keep for the backward pass.
    """
    if norm.training:
        return norm(conv(x))
    if x.device.type != "cpu":  # folding would cost it hundreds of small kernels, and a pass for the bias
        x = conv(x)
        return FrozenNorm.apply(x, norm, norm.weight, norm.bias) if torch.is_grad_enabled() else norm(x)
    weight, bias = fold(conv, norm)
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def prepare_stage(net: ResNet, stage: StageName) -> None:
    """Sets what trains in a stage.

    frozen: the classifier alone. unfrozen: everything, while BatchNorm keeps its statistics, as in the original.
    """
    net.requires_grad_(stage == "unfrozen")
    net.fc.requires_grad_(True)
    set_train_mode(net)


def depth_from_head(name: str) -> int:
    """How many blocks lie between a tensor and the last block; 0 for the classifier's. name: as in the state dict."""
    return {"layer3": 1, "layer2": 2, "layer1": 3, "bn1": 4, "conv1": 4}.get(name.split(".")[0], 0)


def set_train_mode(net: nn.Module) -> None:
    """Dropout on, BatchNorm in inference mode."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def num_features(net: ResNet) -> int:
    """Width of what the classifier sees: 2048 or 512."""
    return int(net.get_submodule("fc.1").in_features)


def autocast(precision: Precision, device: torch.device, *, cached: bool = True) -> torch.autocast:
    """The arithmetic of a forward pass. cached: weights that are used twice are rounded once."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=cached)
