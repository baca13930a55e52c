"""Benchmark of masking: the job's pool of detectors against plain code around Detectron2's DefaultPredictor.

The job, in both profiles, is compared with a plain loop in one process, and with Ray Data's map_batches around
DefaultPredictor with as many actors. Every side reads, decodes, detects, masks, encodes and writes each photo. The
throughput of a pool is computed from the modification times of its results after the first WARM_UP photos, so that
process start and loading of weights count on no side.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from carclass.cluster import connection
from carclass.config.schema import CutoutSettings, IngestSettings, MaskSettings
from carclass.data import dataset
from carclass.ingestion.ingest import ingest_photos
from carclass.masking import quality
from carclass.masking.mask import mask_dataset
from carclass.masking.rle import decode_mask, mask_iou
from carclass.progress import print_line
from carclass.tools.benchmarks.plain_masking import (
    PlainMasker,
    choose_photos,
    detector_file,
    detector_settings,
    run_loop,
    save_checkpoint,
)

WARM_UP = 20
NUM_NAIVE = 60
"""Photos of the naive pool, which needs many seconds for each."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on GPUs, or on CPUs without any, and return the figures.

    photos: a folder; a file instances.json beside it may hold the true masks. The plain loop runs half before and half
    after carclass, so that a drift of the machine's speed affects both.
    """
    files = choose_photos(photos)
    weights_file = detector_file(weights)
    connection.connect()
    count = int(ray.cluster_resources().get("GPU", 0) or ray.cluster_resources()["CPU"])
    checkpoint = save_checkpoint(weights_file, folder)
    masker = PlainMasker(checkpoint)
    before = run_loop(masker, files[::2], folder / "plain")
    print_line(f"plain loop: {before:.3f} photos/s")
    _ingest(files, folder)
    rates, masked = {}, {}
    for profile in ("exact", "fast"):
        masked[profile] = _run_job(folder, weights_file, profile)
        parts = [(Path(uri), pq.read_metadata(uri).num_rows) for uri in masked[profile].part_uris]
        rates[profile] = _rate(parts)
        print_line(f"carclass, {profile}: {rates[profile]:.3f} photos/s")
    naive = _run_naive_pool(files[:: len(files) // NUM_NAIVE or 1][:NUM_NAIVE], checkpoint, folder / "naive", count)
    print_line(f"map_batches around DefaultPredictor: {naive:.3f} photos/s")
    after = run_loop(masker, files[1::2], folder / "plain")
    plain = 2 / (1 / before + 1 / after)
    figures = {"photos": len(files), "actors": count, "loop_photos_per_s": plain, "naive_pool_photos_per_s": naive}
    for profile, rate in rates.items():
        figures |= {f"{profile}_photos_per_s": rate, f"{profile}_vs_loop": rate / plain}
        figures |= {f"{profile}_vs_naive_pool": rate / naive}
    return figures | _compare_quality(masked, files[0].parent.parent / "instances.json")


def _ingest(files: list[Path], folder: Path) -> None:
    """Publish the photos as dataset v1."""
    rows = [f"{path.name},{'even' if i % 2 else 'odd'},test" for i, path in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["img_name,class,subset", *rows]))
    (folder / "photos").mkdir()
    for path in files:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    ingest_photos(str(folder), IngestSettings(photos=str(folder / "photos"), labels=str(folder / "labels.csv")))


def _run_job(folder: Path, weights_file: Path, profile: str) -> dataset.Dataset:
    """Mask the dataset without cropping, as the other sides do."""
    return mask_dataset(
        str(folder),
        MaskSettings(
            dataset=profile,
            detector=detector_settings(weights_file, profile),
            cutout=CutoutSettings(mode="mask"),
            part_rows=4,
        ),
    )


class NaiveActor:
    """A DefaultPredictor in an actor of map_batches."""

    def __init__(self, checkpoint: str, out: str) -> None:
        self.mask, self.out = PlainMasker(checkpoint), Path(out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        for path in batch["path"].to_pylist():
            self.mask(Path(path), self.out)
        return batch


def _run_naive_pool(files: list[Path], checkpoint: str, out: Path, count: int) -> float:
    """Return the photos per second of `count` naive actors."""
    out.mkdir()
    gpus = bool(ray.cluster_resources().get("GPU", 0))
    masked = ray.data.from_items([{"path": str(path)} for path in files], override_num_blocks=len(files)).map_batches(
        NaiveActor,
        fn_constructor_args=(checkpoint, str(out)),
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    masked.materialize()
    return _rate([(path, 1) for path in out.iterdir()])


def _rate(files: list[tuple[Path, int]]) -> float:
    """Return the photos per second after WARM_UP photos from (file, its photos) and modification times."""
    times = sorted((path.stat().st_mtime, count) for path, count in files)
    done = np.cumsum([count for _, count in times])
    first = int(np.searchsorted(done, WARM_UP))
    return float((done[-1] - done[first]) / (times[-1][0] - times[first][0]))


def _compare_quality(masked: dict[str, dataset.Dataset], truth: Path) -> dict[str, float]:
    """Return the share of photos with the same vehicle in both profiles, and mean IoUs if true masks are known."""
    exact, fast = (
        {row["key"]: row for row in masked[profile].read(["key", "mask", "source_height", "source_width"]).to_pylist()}
        for profile in ("exact", "fast")
    )
    figures = {"same_vehicle": float(np.mean([_is_same_vehicle(exact[key], fast[key]) for key in exact]))}
    if truth.exists():
        for profile, dataset_of in masked.items():
            found = quality.ious(dataset_of, str(truth))
            figures[f"{profile}_iou"] = float(np.mean(list(found.values())))
    return figures


def _is_same_vehicle(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return True if two masks of a photo have an IoU of at least 0.5, or both are empty."""
    if row["mask"] is None or other["mask"] is None:
        return row["mask"] is other["mask"]
    masks = [decode_mask(each["mask"], each["source_height"], each["source_width"]) for each in (row, other)]
    return mask_iou(*masks) >= 0.5
