"""Description of an exported model: the metadata of its files."""

import dataclasses
from typing import Any, NamedTuple

from carclass import storage
from carclass.data.formats import json_text, to_json
from carclass.runs.preprocessing_record import Preprocessing

READING = (
    "turned upright by EXIF's orientation; 16-bit samples keep their high byte; transparency over white; longer side "
    "shrunk to {max_side} pixels if it is above; JPEG of quality {quality}, unless the photo is one of this size"
)


class ModelDescription(NamedTuple):
    """All that a user of a model's file has to know."""

    facts: dict[str, Any]  # as publish_model recorded them
    preprocessing: Preprocessing
    temperature: float

    @property
    def steps(self) -> dict[str, Any]:
        """Return the preprocessing and the temperature, without places on storage."""
        steps = {**dataclasses.asdict(self.preprocessing), "temperature": self.temperature}
        del steps["detector_weights"]
        if steps["mask"] is not None:
            detector = {**steps["mask"]["detector"], "model": self._detector_name}
            steps["mask"] = {**steps["mask"], "detector": detector}
        return steps

    @property
    def digest(self) -> str:
        """Return the sha256 of the steps."""
        return storage.sha256(to_json(self.steps))

    def metadata(self, *, normalises: bool) -> dict[str, str]:
        """Return the metadata of a file; lists and mappings are JSON. normalises: True if the file is a graph."""
        size = self.preprocessing.image_size
        graph = f"uint8 (N,3,{size},{size}) RGB, 0 to 255, any N; mean and std are applied inside"
        weights = f"float32 (N,3,{size},{size}) RGB, (photo / 255 - mean) / std"
        outputs = "logits and probabilities, which" if normalises else "logits; probabilities"
        return {
            "classes": json_text(self.preprocessing.classes, ensure_ascii=False),
            "image_size": str(size),
            "preprocessing": json_text(self.steps, ensure_ascii=False),
            "reading": READING.format(**self.preprocessing.reading),
            "masking": self._masking,
            "resize": "to image_size x image_size whatever the shape; bilinear, antialiased, rounded to uint8",
            "input": graph if normalises else weights,
            "layout": "NCHW, RGB",
            "mean": json_text(self.preprocessing.mean),
            "std": json_text(self.preprocessing.std),
            "output": f"float32 (N,C) {outputs} are softmax(logits / temperature), in the order of classes",
            "temperature": str(self.temperature),
            "model": json_text(self.facts["model"]),
            **{key: str(self.facts[key]) for key in ("run", "stage", "epoch", "val_accuracy")},
            "model_sha256": self.facts["sha256"],
        }

    @property
    def _detector_name(self) -> str:
        return str((self.preprocessing.mask or {})["detector"]["model"]).rsplit("/", 1)[-1]

    @property
    def _masking(self) -> str:
        if self.preprocessing.mask is None:
            return "none"
        detector, cutout = self.preprocessing.mask["detector"], self.preprocessing.mask["cutout"]
        return (
            f"required before resizing: {cutout['mode']} of the vehicle found by {self._detector_name} (weights with "
            f"sha256 {detector['weights']}), margin {cutout['margin']:g}, background {json_text(cutout['fill'])}; "
            "see preprocessing for all settings"
        )
