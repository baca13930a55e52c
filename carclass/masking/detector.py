"""Finds the vehicle of a photo: a network behind one function on arrays."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from carclass.config.schema import DetectorSettings
from carclass.masking import networks
from carclass.masking.detectron import Instances, paste_masks_in_image
from carclass.masking.selection import SelectionRule, select_vehicle, stability, touches_border
from carclass.models.resnet import autocast, fold

CANVAS = 32
"""Networks see photos on canvases whose sides are multiples of it: the coarsest step of the feature pyramid."""


class Detection(NamedTuple):
    """The vehicle of a photo, in the photo's own pixels."""

    category: int  # of COCO's 80 classes
    score: float
    box: np.ndarray  # float32 (4,): x1, y1, x2, y2
    mask: np.ndarray | None  # bool (H, W); None from a network that finds boxes only
    num_vehicles: int
    several_vehicles: bool
    touches_border: bool
    area_fraction: float
    stability: float | None


class Detector:
    """A network with its weights, on one device.

    On a GPU, photos of the same canvas (size after scaling, rounded up) go through together. On a CPU a batch gains
    nothing, and photos go one by one. Either way a photo is never padded to another's size, so that what is found in
    it depends on no other photo. UserError for wrong weights.
    """

    def __init__(self, settings: DetectorSettings, rule: SelectionRule = "largest", device: str = "cpu") -> None:
        self.settings, self.rule, self.device = settings, rule, torch.device(device)
        self.network = networks.build_network(settings)
        self.finds_masks = self.network.finds_masks
        _make_fast(self.network, settings.precision)
        self.network.to(self.device)

    def __call__(self, photos: Sequence[np.ndarray], batch_size: int = 1) -> list[Detection | None]:
        """The vehicle of each photo, or None. photos: uint8 (H,W,3) RGB each; batch_size: photos per forward pass."""
        found: list[Detection | None] = [None] * len(photos)
        for batch in self._batches(photos, batch_size if self.device.type == "cuda" else 1):
            outputs = self.forward([photos[i] for i in batch])
            for i, instances in zip(batch, outputs, strict=True):
                found[i] = self._describe(instances, photos[i].shape[:2])
        return found

    @torch.inference_mode()
    def forward(self, photos: Sequence[np.ndarray]) -> list[Instances]:
        """What the network says of photos of one canvas, in the scaled photos' pixels; masks are not pasted."""
        inputs = [{"image": self._input(photo)} for photo in photos]
        with autocast(self.settings.precision, self.device):
            return [output["instances"] for output in self.network(inputs)]

    def _batches(self, photos: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
        """Indices of photos that share a canvas, at most batch_size at a time."""
        groups = defaultdict(list)
        for i, photo in enumerate(photos):
            groups[tuple(-(-side // CANVAS) for side in self._scaled(photo))].append(i)
        for group in groups.values():
            yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))

    def _scaled(self, photo: np.ndarray) -> tuple[int, int]:
        """Height and width as the network sees them."""
        height, width = photo.shape[:2]
        scale = min(self.settings.short_side / min(height, width), self.settings.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _input(self, photo: np.ndarray) -> Tensor:
        """float (3,h,w), 0..255, in the network's channel order, resized on the device."""
        pixels = torch.tensor(photo, device=self.device).permute(2, 0, 1)[None].float()
        if self.network.input_format == "BGR":
            pixels = pixels.flip(1)
        size = self._scaled(photo)
        return nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]

    @torch.inference_mode()
    def _describe(self, found: Instances, shape: tuple[int, int]) -> Detection | None:
        """Chooses among a few small masks, and pastes only the chosen one."""
        boxes, scores = found.pred_boxes.tensor.float().cpu(), found.scores.float().cpu()
        soft = found.pred_masks.float() if self.finds_masks else None
        chosen = select_vehicle(boxes, scores, None if soft is None else soft.cpu(), found.image_size, self.rule)
        if chosen is None:
            return None
        i, (height, width) = chosen.position, shape
        box = boxes[i] * torch.tensor([width / found.image_size[1], height / found.image_size[0]] * 2)
        if soft is None:
            mask, area = None, float((box[2] - box[0]) * (box[3] - box[1])) / (height * width)
            cut_off = bool((box[:2] < 1).any() or box[2] > width - 1 or box[3] > height - 1)
        else:
            pasted = paste_masks_in_image(soft[i], box[None].to(self.device), shape, threshold=0.5)
            mask = pasted[0].to(torch.uint8).cpu().numpy().view(bool)
            area, cut_off = float(mask.mean()), touches_border(mask)
        return Detection(
            category=int(found.pred_classes[i]),
            score=float(scores[i]),
            box=box.numpy(),
            mask=mask,
            num_vehicles=chosen.num_vehicles,
            several_vehicles=chosen.several,
            touches_border=cut_off,
            area_fraction=area,
            stability=None if soft is None else stability(soft[i].cpu()),
        )


def _make_fast(network: nn.Module, precision: str) -> None:
    """Does once what would be done at every pass: folds BatchNorm, casts weights, lays them out channels last."""
    for module in network.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and hasattr(norm, "running_var"):
            assert norm is not None
            module.weight, module.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in fold(module, norm))
            module.norm = None  # type: ignore[assignment]
        if precision == "bf16" and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(torch.bfloat16)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
