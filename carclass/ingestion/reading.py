"""Photos loaded from storage and converted to rows of a dataset, for ingestion and prediction."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import photo, publishing
from carclass.data.quarantine import PhotoError, Reason

Row = dict[str, Any]
GuardedRun = Callable[[str, Sequence[str], Callable[[list[int]], Iterable[Row]]], Iterator[Row | PhotoError]]


def read_groups(sources: pa.Table, settings: IngestSettings, run: GuardedRun) -> Iterator[list[Row]]:
    """Return a row of a dataset, or of its quarantine, for each row of INPUT or LOADED, with its fingerprint.

    Rows come in lists that end after publishing.PART_BYTES. Photos of INPUT are read below the URI `settings.photos`,
    the next ones while earlier ones are decoded: memory depends on the largest photo, not on their number. run:
    CrashGuard.run.
    """
    inputs = sources.select(["key", "fingerprint"]).to_pylist()
    keys = [row["key"] for row in inputs]
    convert = partial(_convert, settings=settings)
    results = run("read", keys, lambda indices: map(convert, load_photos(sources, settings.photos, indices)))
    return publishing.split_by_bytes(
        failed_row({**row, "data": None}, result) if isinstance(result, PhotoError) else result
        for row, result in zip(inputs, results, strict=True)
    )


def _convert(source: Row, settings: IngestSettings) -> Row:
    try:
        return to_row(source, settings)
    except PhotoError as error:
        return failed_row(source, error)


def load_photos(sources: pa.Table, photos: str, indices: Sequence[int]) -> Iterator[Row]:
    """Yield rows of LOADED for some rows of INPUT, whose photos are below the URI `photos`, or of LOADED itself."""
    if "data" in sources.schema.names:
        for i in indices:
            yield from sources.slice(i, 1).to_pylist()
        return
    rows = [sources.slice(i, 1).to_pylist()[0] for i in indices]
    uris, sizes = [storage.join(photos, row["key"]) for row in rows], [row["size"] or 0 for row in rows]
    for row, content in zip(rows, storage.read_many(uris, sizes), strict=True):
        failed = isinstance(content, OSError)
        yield row | {"data": None if failed else content, "error": str(content) if failed else None}


def read_image_ids(sources: pa.Table, photos: str) -> list[tuple[str, str | None]]:
    """Return (key, image_id) of each row of INPUT or LOADED, None for a photo that cannot be read."""
    rows = load_photos(sources, photos, range(len(sources)))
    return [(row["key"], None if row["data"] is None else storage.sha256(row["data"])) for row in rows]


def to_row(source: Row, settings: IngestSettings) -> Row:
    """Convert a row of LOADED to a row of a dataset and its fingerprint. Raise PhotoError if the photo is unusable.

    The row is in the split of its subset.
    """
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
        "split": source["subset"],
        "width": width,
        "height": height,
        "image": image,
        "fingerprint": source["fingerprint"],
    }


def failed_row(source: Row, error: PhotoError) -> Row:
    """Convert a row of LOADED whose photo is unusable to a row of dataset.QUARANTINE and its fingerprint."""
    image_id = None if source["data"] is None else storage.sha256(source["data"])
    return {"key": source["key"], "image_id": image_id, **error.columns(), "fingerprint": source["fingerprint"]}
