"""Masking through the pool of detectors into a published dataset, against what one would write with DefaultPredictor.

Ours, in both profiles, against a plain loop in one process and against Ray Data's map_batches around DefaultPredictor
with as many actors. Every side reads, decodes, detects, paints over the background, encodes and writes each photo.
The pools' speed is taken from the times at which their results appeared, after the first WARM_UP photos: starting
processes and loading weights counts on no side.
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
from carclass.progress import say
from carclass.tools.benchmarks.plain_masking import (
    PlainMasker,
    choose_photos,
    detector_file,
    loop,
    save_checkpoint,
    settings,
)

WARM_UP = 20
NUM_NAIVE = 60
"""Photos of the naive pool: it needs many seconds for each."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on CPUs or GPUs, whichever the machine has.

    photos: a folder; a file instances.json beside it holds the true masks. The plain loop runs half before and half
    after ours, so that a drift of the machine's speed falls on both.
    """
    files = choose_photos(photos)
    weights_file = detector_file(weights)
    connection.connect()
    count = int(ray.cluster_resources().get("GPU", 0) or ray.cluster_resources()["CPU"])
    checkpoint = save_checkpoint(weights_file, folder)
    masker = PlainMasker(checkpoint)
    before = loop(masker, files[::2], folder / "plain")
    say(f"plain loop: {before:.3f} photos/s")
    _ingest(files, folder)
    rates, masked = {}, {}
    for profile in ("exact", "fast"):
        masked[profile] = _ours(folder, weights_file, profile)
        parts = [(Path(uri), pq.read_metadata(uri).num_rows) for uri in masked[profile].part_uris]
        rates[profile] = _rate(parts)
        say(f"carclass, {profile}: {rates[profile]:.3f} photos/s")
    naive = _naive_pool(files[:: len(files) // NUM_NAIVE or 1][:NUM_NAIVE], checkpoint, folder / "naive", count)
    say(f"map_batches around DefaultPredictor: {naive:.3f} photos/s")
    after = loop(masker, files[1::2], folder / "plain")
    plain = 2 / (1 / before + 1 / after)
    figures = {"photos": len(files), "actors": count, "loop_photos_per_s": plain, "naive_pool_photos_per_s": naive}
    for profile, rate in rates.items():
        figures |= {f"{profile}_photos_per_s": rate, f"{profile}_vs_loop": rate / plain}
        figures |= {f"{profile}_vs_naive_pool": rate / naive}
    return figures | _qualities(masked, files[0].parent.parent / "instances.json")


def _ingest(files: list[Path], folder: Path) -> None:
    rows = [f"{path.name},{'even' if i % 2 else 'odd'},test" for i, path in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["img_name,class,subset", *rows]))
    (folder / "photos").mkdir()
    for path in files:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    ingest_photos(str(folder), IngestSettings(photos=str(folder / "photos"), labels=str(folder / "labels.csv")))


def _ours(folder: Path, weights_file: Path, profile: str) -> dataset.Dataset:
    """The photos masked; as painted over, not cropped, as on the other sides."""
    return mask_dataset(
        str(folder),
        MaskSettings(
            dataset=profile,
            detector=settings(weights_file, profile),
            cutout=CutoutSettings(mode="mask"),
            part_rows=4,
        ),
    )


class NaiveActor:
    """What everyone puts into map_batches."""

    def __init__(self, checkpoint: str, out: str) -> None:
        self.mask, self.out = PlainMasker(checkpoint), Path(out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        for path in batch["path"].to_pylist():
            self.mask(Path(path), self.out)
        return batch


def _naive_pool(files: list[Path], checkpoint: str, out: Path, count: int) -> float:
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
    """Photos per second after WARM_UP photos, from (file, photos in it) and the times the files appeared."""
    times = sorted((path.stat().st_mtime, count) for path, count in files)
    done = np.cumsum([count for _, count in times])
    first = int(np.searchsorted(done, WARM_UP))
    return float((done[-1] - done[first]) / (times[-1][0] - times[first][0]))


def _qualities(masked: dict[str, dataset.Dataset], truth: Path) -> dict[str, float]:
    """Share of photos on which both profiles keep the same vehicle; where the truth is known, both mean IoUs."""
    exact, fast = (
        {row["key"]: row for row in masked[profile].read(["key", "mask", "source_height", "source_width"]).to_pylist()}
        for profile in ("exact", "fast")
    )
    figures = {"same_vehicle": float(np.mean([_same(exact[key], fast[key]) for key in exact]))}
    if truth.exists():
        for profile, dataset_of in masked.items():
            found = quality.ious(dataset_of, str(truth))
            figures[f"{profile}_iou"] = float(np.mean(list(found.values())))
    return figures


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two masks of a photo show the same vehicle: IoU of a half or more, or no vehicle in both."""
    if one["mask"] is None or other["mask"] is None:
        return one["mask"] is other["mask"]
    masks = [decode_mask(row["mask"], row["source_height"], row["source_width"]) for row in (one, other)]
    return mask_iou(*masks) >= 0.5
