"""Photos of a split that datasets have in common, also of datasets that were masked from the same source."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from carclass.data.dataset import Dataset


def origin_digest(source: Dataset) -> str:
    """Return the digest of the unmasked dataset that a dataset was made from; its own if it is not masked."""
    return source.source_digest if source.manifest["kind"] == "masked" else source.digest


def have_same_photos(sources: Sequence[Dataset], split: str) -> bool:
    """Return True if datasets have the same photos in a split, by the hash of their content.

    Datasets of one source count as the same, though masking may have quarantined photos of one.
    """
    if len({origin_digest(source) for source in sources}) < 2:
        return True
    return len({frozenset(image_ids(source, split).to_pylist()) for source in sources}) == 1


def image_ids(source: Dataset, split: str) -> pa.Array:
    """Return the hashes of the photos of a split."""
    rows = source.read(["image_id", "split"])
    return rows.filter(pc.equal(rows["split"], split))["image_id"].combine_chunks()
