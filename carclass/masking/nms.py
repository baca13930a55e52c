"""Non-maximum suppression in batches, without a loop over photos or classes on a GPU."""

import torch
from torch import Tensor
from torchvision.ops import nms

MAX_ROUNDS = 16
"""Rounds of the fixed point; photos of cars need 7 to 14."""
FIRST_CANDIDATES = 3
"""Candidates tried at first for each box that is needed."""


def suppress(boxes: Tensor, valid: Tensor, threshold: float, needed: int, *, static: bool) -> tuple[Tensor, Tensor]:
    """Return the boxes that greedy suppression keeps, bool (B,K), and for which rows this is certain, bool (B,).

    boxes: float32 (B,K,4) x1,y1,x2,y2, in each row by descending score; valid: bool (B,K), others have no effect;
    needed: number of kept boxes in each row from which on others may be missing; static: see two_stage.detect.
    """
    if static:
        return fixed_point(boxes, valid, threshold)
    return greedy(boxes, valid, threshold, needed), torch.ones(len(boxes), dtype=torch.bool)


def greedy(boxes: Tensor, valid: Tensor, threshold: float, needed: int) -> Tensor:
    """Return the kept boxes of `suppress` by torchvision's operator, row by row."""
    kept = torch.zeros_like(valid)
    for row, row_valid, row_kept in zip(boxes, valid, kept, strict=True):
        candidates = row_valid.nonzero()[:, 0]
        count = min(len(candidates), FIRST_CANDIDATES * needed)
        while True:  # the result for the first candidates does not depend on those after them
            first = nms(row[candidates[:count]], -torch.arange(count, dtype=torch.float32), threshold)
            if len(first) >= needed or count == len(candidates):
                break
            count = min(len(candidates), 2 * count)
        row_kept[candidates[first]] = True
    return kept


def fixed_point(boxes: Tensor, valid: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return all kept boxes of `suppress` as a fixed point, and the rows in which it is reached: bool (B,K), bool (B,).

    A box is kept if no kept box before it overlaps with it by more than the threshold. Starting from all boxes, each
    round settles at least the next one; the result is final once a round changes nothing.
    """
    suppressors = _overlap(boxes, threshold).triu_(1) & valid[:, :, None]
    suppressors = suppressors.to(torch.bfloat16 if boxes.is_cuda else torch.float32)
    kept = previous = valid
    for _ in range(MAX_ROUNDS):
        previous = kept
        suppressed = torch.bmm(kept[:, None].to(suppressors.dtype), suppressors)[:, 0] > 0
        kept = valid & ~suppressed
    return kept, (kept == previous).all(1)


def _overlap(boxes: Tensor, threshold: float) -> Tensor:
    """Return the pairs of boxes whose IoU exceeds the threshold: bool (B,K,K)."""
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    width = (torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])).clamp_(min=0)
    height = (torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])).clamp_(min=0)
    intersection = width.mul_(height)
    return intersection / (areas[:, :, None] + areas[:, None] - intersection) > threshold
