"""Exports of ResNet50 with ImageNet's weights on real photos, where ../shared and build/weights exist."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from carclass.config.schema import ModelSettings
from carclass.data.photo import decode_photos
from carclass.models import architectures, preprocessing, weights
from carclass.models.preprocessing import to_network_input
from carclass.runs.export import FORMATS, OUTPUTS, TOLERANCE
from carclass.runs.model_description import ModelDescription
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import Preprocessing

HOUSE = Path(__file__).parents[2]
PHOTOS = HOUSE.parent / "shared" / "cars196" / "photos"
WEIGHTS = HOUSE / "build" / "weights" / "resnet50-imagenet.safetensors"
SETTINGS = ModelSettings(stride_in_1x1=True)
FACTS: dict[str, Any] = {
    "run": "real",
    "stage": "unfrozen",
    "epoch": 1,
    "val_accuracy": 0.9,
    "model": SETTINGS.model_dump(),
    "sha256": "0" * 64,
}
READING = {"min_side": 16, "max_pixels": 100_000_000, "max_side": 800, "quality": 92}
STATISTICS = [*preprocessing.IMAGENET.mean], [*preprocessing.IMAGENET.std]
CLASSES = [f"class {i}" for i in range(1000)]
DESCRIPTION = ModelDescription(FACTS, Preprocessing(READING, None, None, None, 224, *STATISTICS, CLASSES), 1.5)

pytestmark = pytest.mark.skipif(
    not (PHOTOS.is_dir() and WEIGHTS.exists()), reason="needs ../shared/cars196 and build/weights"
)


@pytest.fixture(scope="module")
def net() -> Any:
    state, _ = weights.load_weights(str(WEIGHTS), None, sample="", key="train.parent")
    net = architectures.build(SETTINGS, 1000)
    net.load_state_dict({name.replace("fc.", "fc.1."): value.float() for name, value in state.items()}, strict=False)
    return net.eval()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Return photos spread over the folder, uint8 (8,224,224,3)."""
    paths = sorted(PHOTOS.iterdir())[::900][:8]
    return decode_photos([path.read_bytes() for path in paths], SETTINGS.image_size)


@pytest.fixture(scope="module")
def expected(net: Any, pixels: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return net(to_network_input(pixels, torch.device("cpu")))


@pytest.fixture(scope="module")
def files(net: Any) -> dict[str, bytes]:
    return {name: kind.write(PhotoClassifier(net), DESCRIPTION) for name, kind in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_returns_the_outputs_of_the_network(
    files: dict[str, bytes], pixels: np.ndarray, expected: torch.Tensor, name: str
):
    photos = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        outputs = FORMATS[name].read(files[name])(photos)
    torch.testing.assert_close(outputs["logits"], expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(outputs["probabilities"], (expected / 1.5).softmax(1), atol=TOLERANCE, rtol=0)


def test_onnxruntime_returns_the_logits_of_the_network(
    files: dict[str, bytes], pixels: np.ndarray, expected: torch.Tensor
):
    session = onnxruntime.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])
    logits, _ = session.run(OUTPUTS, {"photos": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
