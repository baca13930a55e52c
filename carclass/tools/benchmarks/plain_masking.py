"""Baseline of the masking benchmarks: Detectron2's DefaultPredictor, one photo at a time, without Ray."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from carclass.config.schema import DetectorSettings
from carclass.errors import UserError
from carclass.masking import detectron
from carclass.models import weights

VEHICLES = (2, 5, 7)
FILL = (124, 116, 104)
NUM_PHOTOS = 100
DETECTOR = "maskrcnn-r50-fpn-cars.safetensors"


class PlainMasker:
    """Masking of photo files with the model zoo's settings in float32.

    checkpoint: a file from save_checkpoint.
    """

    def __init__(self, checkpoint: str) -> None:
        from detectron2.engine import DefaultPredictor

        cfg = detectron.load_config("mask_rcnn_r50_fpn", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.5)
        cfg.MODEL.WEIGHTS = checkpoint
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        self.predict = DefaultPredictor(cfg)

    def __call__(self, path: Path, out: Path) -> None:
        """Mask all but the largest vehicle and write the photo to the folder `out`."""
        pixels = np.asarray(Image.open(path).convert("RGB"))
        instances = self.predict(pixels[:, :, ::-1])["instances"].to("cpu")
        vehicles = instances[torch.isin(instances.pred_classes, torch.tensor(VEHICLES))]
        if len(vehicles):
            mask = vehicles.pred_masks[int(vehicles.pred_masks.sum((1, 2)).argmax())].numpy()
            pixels = np.where(mask[:, :, None], pixels, np.array(FILL, np.uint8))
        Image.fromarray(pixels).save(out / path.name, quality=92)


def run_loop(masker: PlainMasker, files: list[Path], out: Path) -> float:
    """Mask photos one by one and return the photos per second, after a warm-up photo."""
    out.mkdir(exist_ok=True)
    masker(files[0], out)
    started = time.perf_counter()
    for path in files:
        masker(path, out)
    return len(files) / (time.perf_counter() - started)


def choose_photos(photos: Path | None) -> list[Path]:
    """Return NUM_PHOTOS of a folder, evenly spread over its names. Raise UserError if there are fewer."""
    if photos is None:
        raise UserError(f"--photos is missing; give a folder with at least {NUM_PHOTOS} .jpg files.")
    files = sorted(photos.glob("*.jpg"))
    if len(files) < NUM_PHOTOS:
        raise UserError(f"--photos: {photos} holds {len(files)} .jpg files; give a folder with at least {NUM_PHOTOS}.")
    return files[:: len(files) // NUM_PHOTOS][:NUM_PHOTOS]


def detector_file(folder: Path | None) -> Path:
    """Return the file of the detector's weights in a folder. Raise UserError if it is missing."""
    if folder is None or not (folder / DETECTOR).exists():
        raise UserError(f"--weights: give a folder with {DETECTOR}, a Mask R-CNN R50-FPN that detects vehicles.")
    return folder / DETECTOR


def save_checkpoint(weights_file: Path, out: Path) -> str:
    """Convert weights to a checkpoint of DefaultPredictor and return its path."""
    state, _ = weights.load_weights(str(weights_file), None, sample="", key="--weights")
    torch.save({"model": state}, out / "plain.pth")
    return str(out / "plain.pth")


def detector_settings(weights_file: Path, profile: str) -> DetectorSettings:
    """Return carclass' detector settings with the same weights."""
    return DetectorSettings.model_validate({"weights": str(weights_file), "profile": profile})
