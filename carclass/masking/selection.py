"""Selection of the main vehicle among the detections of a photo, and quality measures of its mask.

Detections whose boxes overlap by more than SAME_VEHICLE are one vehicle and get the class of the highest score (a
pickup is often detected as car and as truck). Of the vehicles, the one with the largest mask is selected, and of those
within LARGEST_TIE of it the most central; `mask.choice` offers other rules.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

SAME_VEHICLE = 0.7
"""IoU of two boxes above which they are one vehicle."""
LARGEST_TIE = 0.1
"""Share of the largest area by which another vehicle may be smaller and still count as equally large."""
RIVAL = 0.5
"""Share of the selected vehicle's area from which another vehicle sets `several_vehicles`."""
STABILITY_LOGIT = 1.0
"""Offset of the two mask thresholds in logits, as in SAM (Kirillov et al. 2023)."""
VERSION = 1
"""Version of the selection. Raise it with every change that selects another vehicle: it is part of the identity of
masked datasets, except 1, which those of earlier code have (where an empty mask could be selected)."""
SelectionRule = Literal["largest", "central", "highest_score"]


class Selection(NamedTuple):
    """The selected detection and the number of vehicles around it."""

    best: int  # index of the selected detection
    num_vehicles: int
    several_vehicles: bool


def select_vehicle(
    boxes: Tensor, scores: Tensor, masks: Tensor | None, size: tuple[int, int], rule: SelectionRule
) -> Selection | None:
    """Select the main vehicle; return None if no detection covers a pixel.

    boxes: float (N,4) x1,y1,x2,y2; scores: float (N,); masks: probabilities (N,M,M) within the boxes, or None;
    size: height and width of the photo in the boxes' pixels. All tensors are on the CPU, as N is small.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if masks is not None:
        areas = areas * (masks > 0.5).float().mean((1, 2))
    kept = (areas > 0).nonzero()[:, 0]  # a vehicle with an empty mask would be nothing but fill colour
    if len(kept) == 0:
        return None
    kept = kept[nms(boxes[kept], scores[kept], SAME_VEHICLE)]
    boxes, scores, areas = boxes[kept], scores[kept], areas[kept]
    offsets = (boxes[:, :2] + boxes[:, 2:]) / 2 - torch.tensor([size[1], size[0]]) / 2
    distances = offsets.norm(dim=1)
    if rule == "largest":
        best = int(distances.masked_fill(areas < (1 - LARGEST_TIE) * areas.max(), torch.inf).argmin())
    else:
        best = int(distances.argmin() if rule == "central" else scores.argmax())
    rivals = int((areas >= RIVAL * areas[best]).sum()) - 1
    return Selection(int(kept[best]), num_vehicles=len(kept), several_vehicles=rivals > 0)


def stability(mask: Tensor) -> float:
    """Return SAM's stability score (Kirillov et al. 2023), 0 to 1: the IoU of the mask at a high and a low threshold.

    mask: probabilities, any shape.
    """
    high, low = torch.sigmoid(torch.tensor([STABILITY_LOGIT, -STABILITY_LOGIT])).tolist()
    smallest, largest = int((mask > high).sum()), int((mask > low).sum())
    return smallest / largest if largest else 0.0
