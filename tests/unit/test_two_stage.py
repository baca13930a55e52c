"""Batched inference of two-stage detectors: the same detections as Detectron2's own, and its parts."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from carclass.config.schema import DetectorSettings
from carclass.masking import detectron_network, nms, roi_align, two_stage
from carclass.masking.detection import Detections
from carclass.masking.detectron import Instances
from carclass.masking.paste import paste_mask
from carclass.models.classifier import autocast

from detectron2.layers import FrozenBatchNorm2d  # isort: skip - after detectron

PLAIN = ["sample", "mask_rcnn_r50_fpn", "faster_rcnn_r101_fpn"]
SIZES = [(96, 128), (90, 120), (96, 100)]
"""Of one canvas: with a feature pyramid, all are padded to 96 x 128."""


def build(model: str, **settings: object) -> detectron_network.DetectronNetwork:
    """Build a network with random weights that detects many vehicles of many sizes."""
    torch.manual_seed(1)
    values = {"score_threshold": 0.0, "num_proposals": 60, "num_detections": 6, **settings}
    network = detectron_network.build_network(DetectorSettings(model=model, weights="sample", **values))
    heads = network.model.roi_heads
    with torch.no_grad():
        for layer in network.model.modules():
            if isinstance(layer, FrozenBatchNorm2d):
                layer.weight.fill_(0.3)  # a network without statistics would double its activations in every block
        network.model.proposal_generator.rpn_head.anchor_deltas.weight.normal_(std=0.02)
        heads.box_predictor.bbox_pred.weight.normal_(std=0.02)
        heads.box_predictor.cls_score.weight.normal_(std=0.2)
        if network.finds_masks:
            heads.mask_head.predictor.weight.normal_(std=0.2)
    return network.eval()


def images(sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator) * 255 for size in sizes]


@pytest.fixture(scope="module", params=PLAIN)
def network(request: pytest.FixtureRequest) -> detectron_network.DetectronNetwork:
    return build(request.param)


def by_detectron(network: detectron_network.DetectronNetwork, photos: list[Tensor]) -> list[Instances]:
    with torch.inference_mode():
        return [item["instances"] for item in network([{"image": photo} for photo in photos])]


def by_us(network: detectron_network.DetectronNetwork, photos: list[Tensor], *, static: bool) -> Detections:
    with torch.inference_mode():
        return two_stage.detect(network.model, photos, network.classes, static=static)


@pytest.mark.parametrize("static", [False, True])
def test_detections_are_those_of_detectron2(network: detectron_network.DetectronNetwork, static: bool):
    found = by_us(network, images(), static=static)
    for number, expected in enumerate(by_detectron(network, images())):
        actual = found.photo(number)
        assert len(actual.scores) == len(expected) > 1
        torch.testing.assert_close(actual.scores, expected.scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(actual.boxes, expected.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
        assert actual.classes.tolist() == expected.pred_classes.tolist()
        if network.finds_masks:
            torch.testing.assert_close(actual.masks, expected.pred_masks[:, 0], atol=1e-3, rtol=1e-3)


def test_plain_networks_are_recognised(network: detectron_network.DetectronNetwork):
    assert two_stage.is_plain(network.model)


def test_a_photo_with_too_many_vehicles_for_a_pass_is_not_complete():
    network = build("sample", num_detections=two_stage.MAX_VEHICLES + 20)
    found = by_us(network, images(), static=True)
    assert found.complete is not None
    assert found.complete.tolist() == [False] * len(SIZES)
    assert found.scores.shape[1] == two_stage.MAX_VEHICLES


def test_photos_without_a_detection_are_empty():
    network = build("sample", score_threshold=1.0)
    for static in (False, True):
        found = by_us(network, images(), static=static)
        assert not found.scores.any()
        assert found.masks is not None
        assert not found.masks.any()


def test_boxes_are_computed_in_float32_in_a_network_of_bf16():
    """In bf16, coordinates above 256 would be rounded to whole pixels or more."""
    network = build("sample")
    photos = [torch.nn.functional.interpolate(images()[0][None], (600, 800))[0]]
    with torch.inference_mode(), autocast("bf16", torch.device("cpu")):
        found = network.detect(photos)
        expected = network([{"image": photos[0]}])[0]["instances"]
    assert found.boxes.dtype == torch.float32
    assert (found.boxes != found.boxes.to(torch.bfloat16)).any()
    assert len(found.photo(0).scores) == len(expected)


def on_a_fake_gpu(network: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace all weights by tensors that have a shape and a device only."""

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            object.__setattr__(module, name, fake(parameter))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module._buffers[name] = fake(buffer)


@pytest.mark.parametrize("model", PLAIN)
def test_a_pass_on_a_gpu_stays_there_and_waits_for_no_size(model: str):
    """Fake tensors raise errors for tensors of two devices, and wherever a value would have to be read."""
    network, mode = build(model), FakeTensorMode()
    on_a_fake_gpu(network, mode)
    with mode, torch.inference_mode():
        found = network.detect([torch.rand(3, *size, device="cuda") for size in SIZES])
    assert {field.device.type for field in found if field is not None} == {"cuda"}
    assert found.boxes.shape == (len(SIZES), 6, 4)


def random_boxes(rows: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(rows, count, 2, generator=generator) * 80
    return torch.cat([corners, corners + 5 + torch.rand(rows, count, 2, generator=generator) * 60], dim=2)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_the_fixed_point_is_greedy_suppression(threshold: float):
    boxes = random_boxes(6, 300)
    valid = torch.rand(6, 300, generator=torch.Generator().manual_seed(1)) > 0.2
    kept, certain = nms.fixed_point(boxes, valid, threshold)
    assert certain.all()
    assert torch.equal(kept, nms.greedy(boxes, valid, threshold, needed=300))


def test_a_chain_that_needs_more_rounds_is_not_certain():
    """Each box overlaps with the next one only, so that every round settles one more."""
    starts = torch.arange(2.0 * nms.MAX_ROUNDS)
    boxes = torch.stack([starts, torch.zeros_like(starts), starts + 3, torch.ones_like(starts)], dim=1)[None]
    _, certain = nms.fixed_point(boxes, torch.ones(boxes.shape[:2], dtype=torch.bool), 0.45)
    assert not certain.any()


def test_the_first_boxes_that_are_needed_are_kept_as_without_a_limit():
    boxes = random_boxes(4, 400)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    all_kept, first_kept = (nms.greedy(boxes, valid, 0.5, needed) for needed in (400, 10))
    for row, first in zip(all_kept, first_kept, strict=True):
        assert row.nonzero()[:10, 0].tolist() == first.nonzero()[:10, 0].tolist()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("static", [False, True])
def test_pooling_is_that_of_torchvision(ratio: int, static: bool):
    pooler = build("mask_rcnn_r50_fpn").model.roi_heads.box_pooler
    for layer in pooler.level_poolers:
        layer.sampling_ratio = ratio
    maps = [torch.randn(2, 5, 256 // 2**level, 320 // 2**level) for level in range(4)]
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([1200.0, 900.0])
    boxes = torch.cat([corners, corners + torch.rand(200, 2, generator=generator) ** 3 * 700], dim=1)
    photos = torch.randint(2, (200,), generator=generator)
    actual = roi_align.pool(pooler, maps, photos, boxes, static=static)
    regions = torch.cat([photos[:, None].float(), boxes], dim=1)
    levels = roi_align._levels(pooler, boxes)
    for i, level in enumerate(levels.tolist()):
        scale = pooler.level_poolers[level].spatial_scale
        expected = torchvision.ops.roi_align(maps[level], regions[i : i + 1], 7, scale, ratio, aligned=True)
        torch.testing.assert_close(actual[i], expected[0], atol=1e-4, rtol=1e-4)
    assert set(levels.tolist()) == {0, 1, 2, 3}


def test_a_pasted_mask_is_that_of_detectron2():
    from detectron2.layers.mask_ops import paste_masks_in_image

    rng = np.random.default_rng(0)
    for _ in range(30):
        grid = rng.random((28, 28), dtype=np.float32)
        x1, y1 = rng.uniform(-5, 70, 2)
        box = np.array([x1, y1, x1 + rng.uniform(0.5, 60), y1 + rng.uniform(0.5, 60)], np.float32)
        expected = paste_masks_in_image(torch.from_numpy(grid)[None], torch.from_numpy(box)[None], (80, 100), 0.5)
        assert (paste_mask(grid, box, 80, 100) != expected[0].numpy()).mean() < 1e-3  # rounding at the threshold
