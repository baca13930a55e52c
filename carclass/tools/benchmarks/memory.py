"""Benchmark of the peak memory of ingest and masking over growing numbers of phone photos.

It should depend neither on their number nor on the size of their files.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from carclass.data import photo
from carclass.data.formats import json_text
from carclass.errors import UserError
from carclass.progress import print_line
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS

COUNTS = (500, 1_000, 2_000)
NUM_DRAWN = 8
SIZE = (4032, 3024)
"""Width and height of a phone's photos of 12 megapixels."""
NOISE, QUALITY = 5, 92
"""Standard deviation of the noise in grey levels, and JPEG quality, for files of 3 to 4 MB."""
JOBS = ("ingest", "mask")
POLL_S = 0.5


def run(photos: Path | None, weights: Path | None, folder: Path, jobs: Path) -> dict[str, float]:
    """Return the peak memory in MB of driver, workers and Ray's processes per job and count, and ratios of the peaks.

    photos: a folder, by default drawn phone photos; they are repeated under new names. jobs: folder of the jobs. The
    detector is the sample's, at a low resolution, so that the benchmark takes minutes.
    """
    if weights is not None:
        raise UserError("--weights has no effect on the benchmark `memory`, which runs the sample's detector. Omit it.")
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("the benchmark `memory` reads /proc. Run it on Linux.")
    files = _draw_photos(folder) if photos is None else sorted(photos.absolute().glob("*.jpg"))
    print_line(f"files of {min(map(_megabytes, files)):.1f} to {max(map(_megabytes, files)):.1f} MB")
    figures: dict[str, float] = {}
    for count in COUNTS:
        root = folder / str(count)
        _link(files, count, root / "photos")
        for job in JOBS:
            peaks = _run_job(job, root, jobs)
            listed = ", ".join(f"{name} {value:,.0f} MB" for name, value in peaks.items())
            print_line(f"{job}, {count:,} photos: {listed}")
            figures |= {f"{job}_{name}_mb_{count}": value for name, value in peaks.items()}
    for job in JOBS:
        totals = [figures[f"{job}_together_mb_{count}"] for count in COUNTS]
        figures[f"{job}_largest_vs_smallest"] = max(totals) / min(totals)
    return figures


def _draw_photos(folder: Path) -> list[Path]:
    """Draw cars with the size and the noise of a phone's photos."""
    noise = np.random.default_rng(0).normal(scale=NOISE, size=(SIZE[1], SIZE[0], 1)).astype(np.float32)
    files = [folder / f"{i}.jpg" for i in range(NUM_DRAWN)]
    for i, (file, model, scene) in enumerate(zip(files, MODELS, SCENES, strict=False)):
        pixels, _ = draw_photo((i,), model, scene)
        large = np.asarray(Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC))
        file.write_bytes(photo.encode((large + noise).clip(0, 255).astype(np.uint8), quality=QUALITY))
    return files


def _megabytes(file: Path) -> float:
    return file.stat().st_size / 1e6


def _link(files: Sequence[Path], count: int, folder: Path) -> None:
    """Link files into the folders of two classes under `count` names. A file is always in the same class."""
    for i in range(count):
        index = i % len(files)
        link = folder / "ab"[index % 2] / f"{i:06d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[index])


def _run_job(job: str, root: Path, jobs: Path) -> dict[str, float]:
    """Run a job and return its peak memory in MB by kind of process."""
    ingest = {"photos": str(root / "photos")}
    mask = {"detector": {"model": "sample", "weights": "sample", "short_side": 96, "num_proposals": 10}}
    config = root / f"{job}.yml"
    config.write_text(json_text({"root": str(root), job: {"ingest": ingest, "mask": mask}[job]}))
    return measure_peaks([sys.executable, str(jobs / f"{job}.py"), "--config", str(config)], root / f"{job}.log")


def measure_peaks(command: list[str], log_file: Path) -> dict[str, float]:
    """Run a job and return its peak memory in MB: of each kind of process, and together."""
    with log_file.open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603
        peaks: dict[str, float] = defaultdict(float)
        while job.poll() is None:
            for name, value in _measure_memory(job.pid).items():
                peaks[name] = max(peaks[name], value)
            time.sleep(POLL_S)
    assert job.returncode == 0, log_file.read_text()[-2000:]
    return dict(peaks)


def peak_mb(process: str = "self") -> float:
    """Return the peak resident memory of a process in MB; getrusage would count that of its parent before exec too."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def _measure_memory(session: int) -> dict[str, float]:
    """Return the proportional set size (PSS) of a session's processes in MB, by kind.

    Only anonymous and shared memory: the share of file-backed pages depends on other processes of the machine.
    """
    sizes: dict[str, float] = defaultdict(float)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            if os.getsid(pid) != session:
                continue
            title = (folder / "cmdline").read_text()
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # exited meanwhile
            continue
        size = sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
        name = "driver" if pid == session else "workers" if title.startswith("ray::") else "ray"
        sizes[name] += size
        sizes["together"] += size
    return sizes
