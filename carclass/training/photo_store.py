"""The train and val photos of a dataset in Ray's object store."""

from functools import partial

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch

from carclass import storage
from carclass.cluster import resources
from carclass.config.schema import TrainSettings
from carclass.data import dataset, streaming
from carclass.models.preprocessing import decode_photos
from carclass.training import preflight
from carclass.training.dataloader import EncodedPhotos, PhotoBlock

BlockRefs = dict[str, list[ray.ObjectRef]]
"""A dataset's photos in the object store, of train and val, in this order."""
READ_ROWS = 128
"""Photos per block: 20 MB when decoded to 224 pixels."""
MAX_WAIT = 120.0
"""Seconds until photos in the object store are taken for lost."""


class PhotoStore:
    """The train and val photos of a dataset in the object store, where every stage finds them.

    decoded: to the size of the settings, where they fit into memory; encoded ones serve every size.
    """

    def __init__(self, settings: TrainSettings, source: dataset.Dataset, *, decoded: bool = True) -> None:
        self.settings, self.source, self.decoded = settings, source, decoded
        self.nodes: set[str] = set()
        self.blocks: BlockRefs = {}

    def get(self) -> BlockRefs:
        """The blocks of each split; read again once a node is lost, which takes some along."""
        if not self.blocks or self.nodes - resources.node_ids():
            self.nodes, size = resources.node_ids(), None
            if self.decoded:
                size = preflight.decoded_size(self.settings, self.source, resources.object_store_bytes())
            self.blocks = {split: store_split(self.source, split, size) for split in ("train", "val")}
        return self.blocks


def store_split(source: dataset.Dataset, split: str, size: int | None) -> list[ray.ObjectRef]:
    """A split's photos, streamed once through Ray Data; the blocks stay in the object store.

    size: pixels of the sides they are decoded to; None: they stay encoded.
    """
    rows = streaming.stream_rows(source, ["image_id", "key", "label", "image"], split)
    index = {name: i for i, name in enumerate(source.classes)}
    held = rows.map_batches(
        partial(to_block_columns, index=index, size=size), batch_size=READ_ROWS, batch_format="pyarrow"
    )
    held = held.materialize()
    return list(held.to_arrow_refs() if size is None else held.to_numpy_refs())


def to_block_columns(batch: pa.Table, index: dict[str, int], size: int | None) -> pa.Table | dict[str, np.ndarray]:
    """A Block's columns from a dataset's rows."""
    names = [f"{i}/{key}" for i, key in zip(batch["image_id"].to_pylist(), batch["key"].to_pylist(), strict=True)]
    ids = np.array([int(storage.sha256(name.encode())[:16], 16) for name in names], np.uint64)
    labels = np.array([index[label] for label in batch["label"].to_pylist()], np.int64)
    if size is None:
        return pa.table({"images": batch["image"], "labels": labels, "ids": ids})
    return {"pixels": decode_photos(batch["image"].to_pylist(), size), "labels": labels, "ids": ids}


def open_block(held: pa.Table | dict[str, np.ndarray], size: int) -> PhotoBlock:
    """Photos as they lie in the object store, where they stay: nothing is copied."""
    if isinstance(held, dict):
        return PhotoBlock(**held)
    images = held["images"].combine_chunks()
    return PhotoBlock(EncodedPhotos(images, size), held["labels"].to_numpy(), held["ids"].to_numpy())
