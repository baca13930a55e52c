"""Detectron2 v0.6 on today's Python: the shims it needs, and its networks built from our own YAML files."""

import sys
from importlib import resources
from pathlib import Path
from types import ModuleType

import PIL.Image
from torch import nn

ARCHITECTURES = {
    "mask_rcnn_r50_fpn": "carclass.masking/mask_rcnn_r50_fpn.yaml",
    "sample": "carclass.sample/detector.yaml",
}


def _shim() -> None:
    """What Detectron2's Python files expect and this installation hasn't."""
    # ROIAlign and NMS come from torchvision; the compiled module is imported, never called.
    sys.modules.setdefault("detectron2._C", ModuleType("detectron2._C"))
    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR  # type: ignore[attr-defined]


_shim()
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.layers.mask_ops import paste_masks_in_image  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Instances  # noqa: E402

__all__ = ["Instances", "build", "load_config", "paste_masks_in_image"]


def load_config(architecture: str, **overrides: object) -> CfgNode:
    """Detectron2's settings of an architecture in ARCHITECTURES.

    overrides: dotted keys with `__` for the dot, e.g. MODEL__RPN__POST_NMS_TOPK_TEST=100.
    """
    package, name = ARCHITECTURES[architecture].split("/")
    cfg = get_cfg()
    with resources.as_file(resources.files(package) / name) as path:
        cfg.merge_from_file(str(Path(path)))
    for key, value in overrides.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def build(cfg: CfgNode) -> nn.Module:
    """An untrained network with Detectron2's contract: list[dict] in, list[dict] out; on the CPU, in eval mode."""
    return build_model(cfg).eval()
