"""Baseline of the prediction benchmark: one photo at a time through both networks, without Ray."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from carclass.tools.benchmarks.plain_masking import VEHICLES, PlainMasker

SIDE = 224


class PlainPredictor:
    """Classification of photo files: PIL, DefaultPredictor with the zoo's settings, a crop, ResNet50 in float32.

    classify: uint8 (N,3,S,S) → logits (N,C). checkpoint: of PlainMasker; None: classify whole photos.
    """

    def __init__(self, classify: nn.Module, checkpoint: str | None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classify = classify.to(self.device)
        self.detect = None if checkpoint is None else PlainMasker(checkpoint).predict

    @torch.no_grad()
    def __call__(self, path: Path) -> int:
        """Return the most probable class of the largest vehicle, or of the whole photo without one."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if self.detect is not None:
            instances = self.detect(pixels[:, :, ::-1])["instances"].to("cpu")
            vehicles = instances[torch.isin(instances.pred_classes, torch.tensor(VEHICLES))]
            if len(vehicles):
                largest = int(vehicles.pred_masks.sum((1, 2)).argmax())
                x1, y1, x2, y2 = vehicles.pred_boxes.tensor[largest].round().int().tolist()
                pixels = pixels[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        photo = np.array(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return int(self.classify(torch.from_numpy(photo).permute(2, 0, 1)[None].to(self.device)).argmax())


def run_loop(predict: PlainPredictor, files: list[Path]) -> float:
    """Classify photos one by one and return the photos per second, after a warm-up photo."""
    predict(files[0])
    predictions = []
    started = time.perf_counter()
    for path in files:
        predictions.append(predict(path))
    return len(predictions) / (time.perf_counter() - started)
