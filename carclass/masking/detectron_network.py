"""Networks built by Detectron2, restricted to the requested classes."""

from collections.abc import Collection, Sequence
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from carclass.config.schema import DetectorSettings
from carclass.errors import UserError
from carclass.masking import two_stage
from carclass.masking.detection import Detections
from carclass.masking.detectron import (
    CONFIG_ERRORS,
    KEY,
    CfgNode,
    DeformConv,
    GeneralizedRCNN,
    Instances,
    ModulatedDeformConv,
    RetinaNet,
    ROIAlign,
    ROIAlignRotated,
    build,
    load_config,
)
from carclass.masking.network import Network, check_classes, merge_into_background


class DetectronNetwork(Network):
    """A network built by Detectron2."""

    classes: Tensor

    def __init__(self, cfg: CfgNode, classes: Collection[int]) -> None:
        super().__init__()
        self.model = build(cfg)
        self.register_buffer("classes", torch.tensor(sorted(classes)), persistent=False)
        self.input_format = cfg.INPUT.FORMAT
        self.finds_masks = cfg.MODEL.MASK_ON and isinstance(self.model, GeneralizedRCNN)
        _check_support(self.model, cfg)
        self.canvas = max(1, self.model.backbone.size_divisibility)  # 32 with a feature pyramid, 0 in C4 and DC5 models
        if isinstance(self.model, RetinaNet):
            check_classes(classes, self.model.num_classes)
            score_only(self.model.head.cls_score, classes, self.model.num_classes)
            return
        heads = self.model.roi_heads
        check_classes(classes, heads.num_classes)
        cascade = isinstance(heads.box_predictor, nn.ModuleList)
        for predictor in heads.box_predictor if cascade else [heads.box_predictor]:
            merge_into_background(predictor.cls_score, classes, heads.num_classes)
        for layer in self.model.modules():
            if isinstance(layer, ROIAlign):
                layer.forward = partial(_pool_in_float32, layer)

    def detect(self, images: Sequence[Tensor]) -> Detections:
        """Return the detections in images of one canvas, a plain network's in one pass."""
        if not two_stage.is_plain(self.model):
            return super().detect(images)
        return two_stage.detect(self.model, images, self.classes, static=images[0].is_cuda)

    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
        """Detect vehicles; see Network for inputs and outputs."""
        if isinstance(self.model, RetinaNet):
            # Without masks and an output size, its postprocessing changes nothing.
            return self.model([{"image": item["image"]} for item in inputs])
        # PanopticFPN.inference would segment the background as well.
        results = GeneralizedRCNN.inference(self.model, inputs, do_postprocess=False)
        return [{"instances": instances} for instances in results]


def _pool_in_float32(layer: ROIAlign, feature_map: Tensor, boxes: Tensor) -> Tensor:
    """Return the features of boxes (R,5); in bf16, coordinates above 256 would be rounded to whole pixels."""
    size, scale, ratio = layer.output_size, layer.spatial_scale, layer.sampling_ratio
    features = torchvision.ops.roi_align(feature_map.float(), boxes.float(), size, scale, ratio, layer.aligned)
    return features.to(feature_map.dtype)


def score_only(layer: nn.Conv2d, classes: Collection[int], num_classes: int) -> None:
    """Set the score of all but the requested classes to 0 in a layer of sigmoid logits (N,A*K,H,W), K per anchor."""
    other = torch.ones(num_classes, dtype=torch.bool)
    other[list(classes)] = False
    layer.register_buffer("other", other.repeat(layer.out_channels // num_classes)[:, None, None], persistent=False)
    layer.register_forward_hook(lambda layer, _, logits: logits.float().masked_fill(layer.other, -torch.inf))


def build_network(settings: DetectorSettings) -> DetectronNetwork:
    """Build the untrained network of a name in ARCHITECTURES or a YAML file; raise UserError if that fails."""
    cfg = load_config(
        settings.model,
        MODEL__RPN__POST_NMS_TOPK_TEST=settings.num_proposals,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=settings.score_threshold,
        MODEL__RETINANET__SCORE_THRESH_TEST=settings.score_threshold,
        TEST__DETECTIONS_PER_IMAGE=settings.num_detections,
    )
    try:
        return DetectronNetwork(cfg, settings.classes)
    except UserError:
        raise
    except CONFIG_ERRORS as error:
        raise UserError(f"`{KEY}`: the network in {settings.model} cannot be built ({error}).") from error


def _check_support(model: nn.Module, cfg: CfgNode) -> None:
    """Raise UserError for networks that do not detect boxes, or need operators that are not installed."""
    if not isinstance(model, GeneralizedRCNN | RetinaNet) or getattr(model, "proposal_generator", model) is None:
        raise UserError(
            f"`{KEY}`: this {cfg.MODEL.META_ARCHITECTURE} does not detect boxes. "
            "Choose a GeneralizedRCNN, PanopticFPN or RetinaNet."
        )
    if any(isinstance(module, DeformConv | ModulatedDeformConv | ROIAlignRotated) for module in model.modules()):
        raise UserError(
            f"`{KEY}`: deformable convolutions and rotated boxes need Detectron2's compiled operators, which are not "
            "installed. Choose a network without them."
        )
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise UserError(f"`{KEY}`: INPUT.FORMAT is {cfg.INPUT.FORMAT}. Set BGR or RGB.")
