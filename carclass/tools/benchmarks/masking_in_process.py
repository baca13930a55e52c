"""The compute of masking alone, in one process and without Ray: ours against a plain DefaultPredictor loop.

On a GPU it also tells how much of the time the GPU computes, and how many photos a second go through.
"""

import time
from pathlib import Path

import numpy as np
import torch

from carclass.config.schema import CutoutSettings
from carclass.data import photo
from carclass.masking.cutout import cut
from carclass.masking.detector import Detector
from carclass.progress import say
from carclass.tools.benchmarks.plain_masking import (
    PlainMasker,
    choose_photos,
    detector_file,
    loop,
    save_checkpoint,
    settings,
)

BATCH_SIZE = 16
"""Photos of a forward pass on a GPU."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on the GPU, if there is one, else on all CPUs.

    Both sides read, decode, detect, paint over the background, encode and write; on a GPU a second figure leaves out
    all but the detector, as other processes do the rest there.
    """
    files = choose_photos(photos)
    weights_file = detector_file(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = loop(PlainMasker(save_checkpoint(weights_file, folder)), files, folder / "plain")
    say(f"plain loop: {plain:.3f} photos/s")
    figures: dict[str, float] = {"photos": len(files), "loop_photos_per_s": plain}
    for profile in ("exact", "fast"):
        detect = Detector(settings(weights_file, profile), device=device)
        rate = _whole(detect, files, folder / profile)
        say(f"carclass, {profile}, one process: {rate:.3f} photos/s")
        figures |= {f"{profile}_photos_per_s": rate, f"{profile}_vs_loop": rate / plain}
        if device == "cuda":
            figures |= {f"{profile}_{name}": value for name, value in _detector_alone(detect, files).items()}
    return figures


def _whole(detect: Detector, files: list[Path], out: Path) -> float:
    """Photos per second from file to masked file, after a first batch that isn't counted."""
    out.mkdir()
    cutout = CutoutSettings(mode="mask")
    started = time.perf_counter()
    for start in range(-BATCH_SIZE, len(files), BATCH_SIZE):
        batch = files[max(start, 0) : max(start, 0) + BATCH_SIZE]
        pixels = [photo.decode(path.read_bytes(), min_side=1) for path in batch]
        for path, image, found in zip(batch, pixels, detect(pixels, BATCH_SIZE), strict=True):
            result = image if found is None else cut(image, found.box, found.mask, cutout)
            (out / path.name).write_bytes(photo.encode(result))
        if start < 0:
            started = time.perf_counter()
    return len(files) / (time.perf_counter() - started)


def _detector_alone(detect: Detector, files: list[Path]) -> dict[str, float]:
    """Photos per second of a detector that is fed decoded photos, and the share of that time the GPU computes."""
    pixels = [photo.decode(path.read_bytes(), min_side=1) for path in files]
    detect(pixels, BATCH_SIZE)  # kernels are chosen once per canvas
    torch.cuda.synchronize()
    started = time.perf_counter()
    detect(pixels, BATCH_SIZE)
    seconds = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        detect(pixels, BATCH_SIZE)
        torch.cuda.synchronize()
    busy = np.sum([event.self_device_time_total for event in profile.key_averages()]) / 1e6
    return {"photos_per_s_per_gpu": len(pixels) / seconds, "gpu_share": float(busy / seconds)}
