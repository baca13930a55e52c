"""Benchmark of a driver's steps over datasets of growing numbers of rows: seconds and peak memory of each."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carclass import storage
from carclass.cluster import connection
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing, streaming
from carclass.data.dataset import Dataset
from carclass.data.draft import Draft
from carclass.data.formats import KINDS, json_text
from carclass.data.inventory import Inventory, Listed
from carclass.errors import UserError
from carclass.ingestion import leakage
from carclass.ingestion.labelling import label_photos
from carclass.ingestion.split import hold_out
from carclass.masking import collect, overview
from carclass.progress import print_line
from carclass.tools.benchmarks.memory import peak_mb
from carclass.training import preflight
from carclass.training.sample_order import SampleOrder

COUNTS = (262_144, 524_288, 1_000_000)
PROJECTED = 100_000_000
PART_ROWS, NUM_PARTS = 4096, 32
"""Rows per part, and parts that are written; further ones are links to them, so their rows repeat."""
NUM_CLASSES, IMAGE_BYTES = 200, 256
SHARES = {"test": 0.2, "val": 0.1}


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Return the seconds and the peak memory in MB of each step and count, and the memory projected to 100 million.

    Every step runs in a process of its own, whose imports count too; images are small, because none is read.
    """
    if photos is not None or weights is not None:
        raise UserError("--photos and --weights have no effect on the benchmark `rows`, which makes rows. Omit them.")
    contents = write_parts(folder)
    figures: dict[str, float] = {}
    for count in COUNTS:
        link_dataset(folder, count, contents)
        for name in STEPS:
            command = [sys.executable, "-m", __name__, name, str(folder), str(count)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
            seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
            print_line(f"{name}, {count:,} rows: {seconds:.1f} s, {megabytes:,.0f} MB")
            figures |= {f"{name}_s_{count}": seconds, f"{name}_mb_{count}": megabytes}
    for name in STEPS:
        first, last = (figures[f"{name}_mb_{count}"] for count in (COUNTS[0], COUNTS[-1]))
        per_row = (last - first) / (COUNTS[-1] - COUNTS[0])
        figures[f"{name}_mb_of_100_million"] = last + per_row * (PROJECTED - COUNTS[-1])
    return figures


def write_parts(folder: Path) -> dict[str, str]:
    """Write parts of a masked dataset by the masking job's function, and return their paths with their hashes."""
    rng = np.random.default_rng(0)
    contents = {}
    for part in range(NUM_PARTS):
        rows = [_row(part * PART_ROWS + i, rng) for i in range(PART_ROWS)]
        written = publishing.write_part(str(folder), "parts", pa.Table.from_pylist(rows, dataset.MASKED_ROW), {})
        contents[written.path] = written.content
    return contents


def _row(number: int, rng: np.random.Generator) -> dict[str, Any]:
    score, is_vehicle = float(rng.random()), number % 50 > 0
    detection = {"outcome": "vehicle", "vehicle_class": "car", "score": score, "num_vehicles": 1}
    detection |= {"several_vehicles": False, "touches_border": False, "area_fraction": score, "stability": score}
    return {
        **(detection if is_vehicle else {"outcome": "no_vehicle"}), "source_width": 700, "source_height": 480,
        "image_id": _image_id(_key(number)), "key": _key(number), "label": f"class_{number % NUM_CLASSES:03d}",
        "split": "train", "width": 700, "height": 480, "image": rng.bytes(IMAGE_BYTES),
    }  # fmt: skip


def _key(number: int) -> str:
    return f"train/class_{number % NUM_CLASSES:03d}/{number:09d}.jpg"


def _image_id(key: str) -> str:
    return storage.sha256(key.encode())


def link_dataset(folder: Path, count: int, contents: dict[str, str]) -> None:
    """Make a dataset of `count` rows, rounded up to whole parts, in <folder>/datasets/<count>."""
    uri, written = folder / "datasets" / str(count), list(contents.items())
    (uri / "parts").mkdir(parents=True)
    parts = {}
    for number in range(-(-count // PART_ROWS)):
        path, content = written[number % NUM_PARTS]
        parts[f"parts/{number:024x}.parquet"] = content
        os.link(folder / path, uri / f"parts/{number:024x}.parquet")
    rows = len(parts) * PART_ROWS
    manifest = {
        "format": KINDS["manifest"].format, "settings": {}, "listing": "", "inputs": rows, "rows": rows,
        "quarantined": 0, "reasons": {}, "splits": {"train": rows, "val": 0, "test": 0}, "kind": "masked",
        "classes": [f"class_{number:03d}" for number in range(NUM_CLASSES)], "parts": parts, "quarantine": {},
    }  # fmt: skip
    storage.write_bytes(str(uri / "manifest.json"), json_text(manifest).encode())


def _ingest(source: Dataset) -> None:
    """List, label, record, hold out and complete, as ingestion does around its tasks; keys do not repeat."""
    with Inventory() as inventory:
        keys = (_key(number) for number in range(source.manifest["rows"]))
        inventory.add_inputs(Listed(key, IMAGE_BYTES, key) for key in keys)
        label_photos(IngestSettings(photos="photos"), inventory)
        draft = Draft(source.uri, {}, inventory, run_tasks=_drop)
        for path, inputs in zip(source.contents, inventory.pending(PART_ROWS), strict=True):
            image_ids = pa.array(map(_image_id, inputs["key"].to_pylist()), pa.string())
            rows = inputs.select(["key", "label", "fingerprint"]).append_column("split", inputs["subset"])
            inventory.add_part(path, rows.append_column("image_id", image_ids), "")
        draft.sync()
        assert not list(leakage.find_leaks(inventory))
        hold_out(draft, SHARES, 0)
        draft.complete(source.classes, {})


def _drop(_: object, corrections: Iterable[object]) -> Iterator[Any]:
    """Read the corrections that a job's tasks would apply."""
    for _correction in corrections:
        pass
    return iter(())


def _mask_inputs(source: Dataset) -> None:
    with Inventory() as inventory:
        rows = streaming.select_rows(source, None)
        inventory.add_numbered_inputs((row.number, row.key, row.image_id, row.label, row.split) for row in rows)
        assert inventory.count_pending() == source.manifest["rows"]


def _mask_positions(source: Dataset) -> None:
    """Start the stream of positions to the detectors, in a Ray cluster whose other processes do not count."""
    connection.connect()
    numbers = (
        part * streaming.PART_STRIDE + position for part in range(len(source.parts)) for position in range(PART_ROWS)
    )
    streaming.stream_positions(streaming.positions_by_part(source, numbers), 32)


def _mask_report(source: Dataset) -> None:
    overview.read_overview(source, collect.NUM_SHEET, {})


def _train_classes(source: Dataset) -> None:
    preflight.check_classes(source)


def _train_order(source: Dataset) -> None:
    """Draw an epoch's order, as each training worker does."""
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(2**63, size=source.manifest["rows"]).astype(np.uint64), rng.integers(NUM_CLASSES)
    SampleOrder(ids, np.full(len(ids), labels), seed=0).order(1)


STEPS = {
    "ingest": _ingest,
    "mask_inputs": _mask_inputs,
    "mask_positions": _mask_positions,
    "mask_report": _mask_report,
    "train_classes": _train_classes,
    "train_order": _train_order,
}


def _measure(step: str, folder: str, count: str) -> None:
    """Print the seconds and the peak memory in MB of a step."""
    source = dataset.load_dataset(folder, count)
    started = time.perf_counter()
    STEPS[step](source)
    print(json.dumps([time.perf_counter() - started, peak_mb()], allow_nan=False))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
