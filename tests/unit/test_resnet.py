"""Equality of our folded ResNet with torchvision's."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings, UnfrozenSettings
from carclass.models import architectures, classifier, resnet

SETTINGS = ModelSettings(architecture="resnet26-narrow", image_size=64, dropout=0)


class PlainNarrowResNet(ResNet):
    """The narrow network made of torchvision's Bottlenecks."""

    def _make_layer(self, block: type, planes: int, *args: int, **kwargs: object) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **kwargs)


@pytest.fixture
def nets() -> tuple[ResNet, ResNet]:
    """Our network and torchvision's with the same weights and statistics, none of them 0 or 1."""
    torch.manual_seed(0)
    ours, theirs = architectures.build(SETTINGS, 7), PlainNarrowResNet(Bottleneck, [2, 2, 2, 2])
    theirs.fc = nn.Sequential(nn.Dropout(0), nn.Linear(512, 7))
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.2, 0.6),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
            ):
                nn.init.uniform_(tensor, low, high)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def photos() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients(net: ResNet) -> dict[str, Tensor]:
    net.zero_grad()
    (net(photos()) * torch.arange(7)).sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def test_logits_equal_torchvisions(nets: tuple[ResNet, ResNet]):
    ours, theirs = (net.eval()(photos()) for net in nets)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_with_frozen_statistics_equal_torchvisions(nets: tuple[ResNet, ResNet]):
    for net in nets:
        classifier.set_train_mode(net)
    ours, theirs = gradients(nets[0]), gradients(nets[1])
    assert ours.keys() == dict(nets[0].named_parameters()).keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * float(theirs[name].abs().max()))


@pytest.mark.parametrize(("blocks", "layers"), [(1, ("layer4",)), (3, ("layer4", "layer3", "layer2"))])
def test_the_last_layers_may_be_trained_alone(blocks: int, layers: tuple[str, ...]):
    net = architectures.build(SETTINGS, 7)
    net.prepare_stage(UnfrozenSettings(blocks=blocks))
    assert {name.split(".")[0] for name, each in net.named_parameters() if each.requires_grad} == {*layers, "fc"}


def test_all_parameters_are_trained_by_default():
    net = architectures.build(SETTINGS, 7)
    net.prepare_stage(UnfrozenSettings())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_running_statistics_in_train_mode_equal_torchvisions(nets: tuple[ResNet, ResNet]):
    ours, theirs = (net.train()(photos()) for net in nets)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for name, buffer in nets[0].named_buffers():
        torch.testing.assert_close(buffer, nets[1].get_buffer(name), rtol=1e-3, atol=1e-4)


def test_frozen_statistics_do_not_change(nets: tuple[ResNet, ResNet]):
    before = {name: buffer.clone() for name, buffer in nets[0].named_buffers()}
    classifier.set_train_mode(nets[0])
    nets[0](photos())
    assert all((buffer == before[name]).all() for name, buffer in nets[0].named_buffers())


def test_bf16_features_equal_fp32_up_to_rounding(nets: tuple[ResNet, ResNet]):
    nets[1].fc = nn.Identity()
    exact = nets[1].eval()(photos()).detach()
    with torch.inference_mode(), classifier.autocast("bf16", torch.device("cpu")):
        rounded = nets[0].eval().features(photos()).float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.01


def test_logits_are_computed_in_float32_under_bf16(nets: tuple[ResNet, ResNet]):
    """Two classes that differ by less than bfloat16's rounding are not equal."""
    net = nets[0].eval()
    linear = net.get_submodule("fc.1")
    linear.weight.data[1] = linear.weight.data[0] * (1 + 1e-4)
    linear.bias.data[1] = linear.bias.data[0]
    with torch.inference_mode():
        with classifier.autocast("bf16", torch.device("cpu")):
            logits, features = net(photos()), net.features(photos())
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, net.fc(features.float()))
        assert (logits[:, 0] != logits[:, 1]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_convolution_equals_convolution_then_norm(bias: bool):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.3, 1.5)
    weight, shift = resnet.fold(conv, norm)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, shift), norm(conv(x)), rtol=1e-4, atol=1e-4)
