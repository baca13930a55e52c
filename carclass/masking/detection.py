"""Detections as networks return them, the main vehicle of a photo, and its columns of a dataset."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Detections(NamedTuple):
    """Detections in N photos, padded to the same number D, by descending score."""

    boxes: Tensor  # float32 (N,D,4): x1, y1, x2, y2 in the network's input
    scores: Tensor  # float32 (N,D); 0 where there is no detection
    classes: Tensor  # int64 (N,D), of COCO's 80
    masks: Tensor | None  # float32 (N,D,M,M): probabilities within the boxes; None from a network without a mask head
    complete: Tensor | None  # bool (N,), False for photos whose detections have to be found photo by photo

    def first(self, count: int) -> "Detections":
        """Return the first detections of each photo."""
        return self._apply(lambda field: field if field.dim() == 1 else field[:, :count])

    def to_host(self, *, wait: bool = True) -> "Detections":
        """Return copies on the CPU. wait: False to return before a GPU has filled them."""
        return self._apply(lambda field: field.to("cpu", non_blocking=not wait))

    def photo(self, number: int) -> "Detections":
        """Return the detections of a photo, without padding and its axis."""
        count = int((self.scores[number] > 0).sum())
        return self._replace(complete=None)._apply(lambda field: field[number, :count])

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Detections":
        boxes, scores, classes = function(self.boxes), function(self.scores), function(self.classes)
        masks = None if self.masks is None else function(self.masks)
        return Detections(boxes, scores, classes, masks, None if self.complete is None else function(self.complete))


class Detection(NamedTuple):
    """The main vehicle of a photo, in the photo's pixels."""

    category: int  # of COCO's 80 classes
    score: float
    box: np.ndarray  # float32 (4,): x1, y1, x2, y2
    grid: np.ndarray | None  # float32 (M,M): the mask's probabilities within the box; None without a mask head
    num_vehicles: int
    several_vehicles: bool
    stability: float | None


_MEASURES = ("score", "num_vehicles", "several_vehicles", "stability")


def detection_columns(detection: Detection | None, classes: Mapping[int, str]) -> dict[str, Any]:
    """Return a detection as columns of writer.DETECTED. classes: names by number."""
    if detection is None:
        return {"outcome": "no_vehicle", "num_vehicles": 0}
    return {
        "outcome": "vehicle",
        "vehicle_class": classes[detection.category],
        "box": detection.box.tolist(),
        **{name: getattr(detection, name) for name in _MEASURES},
        "grid": None if detection.grid is None else detection.grid.astype(np.float32).tobytes(),
    }


def pad_detections(photos: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Detections:
    """Return the detections of a list of photos: boxes (D,4), scores (D,), classes (D,), masks (D,1,M,M) or None."""
    boxes, scores, classes, masks = (
        None if fields[0] is None else torch.nn.utils.rnn.pad_sequence(list(fields), batch_first=True)
        for fields in zip(*photos, strict=True)
    )
    assert boxes is not None
    assert scores is not None
    assert classes is not None
    return Detections(boxes.float(), scores.float(), classes, None if masks is None else masks[:, :, 0].float(), None)
