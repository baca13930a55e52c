"""The detector: results are independent of the batch and of the inference optimisations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from carclass.config.schema import PROFILES, DetectorSettings
from carclass.data import photo
from carclass.errors import UserError
from carclass.masking import networks
from carclass.masking.canvas import canvas as canvas_of
from carclass.masking.detection import Detection
from carclass.masking.detector import Detector
from carclass.masking.paste import paste_mask
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
    rles = {names[item["image_id"]]: item["segmentation"] for item in coco["annotations"] if item["main"]}
    return [coco_mask.decode(rles[name]).astype(bool) for name in sorted(rles)[:8]]


def mask_of(detection: Detection | None, pixels: np.ndarray) -> np.ndarray:
    assert detection is not None
    assert detection.grid is not None
    return paste_mask(detection.grid, detection.box, *pixels.shape[:2])


def test_the_drawn_cars_are_detected(detect: Detector, photos: list[np.ndarray], truths: list[np.ndarray]):
    masks = [mask_of(item, pixels) for item, pixels in zip(detect(photos), photos, strict=True)]
    assert np.mean([mask_iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)]) > 0.85


def test_a_detection_is_independent_of_the_batch(detect: Detector, photos: list[np.ndarray]):
    for pixels, batched in zip(photos, detect(photos, 4), strict=True):
        alone = detect([pixels])[0]
        assert alone is not None
        assert batched is not None
        assert (alone.score, alone.box.tolist()) == (batched.score, batched.box.tolist())
        np.testing.assert_array_equal(alone.grid, batched.grid)


def test_only_photos_of_the_same_canvas_share_a_batch(detect: Detector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(detect, "max_batch", 8)  # as on a GPU
    shapes = [(200, 300), (300, 200), (202, 300), (200, 300), (100, 400)]
    groups = list(detect._batches([np.zeros((*shape, 3), np.uint8) for shape in shapes], 2))
    assert groups == [[0, 2], [3], [1], [4]]


@pytest.mark.parametrize("canvas", [1, 16])
def test_photos_that_a_network_pads_to_other_sizes_share_no_batch(detect: Detector, canvas: int, monkeypatch):
    """Without a feature pyramid (C4, DC5), a network pads to the largest photo of a batch only."""
    monkeypatch.setattr(detect.network, "canvas", canvas)
    monkeypatch.setattr(detect, "max_batch", 8)  # as on a GPU
    shapes = [(200, 300), (200, 320), (201, 300), (400, 600), (200, 300)]
    groups = list(detect._batches([np.zeros((*shape, 3), np.uint8) for shape in shapes], 8))
    sizes = [{canvas_of(*shapes[i], detect.settings, canvas) for i in g} for g in groups]
    assert [len(size) for size in sizes] == [1] * len(groups)
    assert len(set.union(*sizes)) == len(groups) > 1


def test_a_batch_that_exceeds_the_gpus_memory_is_halved(detect: Detector, photos: list[np.ndarray], monkeypatch):
    monkeypatch.setattr(detect, "max_batch", 8)
    same_canvas = [photos[0]] * 7
    (expected,), sizes = detect(photos[:1]), []

    def fail_above_two(_: object, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = detect.network.model.backbone.register_forward_pre_hook(fail_above_two)
    found = detect(same_canvas, 7)
    hook.remove()
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert detect.max_batch == 2
    assert [item.score for item in found if item] == pytest.approx([expected.score if expected else 0] * 7)


def test_a_photo_that_exceeds_the_gpus_memory_is_an_error_with_a_remedy(detect: Detector, photos: list[np.ndarray]):
    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    hook = detect.network.model.backbone.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=r"memory of a GPU is too small .* lower `mask.detector.short_side`"):
        detect(photos[:1])
    hook.remove()


def test_inference_optimisations_change_rounding_only(photos: list[np.ndarray]):
    settings = SETTINGS.model_copy(update={"precision": "fp32"})
    fast, plain = Detector(settings), networks.build_network(settings)
    with torch.inference_mode():
        actual = fast.forward(photos[:1]).photo(0)
        expected = plain([{"image": fast._network_input(photos[0])}])[0]["instances"]
    torch.testing.assert_close(actual.boxes, expected.pred_boxes.tensor, atol=0.01, rtol=1e-3)
    torch.testing.assert_close(actual.scores, expected.scores, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(actual.masks, expected.pred_masks[:, 0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (16, 16)])
def test_photos_of_extreme_shapes_have_no_vehicle(detect: Detector, shape: tuple[int, int]):
    assert detect([np.full((*shape, 3), 128, np.uint8)]) == [None]


def test_an_empty_batch_gives_no_detections(detect: Detector):
    assert detect([]) == []


def test_a_mask_lies_within_its_box(detect: Detector, photos: list[np.ndarray]):
    detection = detect(photos[:1])[0]
    rows, columns = np.nonzero(mask_of(detection, photos[0]))
    assert detection is not None
    x1, y1, x2, y2 = detection.box
    assert columns.min() >= x1 - 1
    assert columns.max() <= x2 + 1
    assert rows.min() >= y1 - 1
    assert rows.max() <= y2 + 1


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_a_profile_sets_the_settings_not_given(name: str):
    settings = DetectorSettings.model_validate({"profile": name, "num_detections": 7})
    assert settings.short_side == PROFILES[name]["short_side"]
    assert settings.num_detections == 7


def test_the_default_settings_are_those_of_the_fast_profile():
    assert DetectorSettings() == DetectorSettings(profile="fast")


def test_a_mask_survives_rle_encoding():
    mask = np.random.default_rng(0).random((20, 31)) > 0.5
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), 20, 31), mask)
