"""Memory of a GPU: measured and estimated steps agree with a stage's; batches that don't fit are detected in parts."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from carclass.config.schema import (
    AugmentationSettings,
    DetectorSettings,
    ModelSettings,
    TrainSettings,
    UnfrozenSettings,
)
from carclass.masking.detector import Detector
from carclass.models import architectures, classifier
from carclass.training import loop, memory_probe, preflight
from carclass.training.dataloader import SMALL_STEP_PIXELS, PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import make_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
SIDE, CLASSES, BATCH = 224, 10, 96
STAGE = UnfrozenSettings(epochs=1, batch_size=BATCH, warmup_epochs=0)
assert BATCH * SIDE**2 > SMALL_STEP_PIXELS  # no CUDA graphs


@pytest.fixture
def small_gpu() -> Iterator[None]:
    """Limit this process to 3 GB of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3e9 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def train_settings(precision: classifier.Precision, **changes: object) -> TrainSettings:
    unfrozen = STAGE.model_copy(update=changes)
    return TrainSettings(name="one", precision=precision, model=ModelSettings(image_size=SIDE), unfrozen=unfrozen)


def stage_peak(settings: TrainSettings) -> int:
    """Return the most bytes of tensors on the GPU while a stage of two epochs is trained."""
    rng, stage = np.random.default_rng(0), settings.unfrozen
    assert stage is not None
    count = 2 * BATCH
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    blocks = [PhotoBlock(pixels, rng.integers(0, CLASSES, count), rng.integers(0, 2**63, count, np.uint64))]
    samples = PhotoSamples(blocks, seed=1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    net = architectures.build(settings.model, CLASSES).to(GPU)
    net.prepare_stage(stage)
    learner = make_learner(net, stage, classifier.autocast(settings.precision, GPU), seed=1)
    loader = PhotoLoader(samples, samples, AugmentationSettings(), stage, GPU)
    assert loop.train_epochs(learner, loader, loop.TrainState(), loop.Callbacks())
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_measured_step_has_the_memory_of_a_stage(precision: classifier.Precision):
    settings = train_settings(precision)
    step = memory_probe.measure_step(settings, CLASSES)
    assert step.fixed + BATCH * step.per_photo == pytest.approx(stage_peak(settings), rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_estimated_step_has_the_memory_of_a_stage(precision: classifier.Precision):
    settings = train_settings(precision)
    assert settings.unfrozen is not None
    net = architectures.build(settings.model, CLASSES)
    step = preflight.step_memory(settings, settings.unfrozen, net, use_gpu=True)
    assert step.fixed + BATCH * step.per_photo == pytest.approx(stage_peak(settings), rel=0.2)


@pytest.mark.usefixtures("small_gpu")
def test_a_step_that_does_not_fit_is_measured_with_fewer_photos():
    large = train_settings("bf16", batch_size=4096)
    step = memory_probe.measure_step(large, CLASSES)
    assert step.per_photo == pytest.approx(44e6, rel=0.25)


@pytest.mark.usefixtures("small_gpu")
def test_a_batch_that_exceeds_the_memory_is_detected_in_parts():
    settings = DetectorSettings(model="sample", weights="sample", short_side=1200, max_size=2000, num_proposals=30)
    photos = [*np.random.default_rng(0).integers(0, 256, (256, 120, 160, 3), np.uint8)]
    detector = Detector(settings, "largest", "cuda")
    found = detector(photos, batch_size=256)
    assert len(found) == 256
    assert detector.max_batch < 256
