"""Mask quality against true masks."""

import logging
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carclass.config.schema import MaskSettings
from carclass.data import dataset
from carclass.masking.rle import decode_mask, decode_rle, mask_iou, resize_mask
from carclass.masking.truth import KEY, load_truth
from carclass.sample import source as sample

log = logging.getLogger(__name__)


def resolve_truth(root: str, settings: MaskSettings) -> str | None:
    """Return the URI of the COCO file with the true masks; None if `mask.truth` is not set."""
    return sample.ensure_sample(root).truth if settings.truth == "sample" else settings.truth


def check_truth(root: str, settings: MaskSettings, source: dataset.Dataset) -> None:
    """Log the number of photos with a true mask, before they are masked. Raise UserError as truth.load_truth does."""
    if (uri := resolve_truth(root, settings)) is None:
        return
    masks = load_truth(uri, source, settings.detector.classes.values())
    splits = Counter[str]()
    for rows in source.read_parts(["split"], pc.field("key").isin(pa.array([*masks], pa.string()))):
        splits.update(rows["split"].to_pylist())
    counts = ", ".join(f"{splits[split]:,} {split}" for split in dataset.SPLITS)
    log.info(
        "mask: `%s` has masks of %d of %d photos of `%s`: %s",
        KEY,
        len(masks),
        source.manifest["rows"],
        source.name,
        counts,
    )
    if not splits["test"]:
        log.warning("mask: `%s` has a mask of no test photo, so there is no mean IoU of the test split", KEY)


def mean_test_iou(root: str, masked: dataset.Dataset, settings: MaskSettings) -> float | None:
    """Return the mean IoU of the test split's masks; None if `mask.truth` is not set or has none of that split."""
    uri = resolve_truth(root, settings)
    return None if uri is None else mean_iou(masked, uri, "test", dataset.find_dataset(root, settings.source))


def mean_iou(
    masked: dataset.Dataset, truth_uri: str, split: str, source: dataset.Dataset | None = None
) -> float | None:
    """Return the mean of `ious` over a split; None if none of its photos has a true mask."""
    values = ious(masked, truth_uri, split, source)
    return float(np.mean(list(values.values()))) if values else None


def ious(
    masked: dataset.Dataset, truth_uri: str, split: str | None = None, source: dataset.Dataset | None = None
) -> dict[str, float]:
    """Return the IoU of each photo's mask with the true one, by key; 0 for photos without a detected vehicle.

    truth_uri: a COCO file, see truth.load_truth; photos that it does not list are omitted. source: the unmasked
    dataset, all of whose keys are told apart; None: only those of the masked photos. True masks of larger photos are
    shrunk as ingestion shrinks photos.
    """
    truth = load_truth(truth_uri, source or masked, masked.manifest["settings"]["detector"]["classes"].values())
    chosen = pc.field("key").isin(pa.array([*truth], pa.string()))
    if split is not None:
        chosen &= pc.field("split") == split
    result = {}
    for rows in masked.read_parts(["key", "mask", "source_height", "source_width"], chosen):
        for row in rows.to_pylist():
            shape = row["source_height"], row["source_width"]
            mask = decode_mask(row["mask"], *shape) if row["mask"] else np.zeros(shape, bool)
            result[row["key"]] = mask_iou(mask, resize_mask(decode_rle(truth[row["key"]]), *shape))
    return result
