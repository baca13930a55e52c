"""Training on a GPU: faster than as it is written down, and the same."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carclass.config.schema import AugmentationSettings, ModelSettings, UnfrozenSettings
from carclass.models import resnet
from carclass.training import cuda_graphs, loop
from carclass.training.dataloader import SMALL_STEP_PIXELS, PhotoBlock, PhotoLoader, PhotoSamples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
SIDE, CLASSES, PHOTOS = 64, 4, 29
STAGE = UnfrozenSettings(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=1)


def feed() -> PhotoSamples:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PHOTOS, SIDE, SIDE, 3), np.uint8)
    blocks = [PhotoBlock(pixels, rng.integers(0, CLASSES, PHOTOS), rng.integers(0, 2**63, PHOTOS, np.uint64))]
    return PhotoSamples(blocks, seed=1)


def trained(precision: resnet.Precision, *, graphs: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and each step's loss after two epochs whose last step has five photos."""
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    net = resnet.build(ModelSettings(architecture="resnet26-narrow", image_size=SIDE, dropout=0.3), CLASSES).to(GPU)
    resnet.prepare_stage(net, "unfrozen")
    given, forward = loop.make_trained(net, STAGE), net
    if graphs:
        forward = cuda_graphs.capture_if_faster(net, STAGE.batch_size, SIDE, precision)
        assert forward is not net
    trainee = loop.Trainee(given, forward, STAGE, resnet.autocast(precision, GPU), 1)
    batches = PhotoLoader(feed(), feed(), AugmentationSettings(), STAGE, GPU)
    losses: list[float] = []
    finished = loop.Callbacks(finish=lambda _, told: losses.extend(step["loss"] for step in told.steps))
    assert loop.train_epochs(trainee, batches, loop.TrainState(), finished)
    return {name: tensor.cpu() for name, tensor in net.state_dict().items()}, losses


def error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def differing(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Tensors that are not the same, and how far off they are."""
    found = {name: error(tensor, other[name]) for name, tensor in one.items() if other[name].any()}
    return {name: value for name, value in found.items() if not value <= tolerance}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_frozen_norm_is_batch_norm_with_its_gradients(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24).eval().to(GPU)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.3, 1.5)
    photos = torch.randn(4, 24, 9, 9, device=GPU).to(dtype, memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(4, 24, 9, 9, device=GPU).to(dtype)
    exact, exactly = copy.deepcopy(norm).double(), photos.detach().double().requires_grad_()
    mine = resnet.FrozenNorm.apply(photos, norm, norm.weight, norm.bias)
    found = [mine, *torch.autograd.grad(mine, [photos, norm.weight, norm.bias], gradient)]
    truth = [
        exact(exactly),
        *torch.autograd.grad(exact(exactly), [exactly, exact.weight, exact.bias], gradient.double()),
    ]
    assert [error(one, other) for one, other in zip(found, truth, strict=True)] == pytest.approx([0] * 4, abs=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_graphs_change_nothing(precision: resnet.Precision):
    without, told_without = trained(precision, graphs=False)
    within, told_within = trained(precision, graphs=True)
    assert told_within == pytest.approx(told_without, rel=1e-6)
    assert differing(within, without, 1e-6) == {}


def test_large_batches_have_no_graphs():
    net = resnet.build(ModelSettings(architecture="resnet26-narrow", image_size=SIDE), CLASSES).to(GPU)
    assert cuda_graphs.capture_if_faster(net, SMALL_STEP_PIXELS // SIDE**2 + 1, SIDE, "bf16") is net


def test_photos_are_changed_as_on_a_cpu():
    given = feed()
    on_cpu, on_gpu = (
        next(PhotoLoader(given, given, AugmentationSettings(), STAGE, device).train(1))
        for device in (torch.device("cpu"), GPU)
    )
    assert on_gpu.labels.cpu().tolist() == on_cpu.labels.tolist()
    difference = (on_gpu.inputs.cpu() - on_cpu.inputs).abs()
    assert float(difference.quantile(0.999)) < 1e-3  # a pixel that is rounded the other way may stand out
