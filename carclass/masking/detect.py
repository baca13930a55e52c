"""Vehicle detection over batches of rows: decode tasks and detector actors."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from carclass.config.schema import MaskSettings
from carclass.data import dataset, photo
from carclass.data.crash_guard import CrashGuard
from carclass.data.photo import PhotoError
from carclass.masking.detector import Detection, Detector

FAILURE = pa.schema([("reason", pa.string()), ("detail", pa.string()), ("attempts", pa.int32())])
SIZE = pa.schema([("source_width", pa.int32()), ("source_height", pa.int32())])
DECODED = pa.schema([*dataset.ROW, *SIZE, *FAILURE, ("pixels", pa.large_binary())])
FOUND = pa.schema([field for field in dataset.DETECTION if field.name not in ("mask", *SIZE.names)])
DETECTED = pa.schema([*dataset.ROW, *SIZE, *FAILURE, *FOUND, ("mask_pixels", pa.large_binary())])
MEASURES = ("score", "num_vehicles", "several_vehicles", "touches_border", "area_fraction", "stability")


def decode_batch(batch: pa.Table, attempts: CrashGuard) -> pa.Table:
    """Places of rows → rows of DECODED."""
    return decode_rows(_fetch_rows(batch), attempts)


def decode_rows(batch: pa.Table, attempts: CrashGuard) -> pa.Table:
    """Rows of a dataset → rows of DECODED: with their pixels, or with what is wrong with them."""
    images = batch["image"].to_pylist()
    decoded = attempts.run("decode", batch["key"].to_pylist(), lambda chosen: [_decode(images[i]) for i in chosen])
    return _extend_rows(
        batch, [_failure_columns(item) if isinstance(item, PhotoError) else _raw(item) for item in decoded], DECODED
    )


def _fetch_rows(batch: pa.Table) -> pa.Table:
    """The source's rows at these places."""
    parts = dict.fromkeys(batch["part"].to_pylist())
    positions = {part: batch.filter(pc.field("part") == part)["position"].to_pylist() for part in parts}
    return pa.concat_tables(dataset.take_rows(part, found, dataset.ROW.names) for part, found in positions.items())


def _decode(image: bytes) -> np.ndarray | PhotoError:
    try:
        return photo.decode(image, min_side=1)
    except PhotoError as error:
        return error


def _raw(pixels: np.ndarray) -> dict[str, Any]:
    return {"source_height": pixels.shape[0], "source_width": pixels.shape[1], "pixels": pixels.tobytes()}


def _failure_columns(error: PhotoError) -> dict[str, Any]:
    return {"reason": str(error.reason), "detail": error.detail, "attempts": error.attempts}


def _extend_rows(batch: pa.Table, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The columns of schema: from rows those that their dicts speak of, from the batch the others."""
    named = set().union(*rows)
    more = pa.Table.from_pylist(
        rows, pa.schema([f for f in schema if f.name in named or f.name not in batch.schema.names])
    )
    return pa.table([(more if name in more.schema.names else batch)[name] for name in schema.names], schema=schema)


class DetectPhotos:
    """A detector process: rows of DECODED → rows of DETECTED."""

    def __init__(self, settings: MaskSettings, attempts: CrashGuard, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        self.settings, self.attempts = settings, attempts
        self.detect = Detector(settings.detector, settings.choice, "cuda" if use_gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(["key", "source_height", "source_width", *FAILURE.names, "pixels"]).to_pylist()
        sound = [row for row in rows if row["reason"] is None]
        photos = [
            np.frombuffer(row["pixels"], np.uint8).reshape(row["source_height"], row["source_width"], 3)
            for row in sound
        ]  # fmt: skip
        keys, size = [row["key"] for row in sound], self.settings.batch_size
        found = self.attempts.run("detect", keys, lambda chosen: self.detect([photos[i] for i in chosen], size))
        for row, result in zip(sound, found, strict=True):
            row |= _failure_columns(result) if isinstance(result, PhotoError) else self._columns(result)
        return _extend_rows(batch.drop(["pixels"]), [{**row, "pixels": None} for row in rows], DETECTED)

    def _columns(self, found: Detection | None) -> dict[str, Any]:
        if found is None:
            return {"outcome": "no_vehicle", "num_vehicles": 0}
        columns = {name: getattr(found, name) for name in MEASURES}
        mask = None if found.mask is None else found.mask.tobytes()
        vehicle_class = self.settings.detector.classes[found.category]
        return {
            "outcome": "vehicle",
            "vehicle_class": vehicle_class,
            "box": found.box.tolist(),
            **columns,
            "mask_pixels": mask,
        }
