"""The weights in the package: whole, small, and good enough for the demonstration to mean something."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from carclass import sample
from carclass.config.schema import DetectorSettings, ModelSettings, TrainSettings
from carclass.masking.detector import Detection, Detector
from carclass.masking.rle import mask_iou
from carclass.models import resnet
from carclass.sample.background import SCENES
from carclass.sample.draw import Vehicle, draw_photo
from carclass.sample.models import MODELS
from carclass.training import pretrained

FOLDER = Path(sample.__file__).parent
SEED = 5
"""Neither the sample's nor the training's: nothing has seen these photos."""


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, list[Vehicle]]]:
    """Two photos of each of the sample's models, in two scenes."""
    scenes = list(SCENES)
    return [draw_photo((SEED, i), MODELS[i % 10], scenes[(i + i // 10) % 10]) for i in range(20)]


@pytest.fixture(scope="module")
def found(drawn: list[tuple[np.ndarray, list[Vehicle]]]) -> list[Detection | None]:
    detect = Detector(DetectorSettings(model="sample", weights="sample", short_side=160))
    return detect([pixels for pixels, _ in drawn])


def expected_sha256(name: str) -> str:
    line = (FOLDER / f"{name}.sha256").read_text()
    assert line.endswith(f"  {name}\n")
    return line.split()[0]


@pytest.mark.parametrize("name", ["detector.safetensors", "backbone.safetensors"])
def test_weights_are_what_their_hash_says(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected_sha256(name)


@pytest.mark.parametrize(("name", "megabytes"), [("detector.safetensors", 6), ("backbone.safetensors", 2.5)])
def test_weights_are_small_enough_for_a_repository(name: str, megabytes: float) -> None:
    assert (FOLDER / name).stat().st_size < megabytes * 1e6


def test_detector_finds_a_vehicle_in_every_photo(found: list[Detection | None]) -> None:
    assert None not in [each and each.score for each in found]


def test_detector_outlines_the_photographed_car(drawn, found) -> None:
    ious = [mask_iou(each.mask, vehicles[0].mask) for each, (_, vehicles) in zip(found, drawn, strict=True) if each]
    assert np.mean(ious) >= 0.9


def test_detector_mostly_knows_a_car_from_a_bus_or_a_truck(drawn, found) -> None:
    right = [each.category == vehicles[0].category_id for each, (_, vehicles) in zip(found, drawn, strict=True) if each]
    assert np.mean(right) >= 0.75


def test_backbone_fills_all_of_the_narrow_resnet_but_its_classifier() -> None:
    settings = TrainSettings(name="probe", parent="sample", model=ModelSettings(architecture="resnet26-narrow"))
    net = resnet.build(settings.model, num_classes=len(MODELS))
    untrained = {name: value.clone() for name, value in net.state_dict().items()}
    assert pretrained.load_backbone(net, settings) == expected_sha256("backbone.safetensors")
    unchanged = [name for name, value in net.state_dict().items() if torch.equal(value, untrained[name])]
    assert [name for name in unchanged if "num_batches_tracked" not in name] == ["fc.1.weight", "fc.1.bias"]
