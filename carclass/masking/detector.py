"""Finds the vehicle of a photo: Detectron2's contract behind one function on arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask

from carclass import config, weights
from carclass.errors import UserError
from carclass.masking import detectron
from carclass.model import autocast


class Detection(NamedTuple):
    """The vehicle of a photo, in the photo's own pixels."""

    category: int  # COCO id
    score: float
    box: np.ndarray  # float32 (4,): x1, y1, x2, y2
    mask: np.ndarray  # bool (H, W)


class Detector:
    """A network with its weights, on one device.

    UserError when the weights aren't there, aren't what their hash says or don't fit the architecture.
    """

    def __init__(self, settings: config.Detector, device: str = "cpu") -> None:
        self.settings, self.device = settings, torch.device(device)
        cfg = detectron.load_config(
            settings.model,
            MODEL__RPN__POST_NMS_TOPK_TEST=settings.num_proposals,
            MODEL__ROI_HEADS__SCORE_THRESH_TEST=settings.score_threshold,
            TEST__DETECTIONS_PER_IMAGE=settings.num_detections,
        )
        self.model = detectron.build(cfg)
        _load_weights(self.model, settings)
        self.model.to(self.device)

    @torch.inference_mode()
    def __call__(self, photos: Sequence[np.ndarray]) -> list[Detection | None]:
        """The largest vehicle of each photo by mask area, or None. photos: uint8 (H,W,3) RGB each."""
        inputs = [self._input(photo) for photo in photos]
        with autocast(self.settings.precision, self.device):
            outputs = self.model.inference(inputs, do_postprocess=False)  # type: ignore[operator]
        return [self._choose(found, photo.shape[:2]) for found, photo in zip(outputs, photos, strict=True)]

    def _input(self, photo: np.ndarray) -> dict[str, torch.Tensor]:
        """Detectron2's input: BGR, 0..255, resized on the device."""
        height, width = photo.shape[:2]
        scale = min(self.settings.short_side / min(height, width), self.settings.max_size / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = torch.tensor(photo, device=self.device).permute(2, 0, 1).flip(0)[None].float()
        return {"image": torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]}

    def _choose(self, found: "detectron.Instances", shape: tuple[int, int]) -> Detection | None:
        """Filters classes, compares areas on the small masks, and pastes only the chosen one."""
        wanted = torch.tensor(sorted(self.settings.classes), device=self.device)
        found = found[torch.isin(found.pred_classes, wanted)]
        if len(found) == 0:
            return None
        areas = found.pred_boxes.area() * (found.pred_masks[:, 0].float() > 0.5).float().mean((1, 2))
        best = found[int(areas.argmax())]
        scale = torch.tensor([shape[1] / found.image_size[1], shape[0] / found.image_size[0]] * 2, device=self.device)
        box = best.pred_boxes.tensor.float() * scale
        mask = detectron.paste_masks_in_image(best.pred_masks[:, 0].float(), box, shape, threshold=0.5)[0]
        return Detection(
            int(best.pred_classes[0]), float(best.scores[0]), box[0].cpu().numpy(), mask.cpu().numpy().astype(bool)
        )


def _load_weights(model: torch.nn.Module, settings: config.Detector) -> None:
    key = "mask.detector.weights"
    state, _ = weights.load(settings.weights, settings.weights_sha256, sample="detector.safetensors", key=key)
    expected = model.state_dict()
    # BatchNorm's counters and the anchors, which some files leave out, are never learnt.
    missing = [n for n in expected if n not in state and "num_batches_tracked" not in n and "cell_anchors" not in n]
    wrong = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    if missing or wrong:
        raise UserError(
            f"`{key}`: {settings.weights} is no {settings.model}: {len(missing)} tensors are missing, "
            f"{len(wrong)} don't fit (the first: {[*missing, *wrong][0]}). Choose the `mask.detector.model` it is for."
        )
    model.load_state_dict({name: state[name].float() for name in state if name in expected}, strict=False)


def encode_mask(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a bool (H,W) mask."""
    return str(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


def decode_mask(counts: str, height: int, width: int) -> np.ndarray:
    """The bool (H,W) mask of COCO's compressed run lengths."""
    return np.asarray(coco_mask.decode({"size": [height, width], "counts": counts.encode()}), dtype=bool)


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks of the same shape; 1 when both are empty."""
    union = int(np.logical_or(one, other).sum())
    return float(np.logical_and(one, other).sum() / union) if union else 1.0
