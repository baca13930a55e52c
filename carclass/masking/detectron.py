"""Detectron2 v0.6: compatibility shims, and networks built from YAML files that cannot run code."""

import posixpath
import sys
import warnings
from importlib import resources
from types import ModuleType
from typing import Any

import PIL.Image
import yaml
from torch import nn

from carclass import storage
from carclass.config import yaml_file
from carclass.config.installation import MissingPackageReport
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
    from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlign, ROIAlignRotated
    from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
    from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
    from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
    from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
    from detectron2.structures import Boxes, Instances

__all__ = [
    "CONFIG_ERRORS",
    "KEY",
    "RPN",
    "BasicStem",
    "BottleneckBlock",
    "Boxes",
    "CfgNode",
    "DeformConv",
    "FastRCNNConvFCHead",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "Instances",
    "MaskRCNNConvUpsampleHead",
    "ModulatedDeformConv",
    "ROIAlign",
    "ROIAlignRotated",
    "RetinaNet",
    "StandardROIHeads",
    "StandardRPNHead",
    "build",
    "load_config",
]

# Raised by yacs and by Detectron2's constructors for invalid settings.
CONFIG_ERRORS = (KeyError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError)


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
    except CONFIG_ERRORS as error:
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


def build(cfg: CfgNode) -> nn.Module:
    """Build Detectron2's untrained network, list[dict] → list[dict], on the CPU in eval mode."""
    return build_model(cfg).eval()
