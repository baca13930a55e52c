"""Which of the vehicles found in a photo is the photographed one, and how far its mask can be trusted.

The rule: detections whose boxes overlap by more than SAME_VEHICLE are one vehicle, called what the surest of them
says (a pickup is often found as a car and as a truck). Of the vehicles, the one with the largest mask is taken, and
of those within LARGEST_TIE of it the most central; config.Mask.choice offers other rules.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

SAME_VEHICLE = 0.7
"""Intersection over union of two boxes above which they are one vehicle."""
LARGEST_TIE = 0.1
"""Share of the largest area by which another may be smaller and still count as large."""
RIVAL = 0.5
"""Share of the chosen area from which another vehicle makes a photo one of several vehicles."""
STABILITY_LOGIT = 1.0
"""Distance of the two thresholds from the middle, as in SAM (Kirillov et al. 2023)."""
SelectionRule = Literal["largest", "central", "surest"]


class Selection(NamedTuple):
    """The chosen detection and what stands beside it."""

    position: int  # among the detections given
    num_vehicles: int
    several: bool


def select_vehicle(
    boxes: Tensor, scores: Tensor, masks: Tensor | None, size: tuple[int, int], rule: SelectionRule
) -> Selection | None:
    """Picks the vehicle; None where there is none.

    boxes: float (N,4) x1,y1,x2,y2; scores: float (N,); masks: probabilities (N,1,M,M) within the boxes, or None;
    size: height and width of the photo in the boxes' pixels. On the CPU: N is small.
    """
    if len(boxes) == 0:
        return None
    kept = nms(boxes, scores, SAME_VEHICLE)
    boxes, scores = boxes[kept], scores[kept]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if masks is not None:
        areas = areas * (masks[kept, 0] > 0.5).float().mean((1, 2))
    offsets = (boxes[:, :2] + boxes[:, 2:]) / 2 - torch.tensor([size[1], size[0]]) / 2
    distances = offsets.norm(dim=1)
    if rule == "largest":
        best = int(distances.masked_fill(areas < (1 - LARGEST_TIE) * areas.max(), torch.inf).argmin())
    else:
        best = int(distances.argmin() if rule == "central" else scores.argmax())
    rivals = int((areas >= RIVAL * areas[best]).sum()) - 1
    return Selection(int(kept[best]), len(kept), rivals > 0)


def stability(mask: Tensor) -> float:
    """Agreement of a mask with itself: IoU of its cuts at a higher and a lower threshold, 0 to 1.

    mask: probabilities, any shape. SAM's stability score (Kirillov et al. 2023).
    """
    high, low = torch.sigmoid(torch.tensor([STABILITY_LOGIT, -STABILITY_LOGIT])).tolist()
    smallest, largest = int((mask > high).sum()), int((mask > low).sum())
    return smallest / largest if largest else 0.0


def touches_border(mask: np.ndarray) -> bool:
    """Whether a (H,W) mask reaches the photo's edge, where a vehicle may be cut off."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
