"""Prediction as one would write it in an afternoon: one photo at a time through both networks. No Ray here."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from carclass.tools.benchmarks.plain_masking import VEHICLES, PlainMasker

SIDE = 224


class PlainPredictor:
    """Photo file → its class: PIL, DefaultPredictor at the zoo's settings, a crop, ResNet50 in float32.

    classify: uint8 (N,3,S,S) → logits (N,C). checkpoint: as for PlainMasker; None: photos are classified as they are.
    """

    def __init__(self, classify: nn.Module, checkpoint: str | None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classify = classify.to(self.device)
        self.detect = None if checkpoint is None else PlainMasker(checkpoint).predict

    @torch.no_grad()
    def __call__(self, path: Path) -> int:
        """The likeliest class of the largest vehicle, or of the whole photo where there is none."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if self.detect is not None:
            found = self.detect(pixels[:, :, ::-1])["instances"].to("cpu")
            found = found[torch.isin(found.pred_classes, torch.tensor(VEHICLES))]
            if len(found):
                largest = int(found.pred_masks.sum((1, 2)).argmax())
                x1, y1, x2, y2 = found.pred_boxes.tensor[largest].round().int().tolist()
                pixels = pixels[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        photo = np.array(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return int(self.classify(torch.from_numpy(photo).permute(2, 0, 1)[None].to(self.device)).argmax())


def loop(predict: PlainPredictor, files: list[Path]) -> float:
    """Photos per second of a plain loop in this process, whose first photo is not counted."""
    predict(files[0])
    predictions = []
    started = time.perf_counter()
    for path in files:
        predictions.append(predict(path))
    return len(predictions) / (time.perf_counter() - started)
