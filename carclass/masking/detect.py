"""Vehicle detection over batches of rows: decode tasks and detector actors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from carclass.cluster.device import choose_device
from carclass.config.schema import DetectorSettings, MaskSettings
from carclass.data import dataset, photo
from carclass.data.crash_guard import CrashGuard
from carclass.data.quarantine import PhotoError
from carclass.masking.canvas import canvas
from carclass.masking.detection import detection_columns
from carclass.masking.writer import DETECTED, FAILURE

SOURCE_SIZE = pa.schema([("source_width", pa.int32()), ("source_height", pa.int32())])
DECODED = pa.schema([*dataset.ROW, *SOURCE_SIZE, *FAILURE, ("pixels", pa.large_binary())])
CPU_BATCH = 4
"""Photos per batch of a detector on a CPU: one or two seconds of work."""
BATCH_BYTES = 256 * 2**20
"""Largest size of a detector's batch of decoded photos, which is in memory several times."""
GPU_BATCHES = 8
"""Forward passes per batch of a detector on a GPU: enough photos to group them by shape."""
WINDOW_BATCHES = 8
"""Batches of a GPU's detector that are read at once, to be ordered by shape."""
WINDOW_BYTES = 256 * 2**20
"""Largest size of the encoded photos read at once, at half a byte a pixel."""


def detector_batch_size(settings: MaskSettings, max_side: int | None, *, use_gpu: bool) -> int:
    """Return the number of photos that a detector gets at a time. max_side: of the photos, None without a limit."""
    if not use_gpu or max_side is None:
        return CPU_BATCH
    return max(CPU_BATCH, min(GPU_BATCHES * settings.batch_size, BATCH_BYTES // (3 * max_side**2)))


def reading_window(batch_size: int, max_side: int | None, *, use_gpu: bool) -> int:
    """Return the number of rows to read at once for batches of a detector. max_side: see detector_batch_size."""
    if not use_gpu or max_side is None:
        return batch_size
    return batch_size * max(1, min(WINDOW_BATCHES, WINDOW_BYTES * 2 // max_side**2 // batch_size))


def fetch_and_decode(
    positions: pa.Table, crash_guard: CrashGuard, settings: DetectorSettings, batch_size: int
) -> Iterator[pa.Table]:
    """Read the rows at positions (streaming.ROW_POSITION) and yield them decoded, in batches: rows of DECODED.

    Rows for several batches are ordered by the canvas of their photos, so that forward passes are full.
    """
    rows = _fetch(positions)
    if len(rows) > batch_size:
        sizes = zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)
        canvases = [canvas(height, width, settings) for height, width in sizes]
        rows = rows.take(sorted(range(len(rows)), key=lambda row: canvases[row]))
    for start in range(0, len(rows), batch_size):
        yield decode_rows(rows.slice(start, batch_size), crash_guard)


def _fetch(positions: pa.Table) -> pa.Table:
    parts = dict.fromkeys(positions["part"].to_pylist())
    by_part = {part: positions.filter(pc.field("part") == part)["position"].to_pylist() for part in parts}
    tables = [dataset.take_rows(part, in_part, dataset.ROW.names) for part, in_part in by_part.items()]
    return pa.concat_tables(tables)


def decode_rows(batch: pa.Table, crash_guard: CrashGuard) -> pa.Table:
    """Decode rows of dataset.ROW: rows of DECODED, with pixels or with the columns of FAILURE."""
    images = batch["image"].to_pylist()
    decoded = crash_guard.run("decode", batch["key"].to_pylist(), lambda indices: (_decode(images[i]) for i in indices))
    columns = [item.columns() if isinstance(item, PhotoError) else _pixel_columns(item) for item in decoded]
    return _add_columns(batch, columns, DECODED)


def _decode(image: bytes) -> np.ndarray | PhotoError:
    try:
        return photo.decode_stored(image)
    except PhotoError as error:
        return error


def _pixel_columns(pixels: np.ndarray) -> dict[str, Any]:
    return {"source_height": pixels.shape[0], "source_width": pixels.shape[1], "pixels": pixels.tobytes()}


def _add_columns(batch: pa.Table, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return a table of the schema, with the columns that any of the rows names and all others from the batch."""
    named = set().union(*rows)
    added = pa.Table.from_pylist(
        rows, pa.schema([f for f in schema if f.name in named or f.name not in batch.schema.names])
    )
    return pa.table([(added if name in added.schema.names else batch)[name] for name in schema.names], schema=schema)


class DetectPhotos:
    """A detector actor: rows of DECODED → rows of DETECTED."""

    def __init__(self, settings: MaskSettings, crash_guard: CrashGuard, *, use_gpu: bool) -> None:
        from carclass.masking.detector import Detector  # imported late: predictions without masks need no Detectron2

        if not use_gpu:
            torch.set_num_threads(1)
        self.settings, self.crash_guard = settings, crash_guard
        self.detector = Detector(settings.detector, settings.choice, str(choose_device(use_gpu)))

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(["key", *SOURCE_SIZE.names, *FAILURE.names]).to_pylist()
        valid = [row for row in rows if row["reason"] is None]
        photos = [
            np.frombuffer(pixels.as_buffer(), np.uint8).reshape(row["source_height"], row["source_width"], 3)
            for row, pixels in zip(rows, batch["pixels"], strict=True)
            if row["reason"] is None
        ]  # fmt: skip
        keys, batch_size = [row["key"] for row in valid], self.settings.batch_size
        classes = self.settings.detector.classes
        detections = self.crash_guard.run(
            "detect", keys, lambda indices: self.detector([photos[i] for i in indices], batch_size)
        )
        for row, result in zip(valid, detections, strict=True):
            row |= result.columns() if isinstance(result, PhotoError) else detection_columns(result, classes)
        return _add_columns(batch, rows, DETECTED)
