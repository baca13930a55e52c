"""The detector: what it finds in a photo depends on that photo alone, and its speed changes no result."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from carclass.config.schema import PROFILES, DetectorSettings
from carclass.data import photo
from carclass.masking import networks
from carclass.masking.detector import Detector
from carclass.masking.rle import decode_mask, encode_mask, mask_iou

SETTINGS = DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30)


@pytest.fixture(scope="module")
def detect() -> Detector:
    return Detector(SETTINGS)


@pytest.fixture(scope="module")
def photos(photos_folder: Path) -> list[np.ndarray]:
    files = sorted((photos_folder / "photos").glob("0000*.jpg"))[:8]
    return [photo.decode(path.read_bytes()) for path in files]


@pytest.fixture(scope="module")
def truths(photos_folder: Path) -> list[np.ndarray]:
    coco = json.loads((photos_folder / "truth.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    found = {names[item["image_id"]]: item["segmentation"] for item in coco["annotations"] if item["main"]}
    return [coco_mask.decode(found[name]).astype(bool) for name in sorted(found)[:8]]


def test_the_drawn_cars_are_found(detect: Detector, photos: list[np.ndarray], truths: list[np.ndarray]):
    found = [item for item in detect(photos) if item is not None and item.mask is not None]
    assert np.mean([mask_iou(item.mask, truth) for item, truth in zip(found, truths, strict=True)]) > 0.85


def test_a_photo_gives_the_same_alone_and_among_others(detect: Detector, photos: list[np.ndarray]):
    together = detect(photos, 4)
    for pixels, among in zip(photos, together, strict=True):
        alone = detect([pixels])[0]
        assert alone is not None
        assert among is not None
        assert (alone.score, alone.box.tolist()) == (among.score, among.box.tolist())
        np.testing.assert_array_equal(alone.mask, among.mask)


def test_photos_share_a_forward_pass_only_with_their_own_shape(detect: Detector):
    shapes = [(200, 300), (300, 200), (202, 300), (200, 300), (100, 400)]
    groups = list(detect._batches([np.zeros((*shape, 3), np.uint8) for shape in shapes], 2))
    assert groups == [[0, 2], [3], [1], [4]]


def test_folding_and_layout_change_nothing_but_rounding(photos: list[np.ndarray]):
    settings = SETTINGS.model_copy(update={"precision": "fp32"})
    fast, plain = Detector(settings), networks.build_network(settings)
    with torch.inference_mode():
        found = fast.forward(photos[:1])[0]
        expected = plain([{"image": fast._input(photos[0])}])[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=0.01, rtol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (16, 16)])
def test_odd_photos_hold_no_vehicle_and_break_nothing(detect: Detector, shape: tuple[int, int]):
    assert detect([np.full((*shape, 3), 128, np.uint8)]) == [None]


def test_no_photo_is_no_work(detect: Detector):
    assert detect([]) == []


def test_a_found_mask_lies_in_its_box_and_has_its_area(detect: Detector, photos: list[np.ndarray]):
    found = detect(photos[:1])[0]
    assert found is not None
    assert found.mask is not None
    rows, columns = np.nonzero(found.mask)
    x1, y1, x2, y2 = found.box
    assert columns.min() >= x1 - 1
    assert columns.max() <= x2 + 1
    assert rows.min() >= y1 - 1
    assert rows.max() <= y2 + 1
    assert found.area_fraction == pytest.approx(found.mask.mean())


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_a_profile_sets_what_is_not_set(name: str):
    given = DetectorSettings.model_validate({"profile": name, "num_detections": 7})
    assert given.short_side == PROFILES[name]["short_side"]
    assert given.num_detections == 7


def test_the_default_profile_is_the_default_of_its_settings():
    assert DetectorSettings() == DetectorSettings(profile="fast")


def test_a_mask_comes_back_from_its_run_lengths():
    mask = np.random.default_rng(0).random((20, 31)) > 0.5
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), 20, 31), mask)
