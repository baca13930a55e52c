"""Detectors behind one contract: they find what the original finds, of the wanted classes alone."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES  # isort: skip - after detectron
from detectron2.layers import FrozenBatchNorm2d  # isort: skip
from carclass import storage
from carclass.config.schema import DetectorSettings
from carclass.errors import UserError
from carclass.masking import detectron, networks
from carclass.masking.torchvision_rcnn import COCO_IDS
from carclass.models import weights

PERSON, CAR, BUS = 0, 2, 5
WANTED = {CAR: "car", BUS: "bus"}
SAMPLE = Path(detectron.__file__).parents[1] / "sample" / "detector.yaml"
RETINANET = """
  META_ARCHITECTURE: RetinaNet
  MASK_ON: false
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  RESNETS: {OUT_FEATURES: [res3, res4, res5]}
  FPN: {IN_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32, 48]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  RETINANET: {TOPK_CANDIDATES_TEST: 100000, NUM_CONVS: 1}
"""
YAML = {
    "cascade": "{ROI_HEADS: {NAME: CascadeROIHeads}}",
    "panoptic": "{META_ARCHITECTURE: PanopticFPN, SEM_SEG_HEAD: {IN_FEATURES: [p2, p3], NORM: BN}}",
    "retinanet": RETINANET,
}
"""What these have besides the sample's settings."""


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """float (3,128,160), 0..255, as a photo of blobs."""
    noise = torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, (128, 160), mode="bicubic")[0].sigmoid() * 255


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DetectorSettings]:
    """Settings of a network by name with random weights, that is sure of persons and less so of cars and buses."""
    folder = tmp_path_factory.mktemp("networks")
    made: dict[str, dict[str, Any]] = {}

    def prepared(name: str, **changes: Any) -> DetectorSettings:
        if name not in made:
            made[name] = _model_and_weights(name, folder)
        defaults = {"classes": WANTED, "score_threshold": 0.05, "num_proposals": 20, "num_detections": 1000}
        return DetectorSettings.model_validate({**defaults, **made[name], **changes})

    return prepared


def _model_and_weights(name: str, folder: Path) -> dict[str, Any]:
    model = name
    if name in YAML:
        model = str(folder / f"{name}.yaml")
        Path(model).write_text(f"_BASE_: {SAMPLE}\nMODEL: {YAML[name]}")
    torch.manual_seed(0)
    net = _original(DetectorSettings(model=model))
    for path, layer in net.named_modules():
        if isinstance(layer, FrozenBatchNorm2d | nn.BatchNorm2d):  # so that features keep their size on their way
            layer.weight.data.fill_(0.3 if "r101" in name else 0.7)
        if path.endswith(("cls_score", "predictor.bbox_pred")) or path == "head.bbox_pred":
            layer.weight.data.normal_(std=0.1)  # so that boxes differ
        if path.endswith("cls_score"):
            _prefer(layer, torch.tensor([5.0, 4.0, 3.8]))
    save_file(net.state_dict(), folder / f"{name}.safetensors")
    return {"model": model, "weights": str(folder / f"{name}.safetensors")}


def _prefer(cls_score: nn.Module, logits: torch.Tensor) -> None:
    """Makes a layer of class logits say these for persons, cars and buses."""
    torchvisions = len(cls_score.bias) == 91
    classes = [COCO_IDS[number] if torchvisions else number for number in (PERSON, CAR, BUS)]
    anchors = len(cls_score.bias) // 80  # RetinaNet's logits come anchor by anchor
    cls_score.bias.data.view(anchors, -1)[:, classes] = logits


def _original(settings: DetectorSettings) -> nn.Module:
    """The same architecture as its makers build it, without limit on detections."""
    if settings.model == networks.TORCHVISION:
        return maskrcnn_resnet50_fpn_v2(
            weights=None,
            weights_backbone=None,
            min_size=128,
            rpn_post_nms_top_n_test=settings.num_proposals,
            box_score_thresh=settings.score_threshold,
            box_detections_per_img=1000,
        ).eval()
    return detectron.build(
        detectron.load_config(
            settings.model,
            MODEL__RPN__POST_NMS_TOPK_TEST=settings.num_proposals,
            MODEL__ROI_HEADS__SCORE_THRESH_TEST=settings.score_threshold,
            MODEL__RETINANET__SCORE_THRESH_TEST=settings.score_threshold,
            TEST__DETECTIONS_PER_IMAGE=100_000,
        )
    )


def run(net: nn.Module, *photos: torch.Tensor) -> list[Any]:
    with torch.inference_mode():
        return [output["instances"] for output in net([{"image": photo} for photo in photos])]


def run_original(settings: DetectorSettings, photo: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes, scores, classes and pasted masks (N,H,W) of the wanted classes, as its makers' pipeline finds them."""
    net = _original(settings)
    net.load_state_dict(weights.load(settings.weights, None, sample="", key="")[0])
    with torch.inference_mode():
        if settings.model == networks.TORCHVISION:
            found = net([photo / 255])[0]
            found["classes"] = torch.tensor([COCO_IDS.index(i) if i in COCO_IDS else -1 for i in found.pop("labels")])
            found["masks"] = found["masks"][:, 0] > 0.5
        else:
            instances = net([{"image": photo}])[0]["instances"]
            found = {
                "boxes": instances.pred_boxes.tensor,
                "scores": instances.scores,
                "classes": instances.pred_classes,
            }
            if instances.has("pred_masks"):
                found["masks"] = instances.pred_masks
    wanted = torch.isin(found["classes"], torch.tensor(list(settings.classes)))
    return {name: value[wanted] for name, value in found.items()}


def in_order(classes: torch.Tensor, scores: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(N,6) detections, in an order that doesn't leave those of equal score to chance."""
    return torch.tensor(sorted(torch.cat([classes[:, None], scores[:, None], boxes], dim=1).tolist()))


# What is found

ALL = ("sample", *YAML, "faster_rcnn_r101_fpn", networks.TORCHVISION)
WITH_MASKS = ("sample", "cascade", "panoptic", networks.TORCHVISION)


@pytest.mark.parametrize("name", ALL)
def test_of_the_wanted_classes_everything_is_found_that_the_original_finds(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    settings = prepared(name)
    expected = run_original(settings, photo)
    (found,) = run(networks.build_network(settings), photo)
    assert len(found) > 20
    assert found.image_size == (128, 160)
    torch.testing.assert_close(
        in_order(found.pred_classes, found.scores, found.pred_boxes.tensor),
        in_order(expected["classes"], expected["scores"], expected["boxes"]),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_are_the_originals_before_it_pastes_them(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    settings = prepared(name)
    (found,) = run(networks.build_network(settings), photo)
    boxes, soft = found.pred_boxes.tensor, found.pred_masks
    assert soft.shape[:2] == (len(found), 1)
    assert soft.shape[2] == soft.shape[3]
    if name == networks.TORCHVISION:  # the two frameworks paste each in its own way
        pasted = paste_masks_in_image(soft, boxes, (128, 160))[:, 0] > 0.5
    else:
        pasted = detectron.paste_masks_in_image(soft[:, 0], boxes, (128, 160), threshold=0.5)
    differing = (pasted != run_original(settings, photo)["masks"]).float().mean()
    assert differing < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_surer_detections_of_other_classes_push_nothing_out(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    (persons,) = run(networks.build_network(prepared(name, classes={PERSON: "person"}, num_detections=5)), photo)
    (cars,) = run(networks.build_network(prepared(name, classes={CAR: "car"}, num_detections=5)), photo)
    assert len(persons) == len(cars) == 5
    assert persons.scores.min() > cars.scores.max()
    assert set(cars.pred_classes.tolist()) == {CAR}


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_are_made_for_the_wanted_boxes_only(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    net = networks.build_network(prepared(name))
    seen = []
    net.model.roi_heads.mask_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    (found,) = run(net, photo)
    assert seen == [len(found)]


@pytest.mark.parametrize("name", ALL)
def test_a_photo_without_vehicles_has_no_instances(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    net = networks.build_network(prepared(name, score_threshold=1.0))
    (found,) = run(net, photo)
    assert len(found) == 0
    assert not net.finds_masks or found.pred_masks.shape[:2] == (0, 1)


@pytest.mark.parametrize("name", ALL)
def test_a_network_says_whether_it_finds_masks_and_which_channels_come_first(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    net = networks.build_network(prepared(name))
    (found,) = run(net, photo)
    assert net.finds_masks == found.has("pred_masks") == (name in WITH_MASKS)
    assert net.input_format == ("RGB" if name == networks.TORCHVISION else "BGR")


@pytest.mark.parametrize("name", ["sample", networks.TORCHVISION])
def test_in_bf16_boxes_and_scores_keep_their_precision(
    prepared: Callable[..., DetectorSettings], photo: torch.Tensor, name: str
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = run(networks.build_network(prepared(name)), photo)
    for values in (found.pred_boxes.tensor, found.scores):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.5


def test_photos_of_several_sizes_go_through_together(prepared: Callable[..., DetectorSettings], photo: torch.Tensor):
    net = networks.build_network(prepared(networks.TORCHVISION))
    assert [found.image_size for found in run(net, photo, photo[:, :96])] == [(128, 160), (96, 160)]


def test_torchvisions_labels_are_cocos_own_ids():
    assert [item["id"] for item in COCO_CATEGORIES if item["isthing"]] == COCO_IDS


def test_the_samples_detector_is_ready_to_use():
    net = networks.build_network(DetectorSettings(model="sample", weights="sample"))
    assert net.finds_masks
    assert not net.training


@pytest.mark.parametrize("name", ALL)
def test_a_class_the_network_does_not_know_is_named(prepared: Callable[..., DetectorSettings], name: str):
    with pytest.raises(UserError, match=r"`mask.detector.classes`: \[80\] .* classes 0 to 79"):
        networks.build_network(prepared(name, classes={CAR: "car", 80: "boat"}))


# Weights


@pytest.mark.parametrize("name", list(networks.ZOO))
def test_zoo_means_the_file_of_the_network_and_needs_a_hash(name: str, tmp_path: Path):
    uri = networks.ZOO[name].replace(".", r"\.")
    with pytest.raises(UserError, match=rf"`mask.detector.weights`: {uri} is opened only with a known sha256"):
        networks.fetch_weights(DetectorSettings(model=name, weights="zoo"), str(tmp_path))


@pytest.mark.parametrize("model", ["sample", "/nets/net.yaml"])
def test_there_is_no_zoo_for_other_networks(model: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"`mask.detector.weights`: zoo has none for {model}, only for mask_rcnn_r50"):
        networks.fetch_weights(DetectorSettings(model=model, weights="zoo"), str(tmp_path))


def test_weights_of_another_network_are_refused(prepared: Callable[..., DetectorSettings]):
    other = prepared("sample").weights
    with pytest.raises(
        UserError, match=r"is no torchvision_mask_rcnn_v2: \d+ tensors are missing.*the `mask.detector.model`"
    ):
        networks.build_network(prepared(networks.TORCHVISION, weights=other))


def test_a_zoo_file_becomes_data_that_makes_the_same_network(prepared: Callable[..., DetectorSettings], tmp_path: Path):
    expected = networks.build_network(prepared("sample")).state_dict()
    state = weights.load(prepared("sample").weights, None, sample="", key="")[0]
    data = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}, "__author__": "zoo"})
    (tmp_path / "model_final.pkl").write_bytes(data)
    settings = prepared("sample", weights=str(tmp_path / "model_final.pkl"), weights_sha256=storage.sha256(data))
    local = networks.fetch_weights(settings, str(tmp_path / "root"))
    assert local.weights == str(tmp_path / "root" / "weights" / f"{storage.sha256(data)}.safetensors")
    assert local.weights_sha256 == storage.sha256(Path(local.weights).read_bytes())
    found = networks.build_network(local).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_samples_weights_stay_where_they_are_and_are_pinned(tmp_path: Path):
    local = networks.fetch_weights(DetectorSettings(model="sample", weights="sample"), str(tmp_path))
    assert local.weights == "sample"
    assert local.weights_sha256 == (SAMPLE.with_name("detector.safetensors.sha256").read_text().split()[0])
    assert storage.list_files(str(tmp_path)) == []
