"""Benchmark of a driver's costs per part, over metadata of up to 1.5 million parts with a row each, and no files."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from carclass.cluster import connection
from carclass.data import dataset, publishing, streaming
from carclass.data.dataset import Dataset
from carclass.data.draft import Draft
from carclass.data.formats import KINDS
from carclass.data.inventory import Inventory
from carclass.data.publishing import WrittenPart
from carclass.errors import UserError
from carclass.masking.overview import PARTS_PER_TASK, Overview
from carclass.progress import print_line
from carclass.tools.benchmarks.memory import peak_mb

COUNTS = (15_000, 150_000, 1_500_000)
"""A part per 64 of 100 million photos are 1.5 million."""
NUM_SHEET = 40


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Return the seconds and the peak memory in MB of each step and count, and the seconds per million parts.

    Every step runs in a process of its own, whose imports count for its memory.
    """
    if photos is not None or weights is not None:
        raise UserError("--photos and --weights have no effect on the benchmark `parts`, which has none. Omit them.")
    figures: dict[str, float] = {}
    for count in COUNTS:
        for name in STEPS:
            command = [sys.executable, "-m", __name__, name, str(folder), str(count)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)  # noqa: S603
            seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
            print_line(f"{name}, {count:,} parts: {seconds:.1f} s, {megabytes:,.0f} MB")
            figures |= {f"{name}_s_{count}": seconds, f"{name}_mb_{count}": megabytes}
            if count == COUNTS[-1]:
                figures[f"{name}_s_per_million"] = seconds / count * 1e6
    return figures


def _path(number: int) -> str:
    return f"parts/{number:024x}.parquet"


def _source(folder: str, count: int) -> Dataset:
    """Return a dataset of `count` parts that do not exist."""
    manifest = {
        "format": KINDS["manifest"].format, "settings": {}, "listing": "", "inputs": count, "rows": count,
        "quarantined": 0, "reasons": {}, "splits": {"train": count, "val": 0, "test": 0}, "kind": "masked",
        "classes": ["a"], "parts": {_path(i): f"{i:064x}" for i in range(count)}, "quarantine": {},
    }  # fmt: skip
    return Dataset(dataset.dataset_uri(folder, str(count)), manifest)


def _positions(folder: str, count: int) -> Iterator[None]:
    """Start the stream of positions to the detectors, in a Ray cluster whose other processes do not count."""
    source = _source(folder, count)
    connection.connect()
    streaming.stream_positions([(source.uri, [0])], 64)  # Ray Data's imports
    yield
    numbers = (part * streaming.PART_STRIDE for part in range(count))
    streaming.stream_positions(streaming.positions_by_part(source, numbers), 64)


def _record(folder: str, count: int) -> Iterator[None]:
    """Record files as writing tasks return them, a batch of one each, and check that nothing is lost."""
    with Inventory() as inventory:
        draft = Draft(dataset.dataset_uri(folder, f"draft-{count}"), {}, inventory)
        inventory.add_numbered_inputs((i, f"{i:012d}", "", "a", "train") for i in range(count))
        yield
        for i in range(count):
            rows = {"key": [f"{i:012d}"], "image_id": [f"{i:064x}"], "label": ["a"], "split": ["train"]}
            records = publishing.to_records(WrittenPart(_path(i), pa.table(rows), f"{i:064x}"))
            draft.record(publishing.from_records(records))
        inventory.commit_parts(removed=[])
        assert not inventory.missing_keys() + inventory.unexpected_keys()
        assert len(inventory.contents()) == count


def _publish(folder: str, count: int) -> Iterator[None]:
    """Write the manifest."""
    source = _source(folder, count)
    yield
    publishing.publish_manifest(source)


def _load(folder: str, count: int) -> Iterator[None]:
    """Read the manifest that `publish` has written, its digest and its parts, as every later job does."""
    yield
    published = dataset.load_dataset(folder, str(count))
    assert len(published.digest) == 64
    assert len(published.parts) == count


def _report(_: str, count: int) -> Iterator[None]:
    """Merge what tasks return of PARTS_PER_TASK parts each."""
    rows = {"image_id": "0", "outcome": "vehicle", "vehicle_class": "car", "score": 0.5, "stability": 0.5}
    rows |= {"several_vehicles": False, "touches_border": False, "area_fraction": 0.5}
    table = pa.Table.from_pylist([{**rows, "key": f"{i:012d}"} for i in range(PARTS_PER_TASK)], dataset.MASKED_ROW)
    one, overview = Overview(NUM_SHEET, {}), Overview(NUM_SHEET, {})
    one.add(table)
    yield
    for _start in range(0, count, PARTS_PER_TASK):
        overview.merge(one)
    assert overview.num_rows >= count


STEPS = {"positions": _positions, "record": _record, "publish": _publish, "load": _load, "report": _report}


def _measure(step: str, folder: str, count: str) -> None:
    """Print the seconds from the step's `yield` on, and the peak memory in MB."""
    running = STEPS[step](folder, int(count))
    next(running)
    started = time.perf_counter()
    for _ in running:
        pass
    print(json.dumps([time.perf_counter() - started, peak_mb()], allow_nan=False))


if __name__ == "__main__":
    _measure(*sys.argv[1:])
