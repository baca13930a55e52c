"""Photos from storage as rows of a dataset, as ingest and prediction read them."""

from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import photo
from carclass.data.photo import PhotoError, Reason
from carclass.ingestion.archive import LOADED


def is_held_out(image_id: str, seed: int, fraction: float) -> bool:
    """Whether a train photo belongs to val.

    Decided by seed and content alone: copies stay together, and adding photos moves none. Every class is split
    in the same proportion, up to chance.
    """
    return int(storage.sha256(f"{seed}:{image_id}".encode())[:12], 16) / 16**12 < fraction


def to_row(source: dict[str, Any], settings: IngestSettings) -> dict[str, Any]:
    """One loaded photo (a row of LOADED) as a dataset row; PhotoError when it isn't one."""
    data = source["data"]
    if data is None:
        raise PhotoError(Reason.UNREADABLE, source["error"])
    image, width, height = photo.reencode(
        data, min_side=settings.min_side, max_pixels=settings.max_pixels,
        max_side=settings.max_side, quality=settings.quality,
    )  # fmt: skip
    image_id = storage.sha256(data)
    held = source["subset"] == "train" and is_held_out(image_id, settings.seed, settings.val_fraction)
    return {
        "image_id": image_id,
        "key": source["key"],
        "label": source["label"],
        "split": "val" if held else source["subset"],
        "width": width,
        "height": height,
        "image": image,
    }


def load_photos(batch: pa.Table, photos: str) -> pa.Table:
    """Adds the bytes of each photo, or the error that stands for them."""
    contents = list(storage.read_many(storage.join(photos, key) for key in batch["key"].to_pylist()))
    data = [None if isinstance(content, OSError) else content for content in contents]
    errors = [str(content) if isinstance(content, OSError) else None for content in contents]
    columns = [*batch.columns, pa.array(data, pa.large_binary()), pa.array(errors, pa.string())]
    return pa.Table.from_arrays(columns, schema=LOADED)
