"""Interface of detection networks, and the restriction of their classes."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carclass.errors import UserError
from carclass.masking.detection import Detections, pad_detections
from carclass.masking.detectron import Instances


class Network(nn.Module):
    """A detection network with Detectron2's inputs and outputs.

    forward: list of {"image": float (3,H,W), 0..255, channels as in input_format} → list of {"instances": Instances}
    with image_size, pred_boxes in input pixels, scores, pred_classes (requested classes only) and, if finds_masks,
    pred_masks (N,1,M,M): probabilities within the box, neither pasted nor rescaled.
    """

    model: Any
    """The framework's network, with the tensor names of its weights files."""
    input_format: str
    """BGR or RGB."""
    finds_masks: bool
    canvas: int
    """Number that height and width of inputs are padded to multiples of; 1: they are not padded."""

    def detect(self, images: Sequence[Tensor]) -> Detections:
        """Return the detections in images of one canvas, float (3,H,W) as for `forward`."""
        instances = [output["instances"] for output in self([{"image": image} for image in images])]
        return pad_detections([_fields(each, self.finds_masks) for each in instances])


def _fields(instances: Instances, finds_masks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    masks = instances.pred_masks if finds_masks else None
    return instances.pred_boxes.tensor, instances.scores, instances.pred_classes, masks


def check_classes(classes: Collection[int], num_classes: int) -> None:
    """Raise UserError if a class is not among the network's."""
    if unknown := [number for number in classes if not 0 <= number < num_classes]:
        raise UserError(
            f"`mask.detector.classes`: {unknown} is not among the network's classes 0 to {num_classes - 1}."
        )


def merge_into_background(layer: nn.Linear, classes: Collection[int], background: int) -> None:
    """Merge all but the requested classes of a layer of softmax logits (R,K) into the background.

    The probabilities of the requested classes are unchanged. Boxes of other classes reach neither the mask head nor
    the limit on detections; as NMS is per class, detections of the requested classes are otherwise the same.
    """
    requested = torch.zeros(layer.out_features, dtype=torch.bool)
    requested[list(classes)] = True
    layer.register_buffer("other", ~requested, persistent=False)  # a buffer, to follow the layer to its device

    def merge(layer: Any, _: Any, logits: Tensor) -> Tensor:
        logits = logits.float()
        background_logits = logits.masked_fill(~layer.other, -torch.inf).logsumexp(-1)
        logits = logits.masked_fill(layer.other, -torch.inf)
        logits[:, background] = background_logits
        return logits

    layer.register_forward_hook(merge)
