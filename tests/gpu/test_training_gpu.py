"""Training on a GPU: CUDA graphs, BatchNorm with frozen statistics and augmentation equal their reference."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carclass.config.schema import AugmentationSettings, ModelSettings, UnfrozenSettings
from carclass.models import architectures, classifier, resnet
from carclass.training import cuda_graphs, loop
from carclass.training.dataloader import SMALL_STEP_PIXELS, PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import make_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
SIDE, CLASSES, PHOTOS = 64, 4, 29
STAGE = UnfrozenSettings(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=1)


def make_samples() -> PhotoSamples:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PHOTOS, SIDE, SIDE, 3), np.uint8)
    blocks = [PhotoBlock(pixels, rng.integers(0, CLASSES, PHOTOS), rng.integers(0, 2**63, PHOTOS, np.uint64))]
    return PhotoSamples(blocks, seed=1)


def train(precision: classifier.Precision, *, graphs: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses of all steps after two epochs; their last step has five photos."""
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    model = ModelSettings(architecture="resnet26-narrow", image_size=SIDE, dropout=0.3)
    net = architectures.build(model, CLASSES).to(GPU)
    net.prepare_stage(STAGE)
    learner = make_learner(net, STAGE, classifier.autocast(precision, GPU), seed=1)
    if graphs:
        learner = learner._replace(forward=cuda_graphs.capture_if_faster(net, STAGE.batch_size, SIDE, precision))
        assert learner.forward is not net
    loader = PhotoLoader(make_samples(), make_samples(), AugmentationSettings(), STAGE, GPU)
    losses: list[float] = []
    callbacks = loop.Callbacks(on_epoch_end=lambda _state, _metrics, steps: losses.extend(row["loss"] for row in steps))
    assert loop.train_epochs(learner, loader, loop.TrainState(), callbacks)
    return {name: tensor.cpu() for name, tensor in net.state_dict().items()}, losses


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


def differing(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Return the relative errors of tensors that differ by more than the tolerance."""
    errors = {name: relative_error(tensor, other[name]) for name, tensor in one.items() if other[name].any()}
    return {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_frozen_norm_has_the_outputs_and_gradients_of_batch_norm(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24).eval().to(GPU)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.3, 1.5)
    photos = torch.randn(4, 24, 9, 9, device=GPU).to(dtype, memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(4, 24, 9, 9, device=GPU).to(dtype)
    exact_norm, exact_photos = copy.deepcopy(norm).double(), photos.detach().double().requires_grad_()
    outputs = resnet.FrozenNorm.apply(photos, norm, norm.weight, norm.bias)
    values = [outputs, *torch.autograd.grad(outputs, [photos, norm.weight, norm.bias], gradient)]
    exact_outputs = exact_norm(exact_photos)
    inputs = [exact_photos, exact_norm.weight, exact_norm.bias]
    expected = [exact_outputs, *torch.autograd.grad(exact_outputs, inputs, gradient.double())]
    errors = [relative_error(value, exact) for value, exact in zip(values, expected, strict=True)]
    assert errors == pytest.approx([0] * 4, abs=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_graphs_do_not_change_the_result(precision: classifier.Precision):
    eager_weights, eager_losses = train(precision, graphs=False)
    weights, losses = train(precision, graphs=True)
    assert losses == pytest.approx(eager_losses, rel=1e-6)
    assert differing(weights, eager_weights, 1e-6) == {}


def test_large_batches_run_without_graphs():
    net = architectures.build(ModelSettings(architecture="resnet26-narrow", image_size=SIDE), CLASSES).to(GPU)
    assert cuda_graphs.capture_if_faster(net, SMALL_STEP_PIXELS // SIDE**2 + 1, SIDE, "bf16") is net


def test_augmentation_equals_the_one_on_a_cpu():
    samples = make_samples()
    on_cpu, on_gpu = (
        next(PhotoLoader(samples, samples, AugmentationSettings(), STAGE, device).train(1))
        for device in (torch.device("cpu"), GPU)
    )
    assert on_gpu.labels.cpu().tolist() == on_cpu.labels.tolist()
    difference = (on_gpu.inputs.cpu() - on_cpu.inputs).abs()
    assert float(difference.quantile(0.999)) < 1e-3  # a few pixels are rounded the other way
