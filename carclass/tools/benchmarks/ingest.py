"""Benchmark of ingest: the job on all CPUs against a plain PIL loop with the same work on one core."""

import hashlib
import io
import time
from pathlib import Path

import ray
from PIL import Image, ImageOps

from carclass.cluster import connection
from carclass.config.schema import IngestSettings
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.progress import print_line
from carclass.sample.generate import write_sample

MAX_SIDE, QUALITY = 224, 92
"""Small enough that both sides resize and re-encode every photo."""
WARM_UP = 64
"""Photos ingested before the measurement, in parts of four, so that every worker has imported its modules."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure and return the figures. photos: a folder, by default the sample; folder: for temporary files.

    The plain loop runs half before and half after carclass, so that a drift of the machine's speed affects both. Raise
    UserError for weights, which have no effect.
    """
    if weights is not None:
        raise UserError("--weights has no effect on the benchmark `ingest`, which runs no network. Omit it.")
    if photos is None:
        write_sample(folder / "sample")
        photos = folder / "sample" / "photos"
    files = sorted(path for path in photos.rglob("*.jpg") if path.stat().st_size)
    if len(files) < 4 * WARM_UP:
        raise UserError(f"--photos {photos} holds {len(files)} .jpg files; give a folder with at least {4 * WARM_UP}.")
    connection.connect()
    _run_job(photos, files[:: len(files) // WARM_UP], folder / "warm-up", part_rows=4)
    first = _run_plain(files[::2], folder / "plain-1")
    ours = _run_job(photos, files, folder / "ours")
    second = _run_plain(files[1::2], folder / "plain-2")
    num_cpus = int(ray.cluster_resources()["CPU"])
    plain = len(files) / (first + second)
    return {
        "photos": len(files),
        "cpus": num_cpus,
        "plain_photos_per_s": plain,
        "ours_photos_per_s": len(files) / ours,
        "ours_photos_per_s_per_cpu": len(files) / ours / num_cpus,
        "ours_per_cpu_vs_plain": len(files) / ours / num_cpus / plain,
    }


def _run_job(photos: Path, files: list[Path], root: Path, part_rows: int = 256) -> float:
    """Return the seconds from the list of photos to the published dataset."""
    root.mkdir()
    rows = [f"{path.relative_to(photos)},{'even' if i % 2 else 'odd'},test" for i, path in enumerate(files)]
    labels = root / "labels.csv"
    labels.write_text("\n".join(["img_name,class,subset", *rows]))
    settings = IngestSettings(
        photos=str(photos), labels=str(labels), max_side=MAX_SIDE, quality=QUALITY, part_rows=part_rows
    )
    started = time.perf_counter()
    published = ingest_photos(str(root), settings)
    seconds = time.perf_counter() - started
    print_line(f"carclass: {published.manifest['rows']:,} photos in {seconds:.2f} s")
    return seconds


def _run_plain(files: list[Path], out: Path) -> float:
    """Return the seconds of a loop that reads, hashes, decodes, rotates upright, resizes, encodes and writes photos."""
    out.mkdir()
    started = time.perf_counter()
    for path in files:
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        except OSError:
            continue
        scale = min(1.0, MAX_SIDE / max(image.size))
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image.save(out / f"{name}.jpg", quality=QUALITY)
    seconds = time.perf_counter() - started
    print_line(f"plain PIL loop, one core: {len(files):,} photos in {seconds:.2f} s")
    return seconds
