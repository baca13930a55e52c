"""Inference of plain two-stage detectors over a batch, without waiting for the device between its steps.

Detectron2's own code works photo by photo on tensors of varying size, and a GPU is idle while the CPU waits for each
size. Here all tensors are padded to the largest size they can have.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carclass.masking import roi_align
from carclass.masking.detection import Detections
from carclass.masking.detectron import (
    RPN,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    GeneralizedRCNN,
    MaskRCNNConvUpsampleHead,
    ROIAlign,
    StandardROIHeads,
    StandardRPNHead,
)
from carclass.masking.nms import suppress

MAX_VEHICLES = 8
"""Detections a photo whose masks a GPU computes in one pass; photos with more are repeated one by one."""


def is_plain(model: nn.Module) -> bool:
    """Return True for Faster and Mask R-CNN with Detectron2's standard parts, with or without a feature pyramid."""
    if not isinstance(model, GeneralizedRCNN) or type(model.roi_heads) is not StandardROIHeads:
        return False
    rpn, heads = model.proposal_generator, model.roi_heads
    parts = {RPN: rpn, StandardRPNHead: rpn.rpn_head, FastRCNNConvFCHead: heads.box_head}
    parts[FastRCNNOutputLayers] = heads.box_predictor
    poolers = [heads.box_pooler]
    if heads.mask_on:
        parts[MaskRCNNConvUpsampleHead] = heads.mask_head
        poolers.append(heads.mask_pooler)
    is_aligned = all(type(layer) is ROIAlign and layer.aligned for pooler in poolers for layer in pooler.level_poolers)
    return all(type(part) is kind for kind, part in parts.items()) and not heads.keypoint_on and is_aligned


def detect(model: Any, images: Sequence[Tensor], classes: Tensor, *, static: bool) -> Detections:
    """Detect vehicles of the requested classes with a plain model: see Network.detect.

    classes: int64, on the model's device; static: use tensors of fixed shapes only, so that the CPU waits for no GPU;
    False: process only as many boxes as there are, for CPUs. Apart from rounding, the detections are the same.
    """
    limits = torch.tensor([[*image.shape[:0:-1], *image.shape[:0:-1]] for image in images], dtype=torch.float32)
    limits = limits.to(images[0].device, non_blocking=True)[:, None]
    features = model.backbone(_to_batch(model, images))
    proposals, valid, certain = propose(model.proposal_generator, features, limits, static=static)
    heads = model.roi_heads
    found, box_certain = _classify(heads, features, proposals, valid, limits, classes, static=static)
    complete = certain & box_certain
    if static:
        complete = complete & (found.scores[:, MAX_VEHICLES:] <= 0).all(1)
        found = found.first(MAX_VEHICLES)
    masks = _find_masks(heads, features, found, static=static) if heads.mask_on else None
    return found._replace(masks=masks, complete=complete)


def _to_batch(model: Any, images: Sequence[Tensor]) -> Tensor:
    """Return the normalised images, padded with zeros to one size: float32 (N,3,H,W), channels_last."""
    multiple = max(1, model.backbone.size_divisibility)
    height, width = (-(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width).to(memory_format=torch.channels_last)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = (image - model.pixel_mean) / model.pixel_std
    return batch


def propose(rpn: Any, features: dict[str, Tensor], limits: Tensor, *, static: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the proposals by descending objectness, float32 (N,P,4), bool (N,P), and if they are certain, bool (N,).

    limits: float32 (N,1,4), the largest coordinates of each photo. Only the best anchors of a level are decoded.
    """
    maps = [features[name] for name in rpn.in_features]
    logits, deltas = rpn.rpn_head(maps)
    levels = [
        _best_anchors(rpn, level_logits, level_deltas, anchors.tensor, limits)
        for level_logits, level_deltas, anchors in zip(logits, deltas, rpn.anchor_generator(maps), strict=True)
    ]
    longest = max(scores.shape[1] for scores, _ in levels)
    scores = torch.stack([nn.functional.pad(s, (0, longest - s.shape[1]), value=-torch.inf) for s, _ in levels], 1)
    boxes = torch.stack([nn.functional.pad(b, (0, 0, 0, longest - b.shape[1])) for _, b in levels], 1)
    usable = scores.flatten(0, 1).isfinite()
    kept, certain = suppress(boxes.flatten(0, 1), usable, rpn.nms_thresh, rpn.post_nms_topk[False], static=static)
    scores = scores.masked_fill(~kept.view_as(scores), -torch.inf).flatten(1)
    scores, order = _first(scores, rpn.post_nms_topk[False])
    return _take(boxes.flatten(1, 2), order), scores.isfinite(), certain.view(len(limits), -1).all(1)


def _best_anchors(rpn: Any, logits: Tensor, deltas: Tensor, anchors: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best boxes of a level by descending logit: float32 (N,K), -inf for unusable ones, and (N,K,4)."""
    count, _, height, width = logits.shape
    logits = logits.permute(0, 2, 3, 1).flatten(1)
    deltas = deltas.view(count, -1, 4, height, width).permute(0, 3, 4, 1, 2).reshape(count, -1, 4)
    logits, order = _first(logits, rpn.pre_nms_topk[False])
    boxes = _decode(rpn.box2box_transform, _take(deltas, order), anchors[order], limits)
    is_usable = logits.isfinite() & _is_box(boxes, rpn.min_box_size)
    return logits.float().masked_fill(~is_usable, -torch.inf), boxes.nan_to_num_()


def _classify(
    heads: Any,
    features: dict[str, Tensor],
    proposals: Tensor,
    valid: Tensor,
    limits: Tensor,
    classes: Tensor,
    *,
    static: bool,
) -> tuple[Detections, Tensor]:
    """Return the detections of the requested classes without masks, and for which photos they are certain."""
    predictor, (photos, count) = heads.box_predictor, proposals.shape[:2]
    pooled = _pool(heads.box_pooler, heads.box_in_features, features, proposals, static=static)
    logits, deltas = predictor(heads.box_head(pooled))
    scores = logits.softmax(-1)[:, classes].view(photos, count, -1)
    deltas = deltas.view(photos, count, -1, 4)
    deltas = deltas[:, :, classes] if deltas.shape[2] > 1 else deltas.expand(-1, -1, len(classes), -1)
    sources = proposals[:, :, None].expand(-1, -1, len(classes), -1)
    boxes = _decode(predictor.box2box_transform, deltas, sources, limits[:, None])
    # As in Detectron2, a box without an area is a detection, unlike one that is not finite.
    is_usable = valid[:, :, None] & boxes.isfinite().all(-1) & (scores > predictor.test_score_thresh)
    scores, order = _first(scores.masked_fill(~is_usable, 0).transpose(1, 2), count)
    boxes = torch.gather(boxes.nan_to_num_().transpose(1, 2), 2, order[..., None].expand(-1, -1, -1, 4))
    most = predictor.test_topk_per_image
    usable = scores.flatten(0, 1) > 0
    kept, certain = suppress(boxes.flatten(0, 1), usable, predictor.test_nms_thresh, most, static=static)
    scores = scores.masked_fill(~kept.view_as(scores), 0).flatten(1)
    scores, order = _first(scores, most)
    boxes = _take(boxes.flatten(1, 2), order)
    return Detections(boxes, scores, classes[order // count], None, None), certain.view(photos, -1).all(1)


def _find_masks(heads: Any, features: dict[str, Tensor], found: Detections, *, static: bool) -> Tensor:
    """Return the probabilities of the detections' masks: float32 (N,D,M,M), zeros where there is no detection."""
    is_found = found.scores.flatten() > 0
    rows = torch.arange(len(is_found), device=is_found.device) if static else is_found.nonzero()[:, 0]
    pooled = _pool(heads.mask_pooler, heads.mask_in_features, features, found.boxes, rows, static=static)
    logits = heads.mask_head.layers(pooled)
    if logits.shape[1] > 1:
        logits = logits[torch.arange(len(rows), device=rows.device), found.classes.flatten()[rows]][:, None]
    masks = torch.zeros(len(is_found), *logits.shape[2:], device=logits.device)
    masks[rows] = logits[:, 0].float().sigmoid()
    return (masks * is_found[:, None, None]).view(*found.scores.shape, *logits.shape[2:])


def _pool(
    pooler: Any,
    names: Sequence[str],
    features: dict[str, Tensor],
    boxes: Tensor,
    rows: Tensor | None = None,
    *,
    static: bool,
) -> Tensor:
    """Return the features of boxes (N,P,4), or of some rows of the flattened boxes."""
    photos = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    boxes = boxes.flatten(0, 1)
    if rows is not None:
        photos, boxes = photos[rows], boxes[rows]
    return roi_align.pool(pooler, [features[name] for name in names], photos, boxes, static=static)


def _decode(transform: Any, deltas: Tensor, sources: Tensor, limits: Tensor) -> Tensor:
    """Return the boxes (…,4) of deltas to source boxes of the same shape, clipped to the photo."""
    boxes = transform.apply_deltas(deltas.reshape(-1, 4), sources.reshape(-1, 4)).view(sources.shape)
    return torch.minimum(boxes.clamp_(min=0), limits)


def _is_box(boxes: Tensor, min_size: float) -> Tensor:
    return boxes.isfinite().all(-1) & ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(-1)


def _first(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores along the last axis and their positions; equal ones in their order."""
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :count], order[..., :count]


def _take(boxes: Tensor, order: Tensor) -> Tensor:
    """Return boxes (N,P,4) at positions (N,K)."""
    return torch.gather(boxes, 1, order[..., None].expand(-1, -1, 4))
