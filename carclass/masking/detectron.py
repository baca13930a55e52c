"""Detectron2 v0.6 on today's Python: the shims it needs, and its networks built from YAML that can run no code."""

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
from carclass.config.schema import DetectorSettings
from carclass.errors import UserError

ARCHITECTURES = {
    "mask_rcnn_r50_fpn": ("carclass.masking", "mask_rcnn_r50_fpn.yaml"),
    "faster_rcnn_r101_fpn": ("carclass.masking", "faster_rcnn_r101_fpn.yaml"),
    "sample": ("carclass.sample", "detector.yaml"),
}
"""Package and file of the networks that are known by name."""
KEY = "mask.detector.model"
MAX_BASES = 8
"""How deep YAML files may stand on others; the zoo's stand on one."""


def _shim() -> None:
    """What Detectron2's Python files expect and this installation hasn't."""
    # ROIAlign and NMS come from torchvision; the compiled module is imported, never called.
    sys.modules.setdefault("detectron2._C", ModuleType("detectron2._C"))
    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "torch.meshgrid")  # its anchors are made the old way, which is meant


_shim()
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlignRotated  # noqa: E402
from detectron2.layers.mask_ops import paste_masks_in_image  # noqa: E402
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

__all__ = ["Boxes", "Instances", "Network", "build", "build_network", "load_config", "paste_masks_in_image"]

# What yacs and Detectron2's constructors raise on settings that don't fit together.
_WRONG_SETTINGS = (KeyError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError)


class Network(nn.Module):
    """A detector behind Detectron2's contract, whatever is inside.

    forward: list of {"image": float (3,H,W), 0..255 in the order of input_format} → list of {"instances":
    Instances} with image_size, pred_boxes (input pixels), scores, pred_classes (of the wanted ones alone) and,
    where finds_masks, pred_masks (N,1,M,M): probabilities inside the box, neither pasted nor rescaled.
    """

    model: Any
    """The network itself, with the names that its weights have."""
    input_format: str
    """BGR or RGB."""
    finds_masks: bool


class DetectronNetwork(Network):
    """A network of Detectron2."""

    def __init__(self, cfg: CfgNode, classes: Collection[int]) -> None:
        super().__init__()
        self.model = build(cfg)
        self.input_format = cfg.INPUT.FORMAT
        self.finds_masks = cfg.MODEL.MASK_ON and isinstance(self.model, GeneralizedRCNN)
        _check_support(self.model, cfg)
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
        """See Network."""
        if isinstance(self.model, RetinaNet):
            # Without masks and another size to scale to, its postprocessing changes nothing.
            return self.model([{"image": item["image"]} for item in inputs])
        # PanopticFPN's own inference would segment the background too, which nobody needs here.
        found = GeneralizedRCNN.inference(self.model, inputs, do_postprocess=False)
        return [{"instances": instances} for instances in found]


def merge_into_background(layer: nn.Linear, classes: Collection[int], background: int) -> None:
    """Makes a layer of softmax logits (R,K) speak of the wanted classes and the background alone.

    The probability of all others goes to the background and that of the wanted stays what it is: boxes of other
    classes then reach neither the mask head nor the detections that are kept. Since NMS looks at one class at a
    time, what is found of the wanted classes is the same as without this, but for the limit on detections.
    """
    wanted = torch.zeros(layer.out_features, dtype=torch.bool)
    wanted[list(classes)] = True
    layer.register_buffer("other", ~wanted, persistent=False)  # with the layer it moves to its device

    def merge(layer: Any, _: Any, logits: Tensor) -> Tensor:
        logits = logits.float()
        rest = logits.masked_fill(~layer.other, -torch.inf).logsumexp(-1)
        logits = logits.masked_fill(layer.other, -torch.inf)
        logits[:, background] = rest
        return logits

    layer.register_forward_hook(merge)


def score_only(layer: nn.Conv2d, classes: Collection[int], num_classes: int) -> None:
    """Makes a layer of sigmoid logits (N,A*K,H,W), anchor by anchor, score all but the wanted classes 0."""
    other = torch.ones(num_classes, dtype=torch.bool)
    other[list(classes)] = False
    layer.register_buffer("other", other.repeat(layer.out_channels // num_classes)[:, None, None], persistent=False)
    layer.register_forward_hook(lambda layer, _, logits: logits.float().masked_fill(layer.other, -torch.inf))


def build_network(settings: DetectorSettings) -> DetectronNetwork:
    """The untrained network of a known name or a YAML file; UserError when it can't be built here."""
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
    except _WRONG_SETTINGS as error:
        raise UserError(f"`{KEY}`: {settings.model} describes no network that can be built ({error}).") from error


def load_config(model: str, **overrides: object) -> CfgNode:
    """Detectron2's settings of a name in ARCHITECTURES or of the YAML file at a URI.

    overrides: dotted keys with `__` for the dot, e.g. MODEL__RPN__POST_NMS_TOPK_TEST=100. UserError when the file
    isn't there or holds anything but Detectron2's settings.
    """
    package, name = ARCHITECTURES.get(model, (None, None))
    uri = model if package is None else str(resources.files(package) / str(name))
    cfg = get_cfg()
    try:
        cfg.merge_from_other_cfg(CfgNode(_read(uri)))
    except UserError:
        raise
    except _WRONG_SETTINGS as error:
        raise UserError(f"`{KEY}`: {uri} has settings that Detectron2 v0.6 hasn't: {error.args[0]}.") from error
    if cfg.VERSION != 2:
        raise UserError(f"`{KEY}`: {uri} is written in version {cfg.VERSION} of Detectron2's settings, not in 2.")
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def _read(uri: str, depth: int = 0) -> dict[str, Any]:
    """A YAML file's settings upon those of its `_BASE_`; Detectron2's own reader would run code that stands in it."""
    if depth > MAX_BASES:
        raise UserError(f"`{KEY}`: {uri}: `_BASE_` leads through more than {MAX_BASES} files. Does it go in a circle?")
    try:
        values = yaml.safe_load(storage.read_bytes(uri))
    except OSError as error:
        raise UserError(f"`{KEY}`: {uri} cannot be read ({error}). Give the URI of a Detectron2 .yaml.") from error
    except yaml.YAMLError as error:
        raise UserError(f"`{KEY}`: {uri} is not plain YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"`{KEY}`: {uri} holds no settings of Detectron2.")
    bases = values.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        merged = _merge(merged, _read(beside(uri, str(base)), depth + 1))
    return _merge(merged, values)


def beside(uri: str, other: str) -> str:
    """The URI of a file that is named relative to another."""
    if "://" in other or other.startswith("/"):
        return other
    scheme, path = uri.split("://", 1) if "://" in uri else ("", uri)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(path), other))
    return f"{scheme}://{path}" if scheme else path


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with the upper ones' values where both have one."""
    both = {key: (lower[key], upper[key]) for key in lower.keys() & upper.keys()}
    nested = {key: _merge(*pair) for key, pair in both.items() if all(isinstance(value, dict) for value in pair)}
    return {**lower, **upper, **nested}


def check_classes(classes: Collection[int], num_classes: int) -> None:
    """UserError unless the network knows all of the classes."""
    if wrong := [number for number in classes if not 0 <= number < num_classes]:
        raise UserError(f"`mask.detector.classes`: {wrong} is not among the network's classes 0 to {num_classes - 1}.")


def _check_support(model: nn.Module, cfg: CfgNode) -> None:
    """UserError for networks that don't find boxes of classes in a photo, or need what isn't installed."""
    if not isinstance(model, GeneralizedRCNN | RetinaNet) or getattr(model, "proposal_generator", model) is None:
        raise UserError(
            f"`{KEY}`: a {cfg.MODEL.META_ARCHITECTURE} like this finds no boxes in a photo. "
            "Choose a GeneralizedRCNN, a PanopticFPN or a RetinaNet."
        )
    if any(isinstance(module, DeformConv | ModulatedDeformConv | ROIAlignRotated) for module in model.modules()):
        raise UserError(f"`{KEY}`: deformable convolutions and rotated boxes need parts that aren't installed.")
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise UserError(f"`{KEY}`: INPUT.FORMAT is {cfg.INPUT.FORMAT}; photos come in BGR or RGB.")


def build(cfg: CfgNode) -> nn.Module:
    """An untrained network with Detectron2's contract: list[dict] in, list[dict] out; on the CPU, in eval mode."""
    return build_model(cfg).eval()
