"""Benchmark of masking in one process without Ray: the detector against a plain DefaultPredictor loop.

On a GPU, also the detector's throughput and GPU utilisation.
"""

import time
from pathlib import Path

import numpy as np
import torch

from carclass.config.schema import CutoutSettings
from carclass.data import photo
from carclass.masking.cutout import cut
from carclass.masking.detector import Detector
from carclass.masking.paste import paste_mask
from carclass.progress import print_line
from carclass.tools.benchmarks.plain_masking import (
    PlainMasker,
    choose_photos,
    detector_file,
    detector_settings,
    run_loop,
    save_checkpoint,
)

BATCH_SIZE = 16
"""Photos per forward pass."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on the GPU, or on all CPUs without one, and return the figures.

    Both sides read, decode, detect, mask, encode and write. On a GPU, a second figure is of the detector alone, because
    other processes do the rest there.
    """
    files = choose_photos(photos)
    weights_file = detector_file(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = run_loop(PlainMasker(save_checkpoint(weights_file, folder)), files, folder / "plain")
    print_line(f"plain loop: {plain:.3f} photos/s")
    figures: dict[str, float] = {"photos": len(files), "loop_photos_per_s": plain}
    for profile in ("exact", "fast"):
        detect = Detector(detector_settings(weights_file, profile), device=device)
        rate = _measure_pipeline(detect, files, folder / profile)
        print_line(f"carclass, {profile}, one process: {rate:.3f} photos/s")
        figures |= {f"{profile}_photos_per_s": rate, f"{profile}_vs_loop": rate / plain}
        if device == "cuda":
            pixels = [photo.decode(path.read_bytes(), min_side=1) for path in files]
            measured = measure_detector(detect, pixels, BATCH_SIZE)
            figures |= {f"{profile}_{name}": value for name, value in measured.items()}
    return figures


def _measure_pipeline(detect: Detector, files: list[Path], out: Path) -> float:
    """Return the photos per second from file to masked file, after a warm-up batch."""
    out.mkdir()
    cutout = CutoutSettings(mode="mask")
    started = time.perf_counter()
    for start in range(-BATCH_SIZE, len(files), BATCH_SIZE):
        batch = files[max(start, 0) : max(start, 0) + BATCH_SIZE]
        pixels = [photo.decode(path.read_bytes(), min_side=1) for path in batch]
        for path, image, detection in zip(batch, pixels, detect(pixels, BATCH_SIZE), strict=True):
            if detection is not None and detection.grid is not None:
                mask = paste_mask(detection.grid, detection.box, *image.shape[:2])
                image = cut(image, detection.box, mask, cutout)
            (out / path.name).write_bytes(photo.encode(image))
        if start < 0:
            started = time.perf_counter()
    return len(files) / (time.perf_counter() - started)


def measure_detector(detect: Detector, pixels: list[np.ndarray], batch_size: int) -> dict[str, float]:
    """Return the photos per second on decoded photos and, on a GPU, the share of time in which it computes."""
    detect(pixels, batch_size)  # warm-up: kernels are selected once per canvas size
    started = time.perf_counter()
    detect(pixels, batch_size)
    seconds = time.perf_counter() - started
    figures = {"photos_per_s_per_device": len(pixels) / seconds}
    if detect.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            detect(pixels, batch_size)
            torch.cuda.synchronize()
        busy = np.sum([event.self_device_time_total for event in profile.key_averages()]) / 1e6
        figures["gpu_share"] = float(busy / seconds)
    return figures
