"""RoIAlign (He et al. 2017) over a feature pyramid, in float32 whatever the precision of the network."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

OUTSIDE = -1e6
"""Coordinate of boxes that are beyond every photo: they pool zeros at next to no cost."""


def pool(pooler: Any, maps: Sequence[Tensor], photos: Tensor, boxes: Tensor, *, static: bool) -> Tensor:
    """Return the features of boxes, each from the level of its size: (R,C,S,S) in the dtype of the maps.

    pooler: Detectron2's ROIPooler of aligned RoIAlign layers; maps: (N,C,H,W), one a layer; photos: int64 (R,), the
    photo of each box; boxes: float32 (R,4) in the network's input; static: see two_stage.detect.
    """
    levels = _levels(pooler, boxes)
    pooled = None
    for level, (layer, feature_map) in enumerate(zip(pooler.level_poolers, maps, strict=True)):
        size, scale, ratio = layer.output_size[0], layer.spatial_scale, layer.sampling_ratio
        if static:
            here = torch.where((levels == level)[:, None], boxes, OUTSIDE)
            regions = torch.cat([photos[:, None].float(), here], dim=1)
            part = torchvision.ops.roi_align(feature_map.float(), regions, size, scale, ratio, aligned=True)
            pooled = part if pooled is None else pooled.add_(part)
        else:
            chosen = (levels == level).nonzero()[:, 0]
            part = _pool_by_products(feature_map, photos[chosen], boxes[chosen], size, scale, ratio)
            pooled = part.new_zeros(len(boxes), *part.shape[1:]) if pooled is None else pooled
            pooled[chosen] = part
    assert pooled is not None
    return pooled.to(maps[0].dtype)


def _levels(pooler: Any, boxes: Tensor) -> Tensor:
    """Return the level of each box by its size: int64 (R,), counted from the finest (Lin et al. 2017, equation 1)."""
    sizes = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = torch.floor(pooler.canonical_level + torch.log2(sizes / pooler.canonical_box_size + 1e-8))
    return (levels.clamp(pooler.min_level, pooler.max_level) - pooler.min_level).to(torch.int64)


def _pool_by_products(
    feature_map: Tensor, photos: Tensor, boxes: Tensor, size: int, scale: float, ratio: int
) -> Tensor:
    """Return RoIAlign's result as two matrix products a box: float32 (R,C,S,S).

    The mean of a bin's bilinear samples is separable into rows and columns. On a CPU, this reads the channels of a
    cell in one piece, where torchvision's operator first converts and transposes the whole map.
    """
    _, channels, height, width = feature_map.shape
    rows, row_ranges = _axis_weights(boxes[:, 1], boxes[:, 3], size, scale, ratio, height)
    columns, column_ranges = _axis_weights(boxes[:, 0], boxes[:, 2], size, scale, ratio, width)
    cells = feature_map.permute(0, 2, 3, 1)
    pooled = feature_map.new_zeros((len(boxes), size, size, channels), dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        for i, (photo, (top, bottom), (left, right)) in enumerate(
            zip(photos.tolist(), row_ranges, column_ranges, strict=True)
        ):
            if top < bottom and left < right:
                window = cells[photo, top:bottom, left:right].float().reshape(bottom - top, -1)
                over_rows = (rows[i, :, top:bottom] @ window).view(size, right - left, channels)
                torch.matmul(columns[i, :, left:right], over_rows, out=pooled[i])
    return pooled.permute(0, 3, 1, 2)


def _axis_weights(
    start: Tensor, end: Tensor, size: int, scale: float, ratio: int, length: int
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the weights of a map's cells in each bin along one axis, float32 (R,S,length), and the cells with any.

    start, end: of the boxes, in the network's input; ratio: samples a bin, 0 for one a cell.
    """
    start, end = start * scale - 0.5, end * scale - 0.5
    bin_size = (end - start) / size
    samples = torch.full_like(start, ratio) if ratio > 0 else torch.ceil(bin_size)
    number = torch.arange(int(samples.max()) if len(samples) else 0)
    bins = start[:, None] + torch.arange(size) * bin_size[:, None]
    position = bins[:, :, None] + (number + 0.5) * (bin_size / samples)[:, None, None]
    sampled = (number < samples[:, None])[:, None] & (position >= -1) & (position <= length)
    position = torch.where(sampled, position, 0).clamp_(0, length - 1)
    low = position.to(torch.int64)
    high = (low + 1).clamp_(max=length - 1)
    share = torch.where(sampled, 1 / samples[:, None, None], 0)
    weights = torch.zeros(len(start), size, length)
    weights.scatter_add_(2, low, (1 - (position - low)) * share)
    weights.scatter_add_(2, high, (position - low) * share)
    first = torch.where(sampled, low, length).flatten(1).amin(1) if len(number) else torch.zeros_like(start)
    last = torch.where(sampled, high + 1, 0).flatten(1).amax(1) if len(number) else torch.zeros_like(start)
    return weights, list(zip(first.int().tolist(), last.int().tolist(), strict=True))
