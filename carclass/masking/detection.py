"""The main vehicle of a photo, as detected and as columns of a dataset."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from carclass.masking.rle import encode_mask


class Detection(NamedTuple):
    """The main vehicle of a photo, in the photo's pixels."""

    category: int  # of COCO's 80 classes
    score: float
    box: np.ndarray  # float32 (4,): x1, y1, x2, y2
    mask: np.ndarray | None  # bool (H, W); None from a network without a mask head
    num_vehicles: int
    several_vehicles: bool
    touches_border: bool
    area_fraction: float
    stability: float | None


_MEASURES = ("score", "num_vehicles", "several_vehicles", "touches_border", "area_fraction", "stability")


def detection_columns(detection: Detection | None, classes: Mapping[int, str]) -> dict[str, Any]:
    """Return a detection as columns of dataset.DETECTION. classes: names by number."""
    if detection is None:
        return {"outcome": "no_vehicle", "num_vehicles": 0}
    return {
        "outcome": "vehicle",
        "vehicle_class": classes[detection.category],
        "box": detection.box.tolist(),
        **{name: getattr(detection, name) for name in _MEASURES},
        # Encoded here, as rows of large photos accumulate until a part is written.
        "mask": None if detection.mask is None else encode_mask(detection.mask),
    }
