"""Benchmark of one GPU in less than ten minutes: training against timm and a plain script, and masking.

Training: whole epochs of the unfrozen stage, with validation and checkpoints, at several batch sizes; each side's first
epoch is a warm-up. `resident` are steps on a batch that is already on the GPU. Masking: the detector on photos of real
aspect ratios, its busy share and its agreement with float32, against DefaultPredictor. What there is no time for is
left out and named. Without a GPU, a dry run on a few photos: its figures mean nothing.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from carclass.config.schema import DetectorSettings, ModelSettings, TrainSettings, UnfrozenSettings
from carclass.data import photo
from carclass.masking.detection import Detection
from carclass.masking.detector import Detector
from carclass.masking.paste import paste_mask
from carclass.masking.rle import mask_iou
from carclass.progress import print_line
from carclass.runs.run import Run
from carclass.tools.benchmarks import labelled, plain_training
from carclass.tools.benchmarks.masking_in_process import measure_detector
from carclass.tools.benchmarks.plain_masking import PlainMasker, detector_file, detector_settings, save_checkpoint
from carclass.tools.benchmarks.timing import ThroughputClock
from carclass.tools.benchmarks.timm_training import TimmTraining
from carclass.tools.benchmarks.train_in_process import TimedLoader, unfrozen_learner
from carclass.training import loop
from carclass.training.checkpoint_writer import CheckpointWriter
from carclass.training.dataloader import PhotoLoader, PhotoSamples

log = logging.getLogger(__name__)
TIME_LIMIT = 540.0
"""Seconds after which nothing more is begun."""


class Size(NamedTuple):
    """Extent of the benchmark."""

    batch_sizes: tuple[int, ...]
    compiled: tuple[int, ...]  # batch sizes with torch.compile too, which takes a minute
    splits: dict[str, int]
    epochs: int
    image_size: int
    masked: int
    plainly_masked: int
    detector_batches: tuple[int, ...]


SIZES = {
    "cuda": Size((64, 32, 128, 256), (64, 128), {"train": 4638, "val": 1204}, 3, 224, 320, 60, (16, 8, 32)),
    "cpu": Size((8,), (), {"train": 48, "val": 8}, 1, 64, 4, 2, (2,)),
}
Figures = dict[str, float]


def run(photos: Path | None, weights: Path | None, folder: Path) -> Figures:
    """Measure all that fits into TIME_LIMIT and return the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, started, figures, left_out = SIZES[device.type], time.monotonic(), Figures(), list[str]()
    for name, measure in _measurements(photos, weights, folder, size, device).items():
        if time.monotonic() - started > TIME_LIMIT:
            left_out.append(name)
            continue
        for key, value in measure().items():
            figures[f"{name}_{key}"] = value
            print_line(f"{name.replace('_', ' ')}, {key.replace('_', ' ')}: {value:.4g}")
    if left_out:
        log.warning("gpu: no time was left for %s", ", ".join(left_out))
    return figures | {"seconds": time.monotonic() - started}


def _measurements(
    photos: Path | None, weights: Path | None, folder: Path, size: Size, device: torch.device
) -> dict[str, Callable[[], Figures]]:
    """Return the measurements by name, the most important ones first."""
    splits, backbone = labelled.choose_photos(photos, size.splits), labelled.backbone_file(weights)
    training = _Training(splits, backbone, folder, size, device)
    masking = _Masking([each.path for each in splits["train"][: size.masked]], detector_file(weights), folder, size)
    measurements: dict[str, Callable[[], Figures]] = {}
    for batch_size in size.batch_sizes:
        measurements[f"ours_{batch_size}"] = partial(training.ours, batch_size)
        measurements[f"timm_{batch_size}"] = partial(training.timm, batch_size, compiled=False)
        if batch_size == size.batch_sizes[0]:
            for profile in ("fast", "exact"):
                measurements[profile] = partial(masking.ours, profile, str(device))
            measurements["default_predictor"] = masking.plain
    for batch_size in size.compiled:
        measurements[f"timm_compiled_{batch_size}"] = partial(training.timm, batch_size, compiled=True)
    for batch_size in size.batch_sizes:
        measurements[f"plain_{batch_size}"] = partial(training.plain, batch_size)
    return measurements


class _Training:
    """Epochs of the unfrozen stage, by each side."""

    def __init__(self, splits: labelled.Splits, backbone: Path, folder: Path, size: Size, device: torch.device) -> None:
        self.splits, self.backbone, self.folder, self.size, self.device = splits, backbone, folder, size, device
        self.num_classes = labelled.num_classes(splits)
        self.linked = labelled.link_class_folders(splits, folder / "photos")
        self.blocks = {split: labelled.decode(splits[split], size.image_size) for split in splits}

    def ours(self, batch_size: int) -> Figures:
        """Return photos per second in epochs and on a resident batch."""
        settings = self._settings(batch_size)
        assert settings.unfrozen is not None
        learner, state = unfrozen_learner(settings, self.num_classes, self.device), loop.TrainState()
        train, val = (PhotoSamples(self.blocks[split], seed=settings.seed) for split in ("train", "val"))
        loader = PhotoLoader(train, val, settings.augmentation, settings.unfrozen, self.device)
        writer = CheckpointWriter(Run(str(self.folder), settings), "unfrozen", learner, state)
        callbacks = loop.Callbacks(writer.save, writer.finish_epoch)

        def epoch_seconds() -> float:
            started = time.perf_counter()
            loop.train_epoch(learner, loader, state, callbacks)
            callbacks.on_epoch_end(state, *loop.finish_epoch(learner, loader, state))
            return time.perf_counter() - started

        figures = self._rate(epoch_seconds)
        writer.wait()
        resident = TimedLoader(loader, True, ThroughputClock(self.device))
        resident.num_steps = min(loader.num_steps, 60)
        loop.train_epoch(learner, resident, loop.TrainState(), loop.Callbacks())
        return figures | {"resident_photos_per_s": resident.clock.rate()}

    def timm(self, batch_size: int, *, compiled: bool) -> Figures:
        """Return timm's photos per second in epochs."""
        side = TimmTraining(self.linked, self._settings(batch_size), self.num_classes, compiled=compiled)
        return self._rate(side.epoch_seconds)

    def plain(self, batch_size: int) -> Figures:
        """Return the plain script's photos per second in steps, without validation and checkpoints."""
        settings = self._settings(batch_size)
        values = settings.model_dump()
        rate = plain_training.measure_unfrozen(self.linked / "train", self.backbone, values, self.num_classes)
        return {"photos_per_s": rate}

    def _settings(self, batch_size: int) -> TrainSettings:
        return TrainSettings(
            name=f"batch-{batch_size}",
            parent=str(self.backbone),
            model=ModelSettings(stride_in_1x1=True, image_size=self.size.image_size),
            frozen=None,
            unfrozen=UnfrozenSettings(batch_size=batch_size, epochs=1 + self.size.epochs, warmup_epochs=0),
        )

    def _rate(self, epoch_seconds: Callable[[], float]) -> Figures:
        """Return the train photos per second of epochs after the first one, and the GPU's peak memory."""
        epoch_seconds()
        seconds = sum(epoch_seconds() for _ in range(self.size.epochs)) / self.size.epochs
        figures = {"photos_per_s": len(self.splits["train"]) / seconds, "epoch_s": seconds}
        if self.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return figures


class _Masking:
    """Detection of photos of real aspect ratios, by each side."""

    def __init__(self, files: list[Path], weights: Path, folder: Path, size: Size) -> None:
        self.files, self.weights, self.folder, self.size = files, weights, folder, size
        self.pixels = [photo.decode(path.read_bytes(), min_side=1) for path in files]

    def ours(self, profile: str, device: str) -> Figures:
        """Return photos per second at each batch size, the busy share, and the agreement with float32."""
        settings = detector_settings(self.weights, profile)
        detect, figures = Detector(settings, device=device), Figures()
        for batch_size in self.size.detector_batches:
            measured = measure_detector(detect, self.pixels, batch_size)
            figures |= {f"{key}_batch_{batch_size}": value for key, value in measured.items()}
        detections = detect(self.pixels, self.size.detector_batches[0])
        return figures | self._agreement(detections, settings, device)

    def plain(self) -> Figures:
        """Return DefaultPredictor's photos per second, from decoded photos, as the detector's."""
        masker = PlainMasker(save_checkpoint(self.weights, self.folder))
        pixels = self.pixels[: self.size.plainly_masked]
        masker.predict(pixels[0][:, :, ::-1])
        started = time.perf_counter()
        for each in pixels:
            masker.predict(each[:, :, ::-1])["instances"].to("cpu")
        return {"photos_per_s": len(pixels) / (time.perf_counter() - started)}

    def _agreement(self, found: list[Detection | None], settings: DetectorSettings, device: str) -> Figures:
        """Return the share of photos with the vehicle of float32, and the mean IoU of their masks."""
        reference = Detector(settings.model_copy(update={"precision": "fp32"}), device=device)
        expected = reference(self.pixels, self.size.detector_batches[0])
        pairs = list(zip(found, expected, self.pixels, strict=True))
        ious = [_iou(one, other, pixels) for one, other, pixels in pairs if one is not None and other is not None]
        same = sum(iou >= 0.5 for iou in ious) + sum(one is other for one, other, _ in pairs)
        return {"same_vehicle_as_fp32": same / len(pairs), "iou_with_fp32": float(np.mean(ious)) if ious else 1.0}


def _iou(one: Detection, other: Detection, pixels: np.ndarray) -> float:
    assert one.grid is not None
    assert other.grid is not None
    shape: Any = pixels.shape[:2]
    return mask_iou(paste_mask(one.grid, one.box, *shape), paste_mask(other.grid, other.box, *shape))
