"""The sample's weights: hashes, sizes and accuracy."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from carclass import sample
from carclass.config.schema import DetectorSettings, ModelSettings, TrainSettings
from carclass.masking.detection import Detection
from carclass.masking.detector import Detector
from carclass.masking.paste import paste_mask
from carclass.masking.rle import mask_iou
from carclass.models import architectures
from carclass.sample.background import SCENES
from carclass.sample.draw import Vehicle, draw_photo
from carclass.sample.models import MODELS
from carclass.training import pretrained

FOLDER = Path(sample.__file__).parent
SEED = 5
"""Different from the sample's and the training's seed: these photos are in neither."""


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, list[Vehicle]]]:
    """Draw two photos of each of the sample's models, in two scenes."""
    scenes = list(SCENES)
    return [draw_photo((SEED, i), MODELS[i % 10], scenes[(i + i // 10) % 10]) for i in range(20)]


@pytest.fixture(scope="module")
def detections(drawn: list[tuple[np.ndarray, list[Vehicle]]]) -> list[Detection | None]:
    detect = Detector(DetectorSettings(model="sample", weights="sample", short_side=160))
    return detect([pixels for pixels, _ in drawn])


def expected_sha256(name: str) -> str:
    line = (FOLDER / f"{name}.sha256").read_text()
    assert line.endswith(f"  {name}\n")
    return line.split()[0]


@pytest.mark.parametrize("name", ["detector.safetensors", "backbone.safetensors"])
def test_weights_match_their_hash(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected_sha256(name)


@pytest.mark.parametrize(("name", "megabytes"), [("detector.safetensors", 6), ("backbone.safetensors", 2.5)])
def test_weights_are_small_enough_for_a_repository(name: str, megabytes: float) -> None:
    assert (FOLDER / name).stat().st_size < megabytes * 1e6


def test_detector_finds_a_vehicle_in_every_photo(detections: list[Detection | None]) -> None:
    assert None not in [detection and detection.score for detection in detections]


def test_detector_outlines_the_photographed_car(drawn, detections) -> None:
    ious = [
        mask_iou(paste_mask(detection.grid, detection.box, *pixels.shape[:2]), vehicles[0].mask)
        for detection, (pixels, vehicles) in zip(detections, drawn, strict=True)
        if detection
    ]
    assert np.mean(ious) >= 0.9


def test_detector_mostly_distinguishes_cars_buses_and_trucks(drawn, detections) -> None:
    correct = [
        detection.category == vehicles[0].category_id
        for detection, (_, vehicles) in zip(detections, drawn, strict=True)
        if detection
    ]
    assert np.mean(correct) >= 0.75


def test_backbone_has_all_weights_of_the_narrow_resnet_except_the_classifier() -> None:
    settings = TrainSettings(name="probe", parent="sample", model=ModelSettings(architecture="resnet26-narrow"))
    net = architectures.build(settings.model, num_classes=len(MODELS))
    untrained = {name: value.clone() for name, value in net.state_dict().items()}
    assert pretrained.load_backbone(net, settings) == expected_sha256("backbone.safetensors")
    unchanged = [name for name, value in net.state_dict().items() if torch.equal(value, untrained[name])]
    assert [name for name in unchanged if "num_batches_tracked" not in name] == ["fc.1.weight", "fc.1.bias"]
