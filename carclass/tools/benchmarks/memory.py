"""Peak memory of a masking job over datasets of growing size: it should depend on the cluster, not on the photos."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa

from carclass import storage
from carclass.data import dataset, photo, publishing
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.progress import say
from carclass.sample.generate import write_sample

COUNTS = (1_000, 4_000, 16_000)
PART_ROWS = 250
EVERY_S = 0.5


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Peak memory in MB of driver, workers and Ray's own processes, and how far the sums' peaks differ.

    photos: a folder of photos, repeated under new ids until there are enough; the drawn sample without it. Always the
    sample's own detector, as it is about memory, at a low resolution, so that it takes minutes.
    """
    if weights is not None:
        raise UserError("--weights has no effect on the benchmark `memory`, which runs the sample's detector.")
    if photos is None:
        write_sample(folder / "sample", train_per_class=20, test_per_class=5)
        photos = folder / "sample" / "photos"
    sound = [item for path in sorted(photos.glob("*.jpg"))[:500] if (item := _normalise(path.read_bytes())) is not None]
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("the benchmark `memory` reads /proc and needs Linux.")
    figures: dict[str, float] = {}
    totals = []
    for count in COUNTS:
        root = folder / str(count)
        _repeat(sound, count, root)
        peaks = _mask(root)
        totals.append(peaks["together"])
        say(f"{count:,} photos: " + ", ".join(f"{name} {value:,.0f} MB" for name, value in peaks.items()))
        figures |= {f"{name}_mb_{count}": value for name, value in peaks.items()}
    return figures | {"largest_vs_smallest": max(totals) / min(totals)}


def _normalise(data: bytes) -> tuple[bytes, int, int] | None:
    try:
        return photo.reencode(data, min_side=16, max_pixels=10**8, max_side=800, quality=92)
    except photo.PhotoError:
        return None


def _repeat(images: list[tuple[bytes, int, int]], count: int, root: Path) -> None:
    """Publishes a dataset of count photos: the same ones again and again, under new ids."""
    uri = dataset.dataset_uri(str(root), "v1")
    keys = [f"{i:06d}.jpg" for i in range(count)]
    for start in range(0, count, PART_ROWS):
        rows = [_row(key, *images[(start + i) % len(images)]) for i, key in enumerate(keys[start : start + PART_ROWS])]
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), {})
    with Inventory() as inventory:
        inventory.add_inputs(keys)
        publishing.publish_manifest(
            publishing.complete_dataset(uri, inventory, settings={}, classes=["a", "b"], facts={"kind": "photos"})
        )


def _row(key: str, image: bytes, width: int, height: int) -> dict[str, str | int | bytes]:
    sizes = {"width": width, "height": height}
    return {
        "image_id": storage.sha256(key.encode()),
        "key": key,
        "label": "a",
        "split": "train",
        **sizes,
        "image": image,
    }


def _mask(root: Path) -> dict[str, float]:
    """Peak memory of the job."""
    mask = {"detector": {"model": "sample", "weights": "sample", "short_side": 96, "num_proposals": 10}}
    (root / "mask.yml").write_text(json.dumps({"root": str(root), "mask": mask}))
    job = Path(__file__).parents[2] / "jobs" / "mask.py"
    return watch([sys.executable, str(job), "--config", str(root / "mask.yml")], root / "log.txt")


def watch(command: list[str], log_file: Path) -> dict[str, float]:
    """Runs a job in processes of its own; the most that each kind of them held, and all together, in MB."""
    with log_file.open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # noqa: S603
        peaks: dict[str, float] = defaultdict(float)
        while job.poll() is None:
            for name, value in _memory(job.pid).items():
                peaks[name] = max(peaks[name], value)
            time.sleep(EVERY_S)
    assert job.returncode == 0, log_file.read_text()[-2000:]
    return dict(peaks)


def _memory(session: int) -> dict[str, float]:
    """MB of the processes of a session, memory that several share counted in parts (PSS).

    Without the pages of programs and libraries: a session's part of them changes with whoever else runs the same.
    """
    found: dict[str, float] = defaultdict(float)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            if os.getsid(pid) != session:
                continue
            title = (folder / "cmdline").read_text()
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        size = sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
        name = "driver" if pid == session else "workers" if title.startswith("ray::") else "ray"
        found[name] += size
        found["together"] += size
    return found
