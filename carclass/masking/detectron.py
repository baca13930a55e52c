"""Detectron2 v0.6: compatibility shims, and networks built from YAML files that cannot run code."""

import posixpath
import sys
import warnings
from collections.abc import Collection
from importlib import resources
from types import ModuleType
from typing import Any

import PIL.Image
import torch
import yaml
from torch import Tensor, nn

from carclass import storage
from carclass.config import yaml_file
from carclass.config.installation import MissingPackageReport
from carclass.config.schema import DetectorSettings
from carclass.errors import UserError

ARCHITECTURES = {
    "mask_rcnn_r50_fpn": ("carclass.masking", "mask_rcnn_r50_fpn.yaml"),
    "faster_rcnn_r101_fpn": ("carclass.masking", "faster_rcnn_r101_fpn.yaml"),
    "sample": ("carclass.sample", "detector.yaml"),
}
"""Package and file of each named network."""
KEY = "mask.detector.model"
MAX_BASES = 8
"""Limit on chained `_BASE_` files; the zoo uses one."""


def _shim() -> None:
    """Provide the parts that Detectron2 imports and this installation lacks."""
    # ROIAlign and NMS come from torchvision: the compiled module is imported but never called.
    sys.modules.setdefault("detectron2._C", ModuleType("detectron2._C"))
    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "torch.meshgrid")  # Detectron2 relies on the default indexing


_shim()
with MissingPackageReport():
    from detectron2.config import CfgNode, get_cfg
    from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlignRotated
    from detectron2.layers.mask_ops import paste_masks_in_image
    from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
    from detectron2.structures import Boxes, Instances

__all__ = ["Boxes", "Instances", "Network", "build", "build_network", "load_config", "paste_masks_in_image"]

# Raised by yacs and by Detectron2's constructors for invalid settings.
_CONFIG_ERRORS = (KeyError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError)


class Network(nn.Module):
    """A detection network with Detectron2's inputs and outputs.

    forward: list of {"image": float (3,H,W), 0..255, channels as in input_format} → list of {"instances": Instances}
    with image_size, pred_boxes in input pixels, scores, pred_classes (requested classes only) and, if finds_masks,
    pred_masks (N,1,M,M): probabilities within the box, neither pasted nor rescaled.
    """

    model: Any
    """The framework's network, with the tensor names of its weights files."""
    input_format: str
    """BGR or RGB."""
    finds_masks: bool
    canvas: int
    """Number that height and width of inputs are padded to multiples of; 1: they are not padded."""


class DetectronNetwork(Network):
    """A network built by Detectron2."""

    def __init__(self, cfg: CfgNode, classes: Collection[int]) -> None:
        super().__init__()
        self.model = build(cfg)
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

    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
        """Detect vehicles; see Network for inputs and outputs."""
        if isinstance(self.model, RetinaNet):
            # Without masks and an output size, its postprocessing changes nothing.
            return self.model([{"image": item["image"]} for item in inputs])
        # PanopticFPN.inference would segment the background as well.
        results = GeneralizedRCNN.inference(self.model, inputs, do_postprocess=False)
        return [{"instances": instances} for instances in results]


def merge_into_background(layer: nn.Linear, classes: Collection[int], background: int) -> None:
    """Merge all but the requested classes of a layer of softmax logits (R,K) into the background.

    The probabilities of the requested classes are unchanged. Boxes of other classes reach neither the mask head nor
    the limit on detections; as NMS is per class, detections of the requested classes are otherwise the same.
    """
    requested = torch.zeros(layer.out_features, dtype=torch.bool)
    requested[list(classes)] = True
    layer.register_buffer("other", ~requested, persistent=False)  # a buffer, to follow the layer to its device

    def merge(layer: Any, _: Any, logits: Tensor) -> Tensor:
        logits = logits.float()
        background_logits = logits.masked_fill(~layer.other, -torch.inf).logsumexp(-1)
        logits = logits.masked_fill(layer.other, -torch.inf)
        logits[:, background] = background_logits
        return logits

    layer.register_forward_hook(merge)


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
    except _CONFIG_ERRORS as error:
        raise UserError(f"`{KEY}`: the network in {settings.model} cannot be built ({error}).") from error


def load_config(model: str, **overrides: object) -> CfgNode:
    """Load Detectron2's settings of a name in ARCHITECTURES or of the YAML file at a URI.

    overrides: dotted keys with `__` for the dot, e.g. MODEL__RPN__POST_NMS_TOPK_TEST=100. Raise UserError if the file
    is missing or has other keys than Detectron2's.
    """
    package, name = ARCHITECTURES.get(model, (None, None))
    uri = model if package is None else str(resources.files(package) / str(name))
    cfg = get_cfg()
    try:
        cfg.merge_from_other_cfg(CfgNode(_read_yaml(uri)))
    except UserError:
        raise
    except _CONFIG_ERRORS as error:
        raise UserError(f"`{KEY}`: {uri} has settings unknown to Detectron2 v0.6: {error.args[0]}.") from error
    if cfg.VERSION != 2:
        raise UserError(f"`{KEY}`: {uri} has VERSION {cfg.VERSION} of Detectron2's settings; version 2 is supported.")
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def _read_yaml(uri: str, depth: int = 0) -> dict[str, Any]:
    """Read a YAML file merged into its `_BASE_` files; Detectron2's reader would run code in it."""
    if depth > MAX_BASES:
        raise UserError(f"`{KEY}`: {uri}: `_BASE_` chains more than {MAX_BASES} files. Check it for a circle.")
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"`{KEY}`: {uri} cannot be read ({error}). Give the URI of a Detectron2 .yaml.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"`{KEY}`: {uri} is not UTF-8 text. Give the URI of a Detectron2 .yaml.") from error
    values = yaml_file.parse(text, f"`{KEY}`: {uri}", plain=yaml.safe_load)
    if not isinstance(values, dict):
        raise UserError(f"`{KEY}`: {uri} is not a mapping of Detectron2's settings.")
    bases = values.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        merged = _merge(merged, _read_yaml(resolve_relative(uri, str(base)), depth + 1))
    return _merge(merged, values)


def resolve_relative(uri: str, other: str) -> str:
    """Resolve a path relative to the file at a URI; return absolute paths and URIs as they are."""
    if "://" in other or other.startswith("/"):
        return other
    scheme, path = uri.split("://", 1) if "://" in uri else ("", uri)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(path), other))
    return f"{scheme}://{path}" if scheme else path


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge nested settings; values of `override` take precedence."""
    both = {key: (base[key], override[key]) for key in base.keys() & override.keys()}
    nested = {key: _merge(*pair) for key, pair in both.items() if all(isinstance(value, dict) for value in pair)}
    return {**base, **override, **nested}


def check_classes(classes: Collection[int], num_classes: int) -> None:
    """Raise UserError if a class is not among the network's."""
    if unknown := [number for number in classes if not 0 <= number < num_classes]:
        raise UserError(
            f"`mask.detector.classes`: {unknown} is not among the network's classes 0 to {num_classes - 1}."
        )


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


def build(cfg: CfgNode) -> nn.Module:
    """Build Detectron2's untrained network, list[dict] → list[dict], on the CPU in eval mode."""
    return build_model(cfg).eval()
