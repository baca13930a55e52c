"""The weights in the package: whole, small, and good enough for the demonstration to mean something."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from carclass import config, model
from carclass.masking.cutout import cut
from carclass.masking.detector import Detection, Detector, mask_iou
from carclass.sample import training
from carclass.sample.draw import box_of
from carclass.sample.models import MODELS

FOLDER = Path(training.__file__).parent
SEED = 5
"""Neither the sample's nor the training's: these photos were never seen."""


@pytest.fixture(scope="module")
def photos() -> list[training.Drawing]:
    """Two photos of each of the sample's models."""
    return [training.draw_one((SEED, index), MODELS, index % len(MODELS)) for index in range(2 * len(MODELS))]


@pytest.fixture(scope="module")
def found(photos: list[training.Drawing]) -> list[Detection | None]:
    detect = Detector(config.Detector(model="sample", weights="sample", short_side=160))
    return detect([each.pixels for each in photos])


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    settings = config.Train(
        name="probe", parent="sample", model=config.Model(architecture="resnet26-narrow", image_size=96)
    )
    torch.manual_seed(0)
    net = model.build(settings.model, num_classes=len(MODELS))
    model.load_parent(net, settings)
    return net.eval()


@pytest.mark.parametrize("name", ["detector.safetensors", "backbone.safetensors"])
def test_weights_are_what_their_hash_says(name: str) -> None:
    expected, named = (FOLDER / f"{name}.sha256").read_text().split()
    assert named == name
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == expected


@pytest.mark.parametrize(("name", "megabytes"), [("detector.safetensors", 6), ("backbone.safetensors", 2.5)])
def test_weights_are_small_enough_for_a_repository(name: str, megabytes: float) -> None:
    assert (FOLDER / name).stat().st_size < megabytes * 1e6


def test_detector_finds_a_vehicle_in_every_photo(found: list[Detection | None]) -> None:
    assert all(found)


def test_detector_outlines_the_main_car(photos: list[training.Drawing], found: list[Detection | None]) -> None:
    scores = [
        mask_iou(each.mask, photo.vehicles[0].mask) if each else 0.0 for each, photo in zip(found, photos, strict=True)
    ]
    assert np.mean(scores) >= 0.9


def test_detector_mostly_tells_cars_buses_and_trucks_apart(
    photos: list[training.Drawing], found: list[Detection | None]
) -> None:
    right = [
        each is not None and each.category == photo.vehicles[0].category_id
        for each, photo in zip(found, photos, strict=True)
    ]
    assert np.mean(right) >= 0.8


def test_backbone_separates_models_it_was_not_trained_on(
    backbone: torch.nn.Module, photos: list[training.Drawing]
) -> None:
    """The nearest photo of another pose is far more often of the same model than chance, one in ten, would have it."""
    pixels = [
        cut(each.pixels, np.array(box_of(each.vehicles[0].mask)), each.vehicles[0].mask, config.Cutout())
        for each in photos
    ]
    print(len(pixels), backbone)
