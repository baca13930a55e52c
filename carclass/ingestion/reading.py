"""Photos loaded from storage and converted to rows of a dataset, for ingestion and prediction."""

from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import photo
from carclass.data.quarantine import PhotoError, Reason
from carclass.ingestion.archive import LOADED
from carclass.ingestion.split import split_of


def load_photos(batch: pa.Table, photos: str) -> pa.Table:
    """Read the photos of rows of INPUT below the URI `photos`, and return rows of LOADED."""
    contents = list(storage.read_many(storage.join(photos, key) for key in batch["key"].to_pylist()))
    data = [None if isinstance(content, OSError) else content for content in contents]
    errors = [str(content) if isinstance(content, OSError) else None for content in contents]
    columns = [*batch.columns, pa.array(data, pa.large_binary()), pa.array(errors, pa.string())]
    return pa.Table.from_arrays(columns, schema=LOADED)


def to_row(source: dict[str, Any], settings: IngestSettings) -> dict[str, Any]:
    """Convert a row of LOADED to a row of a dataset and its fingerprint. Raise PhotoError if the photo is unusable."""
    data = source["data"]
    if data is None:
        raise PhotoError(Reason.UNREADABLE, source["error"])
    image, width, height = photo.reencode(
        data, min_side=settings.min_side, max_pixels=settings.max_pixels,
        max_side=settings.max_side, quality=settings.quality, keep_metadata=settings.keep_metadata,
    )  # fmt: skip
    image_id = storage.sha256(data)
    return {
        "image_id": image_id,
        "key": source["key"],
        "label": source["label"],
        "split": split_of(source["subset"], image_id, seed=settings.seed, val_fraction=settings.val_fraction),
        "width": width,
        "height": height,
        "image": image,
        "fingerprint": source["fingerprint"],
    }


def failed_row(source: dict[str, Any], error: PhotoError) -> dict[str, Any]:
    """Convert a row of LOADED whose photo is unusable to a row of dataset.QUARANTINE and its fingerprint."""
    image_id = None if source["data"] is None else storage.sha256(source["data"])
    return {"key": source["key"], "image_id": image_id, **error.columns(), "fingerprint": source["fingerprint"]}
