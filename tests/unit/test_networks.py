"""Detection networks: same detections as the original implementations, restricted to the requested classes."""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.roi_heads import paste_masks_in_image

from carclass import storage
from carclass.config.schema import DetectorSettings, TrainSettings
from carclass.errors import UserError
from carclass.experiments import first_config
from carclass.masking import detectron, detectron_network, networks
from carclass.masking.torchvision_rcnn import COCO_IDS, TorchvisionMaskRCNN
from carclass.models import weights

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES  # isort: skip - after detectron
from detectron2.layers import FrozenBatchNorm2d  # isort: skip
from detectron2.layers.mask_ops import paste_masks_in_image as detectron2_paste  # isort: skip

Build = Callable[[DetectorSettings], networks.Network]
PERSON, CAR, BUS = 0, 2, 5
REQUESTED = {CAR: "car", BUS: "bus"}
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
"""Settings on top of the sample detector's."""


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A smooth random photo, float (3,128,160), 0..255."""
    noise = torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, (128, 160), mode="bicubic")[0].sigmoid() * 255


@pytest.fixture(scope="module")
def make_settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DetectorSettings]:
    """Factory of settings with random weights that score persons higher than cars, and cars higher than buses."""
    folder = tmp_path_factory.mktemp("networks")
    files: dict[str, dict[str, Any]] = {}

    def make_settings(name: str, **changes: Any) -> DetectorSettings:
        if name not in files:
            files[name] = _model_and_weights(name, folder)
        defaults = {"classes": REQUESTED, "score_threshold": 0.05, "num_proposals": 20, "num_detections": 1000}
        return DetectorSettings.model_validate({**defaults, **files[name], **changes})

    return make_settings


@pytest.fixture(scope="module")
def build() -> Build:
    """Return networks.build_network with a cache: tests share networks, as random weights take seconds."""
    built: dict[str, networks.Network] = {}

    def build(settings: DetectorSettings) -> networks.Network:
        key = settings.model_dump_json()
        if key not in built:
            built[key] = networks.build_network(settings)
        return built[key]

    return build


def _model_and_weights(name: str, folder: Path) -> dict[str, Any]:
    model = name
    if name in YAML:
        model = str(folder / f"{name}.yaml")
        Path(model).write_text(f"_BASE_: {SAMPLE}\nMODEL: {YAML[name]}")
    torch.manual_seed(0)
    net = _original(DetectorSettings(model=model))
    for path, layer in net.named_modules():
        if isinstance(layer, FrozenBatchNorm2d | nn.BatchNorm2d):  # keep the scale of features through the layers
            layer.weight.data.fill_(0.3 if "r101" in name else 0.7)
        if path.endswith(("cls_score", "predictor.bbox_pred")) or path == "head.bbox_pred":
            layer.weight.data.normal_(std=0.1)  # make boxes differ
        if path.endswith("cls_score"):
            _set_class_logits(layer, torch.tensor([5.0, 4.0, 3.8]))
    save_file(net.state_dict(), folder / f"{name}.safetensors")
    return {"model": model, "weights": str(folder / f"{name}.safetensors")}


def _set_class_logits(cls_score: nn.Module, logits: torch.Tensor) -> None:
    """Set the biases of persons, cars and buses in a layer of class logits."""
    is_torchvision = len(cls_score.bias) == 91
    classes = [COCO_IDS[number] if is_torchvision else number for number in (PERSON, CAR, BUS)]
    anchors = len(cls_score.bias) // 80  # RetinaNet has a logit per anchor and class
    cls_score.bias.data.view(anchors, -1)[:, classes] = logits


def _original(settings: DetectorSettings) -> nn.Module:
    """Build the framework's own network, without limit on detections."""
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
    """Return boxes, scores, classes and pasted masks (N,H,W) of the requested classes by the framework's pipeline."""
    net = _original(settings)
    net.load_state_dict(weights.load_weights(settings.weights, None, sample="", key="")[0])
    with torch.inference_mode():
        if settings.model == networks.TORCHVISION:
            result = net([photo / 255])[0]
            result["classes"] = torch.tensor([COCO_IDS.index(i) if i in COCO_IDS else -1 for i in result.pop("labels")])
            result["masks"] = result["masks"][:, 0] > 0.5
        else:
            instances = net([{"image": photo}])[0]["instances"]
            result = {
                "boxes": instances.pred_boxes.tensor,
                "scores": instances.scores,
                "classes": instances.pred_classes,
            }
            if instances.has("pred_masks"):
                result["masks"] = instances.pred_masks
    requested = torch.isin(result["classes"], torch.tensor(list(settings.classes)))
    return {name: value[requested] for name, value in result.items()}


def sort_detections(classes: torch.Tensor, scores: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return detections (N,6) in an order that does not depend on ties of scores."""
    return torch.tensor(sorted(torch.cat([classes[:, None], scores[:, None], boxes], dim=1).tolist()))


# Detections

LARGE = ("faster_rcnn_r101_fpn", networks.TORCHVISION)
"""Networks whose tests take a few seconds each."""
ALL = ("sample", *YAML, *LARGE)
WITH_MASKS = ("sample", "cascade", "panoptic", networks.TORCHVISION)


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrize a test with the names of networks; the large ones are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in names]
    )


@each(ALL)
def test_detections_of_the_requested_classes_equal_the_originals(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    settings = make_settings(name)
    expected = run_original(settings, photo)
    (instances,) = run(build(settings), photo)
    assert len(instances) > 20
    assert instances.image_size == (128, 160)
    torch.testing.assert_close(
        sort_detections(instances.pred_classes, instances.scores, instances.pred_boxes.tensor),
        sort_detections(expected["classes"], expected["scores"], expected["boxes"]),
        atol=1e-4,
        rtol=0,
    )


@each(WITH_MASKS)
def test_masks_pasted_equal_the_originals(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    settings = make_settings(name)
    (instances,) = run(build(settings), photo)
    boxes, soft = instances.pred_boxes.tensor, instances.pred_masks
    assert soft.shape[:2] == (len(instances), 1)
    assert soft.shape[2] == soft.shape[3]
    if name == networks.TORCHVISION:  # the frameworks paste masks differently
        pasted = paste_masks_in_image(soft, boxes, (128, 160))[:, 0] > 0.5
    else:
        pasted = detectron2_paste(soft[:, 0], boxes, (128, 160), threshold=0.5)
    differing = (pasted != run_original(settings, photo)["masks"]).float().mean()
    assert differing < 1e-4


@each(ALL)
def test_detections_in_a_batch_are_the_instances_of_each_photo(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    """Sizes on one canvas; sorted, as a photo's detections may have equal scores."""
    net, photos = build(make_settings(name)), [photo, photo.flip(2)]
    with torch.inference_mode():
        found = net.detect(photos)
    for number, expected in enumerate(run(net, *photos)):
        actual = found.photo(number)
        torch.testing.assert_close(
            sort_detections(actual.classes, actual.scores, actual.boxes),
            sort_detections(expected.pred_classes, expected.scores, expected.pred_boxes.tensor),
            atol=1e-4,
            rtol=0,
        )
        if net.finds_masks:
            assert actual.masks is not None
            torch.testing.assert_close(actual.masks.mean(), expected.pred_masks.mean(), atol=1e-4, rtol=0)


@each(ALL)
def test_other_classes_do_not_count_towards_the_limit_on_detections(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    (persons,) = run(build(make_settings(name, classes={PERSON: "person"}, num_detections=5)), photo)
    (cars,) = run(build(make_settings(name, classes={CAR: "car"}, num_detections=5)), photo)
    assert len(persons) == len(cars) == 5
    assert persons.scores.min() > cars.scores.max()
    assert set(cars.pred_classes.tolist()) == {CAR}


@each(WITH_MASKS)
def test_the_mask_head_runs_on_boxes_of_requested_classes_only(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    net = build(make_settings(name))
    num_boxes = []
    mask_head = net.model.roi_heads.mask_head
    hook = mask_head.register_forward_pre_hook(lambda _, inputs: num_boxes.append(len(inputs[0])))
    (instances,) = run(net, photo)
    hook.remove()
    assert num_boxes == [len(instances)]


@each(ALL)
def test_a_photo_without_vehicles_has_no_instances(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    net = build(make_settings(name, score_threshold=1.0))
    (instances,) = run(net, photo)
    assert len(instances) == 0
    assert not net.finds_masks or instances.pred_masks.shape[:2] == (0, 1)


@each(ALL)
def test_a_network_declares_masks_and_channel_order(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    net = build(make_settings(name))
    (instances,) = run(net, photo)
    assert net.finds_masks == instances.has("pred_masks") == (name in WITH_MASKS)
    assert net.input_format == ("RGB" if name == networks.TORCHVISION else "BGR")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", networks.TORCHVISION])
def test_in_bf16_boxes_and_scores_keep_their_precision(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor, name: str
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (instances,) = run(build(make_settings(name)), photo)
    for values in (instances.pred_boxes.tensor, instances.scores):
        assert values.dtype == torch.float32
        assert (values != values.bfloat16().float()).float().mean() > 0.5


def test_a_batch_may_hold_photos_of_several_sizes(
    make_settings: Callable[..., DetectorSettings], build: Build, photo: torch.Tensor
):
    net = build(make_settings(networks.TORCHVISION))
    assert [instances.image_size for instances in run(net, photo, photo[:, :96])] == [(128, 160), (96, 160)]


C4 = """
  BACKBONE: {NAME: build_resnet_backbone}
  RESNETS: {OUT_FEATURES: [res4]}
  ANCHOR_GENERATOR: {SIZES: [[32, 64]]}
  RPN: {IN_FEATURES: [res4]}
  ROI_HEADS: {NAME: Res5ROIHeads, IN_FEATURES: [res4]}
"""


@pytest.mark.parametrize(("name", "canvas"), [("c4", 1), ("sample", 32), (networks.TORCHVISION, 32)])
def test_a_network_declares_the_multiple_that_it_pads_photos_to(tmp_path: Path, name: str, canvas: int):
    (tmp_path / "c4.yaml").write_text(f"_BASE_: {SAMPLE}\nMODEL: {C4}")
    model = str(tmp_path / "c4.yaml") if name == "c4" else name
    build = TorchvisionMaskRCNN if name == networks.TORCHVISION else detectron_network.build_network
    assert build(DetectorSettings(model=model)).canvas == canvas


def test_torchvision_labels_are_coco_category_ids():
    assert [item["id"] for item in COCO_CATEGORIES if item["isthing"]] == COCO_IDS


def test_the_sample_detector_is_in_eval_mode_and_finds_masks():
    net = networks.build_network(DetectorSettings(model="sample", weights="sample"))
    assert net.finds_masks
    assert not net.training


@each(ALL)
def test_an_unknown_class_is_named_in_the_error(make_settings: Callable[..., DetectorSettings], name: str):
    with pytest.raises(UserError, match=r"`mask.detector.classes`: \[80\] .* classes 0 to 79"):
        networks.build_network(make_settings(name, classes={CAR: "car", 80: "boat"}))


# Weights


@pytest.mark.parametrize("model", ["sample", "/nets/net.yaml"])
def test_other_networks_have_no_zoo_weights(model: str, tmp_path: Path):
    with pytest.raises(
        UserError, match=rf"`mask.detector.weights`: no zoo weights for {model}, only for mask_rcnn_r50"
    ):
        networks.pin_weights(DetectorSettings(model=model, weights="zoo"), str(tmp_path))


def test_weights_of_another_network_are_rejected(make_settings: Callable[..., DetectorSettings]):
    other = make_settings("sample").weights
    with pytest.raises(
        UserError, match=r"is not a torchvision_mask_rcnn_v2 checkpoint: \d+ tensors missing.*the `mask.detector.model`"
    ):
        networks.build_network(make_settings(networks.TORCHVISION, weights=other))


def test_converted_zoo_weights_give_the_same_network(make_settings: Callable[..., DetectorSettings], tmp_path: Path):
    expected = networks.build_network(make_settings("sample")).state_dict()
    state = weights.load_weights(make_settings("sample").weights, None, sample="", key="")[0]
    data = pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}, "__author__": "zoo"})
    (tmp_path / "model_final.pkl").write_bytes(data)
    settings = make_settings("sample", weights=str(tmp_path / "model_final.pkl"), weights_sha256=storage.sha256(data))
    pinned = networks.pin_weights(settings, str(tmp_path / "root"))
    assert pinned.weights == str(tmp_path / "root" / "weights" / f"{storage.sha256(data)}.safetensors")
    assert pinned.weights_sha256 == storage.sha256(Path(pinned.weights).read_bytes())
    state_dict = networks.build_network(pinned).state_dict()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())


def test_the_sample_weights_are_pinned_and_not_copied(tmp_path: Path):
    pinned = networks.pin_weights(DetectorSettings(model="sample", weights="sample"), str(tmp_path))
    assert pinned.weights == "sample"
    assert pinned.weights_sha256 == (SAMPLE.with_name("detector.safetensors.sha256").read_text().split()[0])
    assert storage.list_files(str(tmp_path)) == []


def test_the_downloads_that_a_first_config_names_are_those_of_the_default_weights():
    detector, parent = DetectorSettings(), TrainSettings(name="first").parent
    assert detector.weights == "zoo"
    for uri in (weights.NAMED_WEIGHTS[parent].uri, networks.ZOO[detector.model]):
        assert uri.split("/")[2] in first_config.DOWNLOADS
