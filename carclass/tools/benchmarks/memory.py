"""Benchmark of a masking job's peak memory over datasets of growing size, which should not depend on the size."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa

from carclass import storage
from carclass.data import dataset, photo, publishing, quarantine
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.errors import UserError
from carclass.progress import print_line
from carclass.sample.generate import write_sample

COUNTS = (1_000, 4_000, 16_000)
PART_ROWS = 250
POLL_S = 0.5


def run(photos: Path | None, weights: Path | None, folder: Path, jobs: Path) -> dict[str, float]:
    """Return the peak memory in MB of driver, workers and Ray's processes per size, and the ratio of the peaks.

    photos: a folder, by default the sample; its photos are repeated under new ids. jobs: folder of the jobs. The
    detector is the sample's, at a low resolution, so that the benchmark takes minutes.
    """
    if weights is not None:
        raise UserError("--weights has no effect on the benchmark `memory`, which runs the sample's detector. Omit it.")
    if photos is None:
        write_sample(folder / "sample", train_per_class=20, test_per_class=5)
        photos = folder / "sample" / "photos"
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("the benchmark `memory` reads /proc. Run it on Linux.")
    files = sorted(photos.glob("*.jpg"))[:500]
    images = [image for path in files if (image := _reencode(path.read_bytes())) is not None]
    figures: dict[str, float] = {}
    totals = []
    for count in COUNTS:
        root = folder / str(count)
        _publish_repeated(images, count, root)
        peaks = _run_masking(root, jobs)
        totals.append(peaks["together"])
        print_line(f"{count:,} photos: " + ", ".join(f"{name} {value:,.0f} MB" for name, value in peaks.items()))
        figures |= {f"{name}_mb_{count}": value for name, value in peaks.items()}
    return figures | {"largest_vs_smallest": max(totals) / min(totals)}


def _reencode(data: bytes) -> tuple[bytes, int, int] | None:
    """Return (JPEG file, width, height) as after ingest, None for an unreadable photo."""
    try:
        return photo.reencode(data, min_side=16, max_pixels=10**8, max_side=800, quality=92)
    except quarantine.PhotoError:
        return None


def _publish_repeated(images: list[tuple[bytes, int, int]], count: int, root: Path) -> None:
    """Publish a dataset of `count` photos, repeating the images under new ids."""
    uri = dataset.dataset_uri(str(root), "v1")
    keys = [f"{i:06d}.jpg" for i in range(count)]
    for start in range(0, count, PART_ROWS):
        rows = [_row(key, *images[(start + i) % len(images)]) for i, key in enumerate(keys[start : start + PART_ROWS])]
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), {})
    with Inventory() as inventory:
        inventory.add_inputs(map(Listed, keys))
        draft = Draft(uri, {}, inventory)
        draft.publish(draft.complete(["a", "b"], {"kind": "photos"}))


def _row(key: str, image: bytes, width: int, height: int) -> dict[str, str | int | bytes]:
    """Return a row of the dataset."""
    return {
        "image_id": storage.sha256(key.encode()),
        "key": key,
        "label": "a",
        "split": "train",
        "width": width,
        "height": height,
        "image": image,
    }


def _run_masking(root: Path, jobs: Path) -> dict[str, float]:
    """Run the masking job and return its peak memory in MB by kind of process."""
    mask = {"detector": {"model": "sample", "weights": "sample", "short_side": 96, "num_proposals": 10}}
    (root / "mask.yml").write_text(json.dumps({"root": str(root), "mask": mask}))
    return measure_peaks([sys.executable, str(jobs / "mask.py"), "--config", str(root / "mask.yml")], root / "log.txt")


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
