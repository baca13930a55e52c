"""Collection of a dataset's report."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import dataset, publishing
from carclass.data.quarantine import PhotoError, Reason
from carclass.data.thumbnail import thumbnail
from carclass.ingestion import archive
from carclass.ingestion.report import DatasetReport, Rejected, Sample, render

NUM_SAMPLES, SAMPLES_PER_CLASS = 240, 6
"""Largest numbers of sample photos on the page."""
NUM_REJECTED, REJECTED_PER_REASON = 120, 30
"""Largest numbers of quarantined inputs on the page."""
SHOWN_REASONS = (Reason.TOO_SMALL, Reason.NO_LABEL, Reason.LABEL_CONFLICT, Reason.LEAKAGE)
"""Reasons of photos that can usually be shown."""
THUMBNAIL_SIDE = 240
SIDE_EDGES = (128, 256, 512, 768, 1024, 2048)
"""Upper edges, in pixels, of ranges of the longer side."""


def write_report(complete: dataset.Dataset, settings: IngestSettings, origin: str) -> None:
    """Write report.html of a dataset that is complete and not published yet. origin: of the labels, in words."""
    report = collect_report(complete, settings, origin)
    storage.write_bytes(storage.join(complete.uri, "report.html"), render(report).encode())


def collect_report(complete: dataset.Dataset, settings: IngestSettings, origin: str) -> DatasetReport:
    """Read the contents of the report: of every row its label, split and size, of a few their photos.

    origin: see write_report.
    """
    classes: dict[str, Counter[str]] = {name: Counter() for name in complete.classes}
    sides: Counter[int] = Counter()
    chosen: dict[str, list[tuple[str, int]]] = defaultdict(list)  # class → (part, position)
    per_class = min(SAMPLES_PER_CLASS, max(1, NUM_SAMPLES // len(classes)))
    shown = set(complete.classes[: NUM_SAMPLES // per_class])
    read = partial(dataset.read_part, columns=["label", "split", "width", "height"])
    for uri, rows in zip(complete.part_uris, storage.in_parallel(read, complete.part_uris), strict=True):
        longer = pc.max_element_wise(rows["width"], rows["height"]).to_numpy()
        sides.update(np.searchsorted(SIDE_EDGES, longer).tolist())
        labels = rows["label"].to_pylist()
        for position, (label, split) in enumerate(zip(labels, rows["split"].to_pylist(), strict=True)):
            classes[label][split] += 1
            if label in shown and len(chosen[label]) < per_class:
                chosen[label].append((uri, position))
    return DatasetReport(
        title=f"Dataset {complete.name}",
        facts=_facts(complete, settings, origin),
        classes={name: dict(counts) for name, counts in classes.items()},
        sides={_range_text(index): sides[index] for index in range(len(SIDE_EDGES) + 1) if sides[index]},
        samples=_read_samples(chosen),
        reasons=complete.manifest["reasons"],
        rejected=_read_rejected(complete, settings),
    )


HELD_OUT_OF = {"test": "of each class", "val": "of each class, without its test photos"}


def _facts(complete: dataset.Dataset, settings: IngestSettings, origin: str) -> list[tuple[str, str]]:
    sides = f"from {settings.min_side} px on the shorter side"
    sides += "" if settings.max_side is None else f", shrunk to {settings.max_side} px on the longer"
    return [
        ("Photos", settings.photos),
        ("Labels", origin),
        ("Size", sides),
        *((f"Held out for {split}", f"{share:g} {HELD_OUT_OF[split]}") for split, share in complete.held_out.items()),
        *([("Corrections", settings.corrections)] if settings.corrections else []),
        ("Seed", str(settings.seed)),
    ]


def _range_text(index: int) -> str:
    """Return a range of the longer side in words."""
    if index == len(SIDE_EDGES):
        return f"over {SIDE_EDGES[-1]} px"
    return f"{SIDE_EDGES[index - 1] + 1} to {SIDE_EDGES[index]} px" if index else f"up to {SIDE_EDGES[0]} px"


def _read_samples(chosen: dict[str, list[tuple[str, int]]]) -> dict[str, list[Sample]]:
    """Return the chosen photos of each class. chosen: (URI of a part, position in it)."""
    positions: dict[str, list[int]] = defaultdict(list)
    for uri, position in (place for places in chosen.values() for place in places):
        positions[uri].append(position)
    samples: dict[str, list[Sample]] = {name: [] for name in sorted(chosen)}
    for uri, in_part in positions.items():
        for row in dataset.take_rows(uri, sorted(in_part), ["key", "label", "image"]).to_pylist():
            samples[row["label"]].append(Sample(row["key"], thumbnail(row["image"], THUMBNAIL_SIDE)))
    return samples


def _read_rejected(complete: dataset.Dataset, settings: IngestSettings) -> list[Rejected]:
    """Return the first quarantined inputs of every reason, with thumbnails where the photos are files."""
    columns = ["key", "reason", "detail"]
    rows = publishing.read_written(complete.uri, "quarantine", columns, complete.quarantine).drop(["part"])
    listed = _first_of_each_reason(rows)
    shown = [row["key"] for row in listed if row["reason"] in SHOWN_REASONS]
    thumbnails = {} if archive.is_archive(settings.photos) else _make_thumbnails(settings, shown)
    return [Rejected(row["key"], row["reason"], row["detail"], thumbnails.get(row["key"])) for row in listed]


def _first_of_each_reason(rows: pa.Table) -> list[dict[str, Any]]:
    listed: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.sort_by("key").to_pylist():
        if len(listed[row["reason"]]) < REJECTED_PER_REASON:
            listed[row["reason"]].append(row)
    return [row for reason in sorted(listed) for row in listed[reason]][:NUM_REJECTED]


def _make_thumbnails(settings: IngestSettings, keys: Sequence[str]) -> dict[str, bytes]:
    """Return JPEG files by key, made by a task: photos that were never decoded may crash the process that does it."""
    if not keys:
        return {}
    task: Any = ray.remote(num_cpus=1, max_retries=0)(read_thumbnails)
    try:
        return dict(ray.get(task.remote(settings.photos, list(keys))))
    except ray.exceptions.RayError:
        return {}


def read_thumbnails(photos: str, keys: Sequence[str]) -> dict[str, bytes]:
    """Read photos below a URI; return small JPEG files by key, without those that cannot be decoded."""
    thumbnails = {}
    for key, content in zip(keys, storage.read_many([storage.join(photos, key) for key in keys]), strict=True):
        if isinstance(content, bytes):
            try:
                thumbnails[key] = thumbnail(content, THUMBNAIL_SIDE)
            except PhotoError:
                continue
    return thumbnails
