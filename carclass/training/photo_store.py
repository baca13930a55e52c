"""The train and val photos of a dataset in Ray's object store."""

import logging
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from carclass.cluster import connection, resources
from carclass.config.schema import TrainSettings
from carclass.data import dataset, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.formatting import count_text
from carclass.training import preflight
from carclass.training.block_columns import to_block_columns
from carclass.training.dataloader import EncodedPhotos, PhotoBlock

log = logging.getLogger(__name__)
BlockRefs = dict[str, list[ray.ObjectRef]]
"""References to the blocks of `train` and `val`, in this order."""
COLUMNS = ["image_id", "key", "label", "image"]
FEW_PHOTOS = 2000
"""Photos that one process reads before other processes have started, on a cluster of its own."""
ROWS_PER_BLOCK = 128
"""Photos per block: 20 MB when decoded to 224 pixels."""
GET_TIMEOUT_S = 120.0
"""Seconds to read blocks from the object store. Without a limit, a worker would hold the CPUs that the tasks need which
rebuild lost blocks."""


class PhotoStore:
    """The blocks of a dataset, for all stages of all runs that share it.

    decoded: decode photos to the image size of the settings, if they fit into memory; encoded ones serve every size.
    """

    def __init__(self, settings: TrainSettings, source: dataset.Dataset, *, decoded: bool = True) -> None:
        self.settings, self.source, self.decoded = settings, source, decoded
        self.nodes: set[str] = set()
        self.blocks: BlockRefs = {}

    def get(self) -> BlockRefs:
        """Return the blocks; read them from storage first, and again after the loss of a node."""
        if not self.blocks or self.nodes - resources.node_ids():
            splits = self.source.manifest["splits"]
            log.info("train: reading %s", count_text(splits["train"] + splits["val"], "photo"))
            self.nodes, size = resources.node_ids(), None
            if self.decoded:
                size = preflight.decoded_size(self.settings, self.source, resources.object_store_bytes())
            is_quick = splits["train"] + splits["val"] <= FEW_PHOTOS and connection.has_own_cluster()
            store = store_split_here if is_quick else store_split
            self.blocks = {split: store(self.source, split, size) for split in ("train", "val")}
        return self.blocks


def store_split(source: dataset.Dataset, split: str, size: int | None) -> list[ray.ObjectRef]:
    """Read a split's photos through Ray Data and return references to their blocks.

    size: side in pixels to decode them to; None: keep them encoded.
    """
    rows = streaming.stream_rows(source, COLUMNS, split)
    blocks = rows.map_batches(
        partial(to_block_columns, classes=source.classes, size=size, crash_guard=CrashGuard()),
        batch_size=ROWS_PER_BLOCK,
        batch_format="pyarrow",
    ).materialize()
    return list(blocks.to_arrow_refs() if size is None else blocks.to_numpy_refs())


def store_split_here(source: dataset.Dataset, split: str, size: int | None) -> list[ray.ObjectRef]:
    """Read a split's photos in this process, as store_split does in others."""
    blocks = []
    for part in source.parts:
        rows = part.read(COLUMNS, pc.field("split") == split)
        for batch in rows.to_batches(max_chunksize=ROWS_PER_BLOCK):
            blocks.append(ray.put(to_block_columns(pa.table(batch), source.classes, size)))
    return blocks


def get_blocks(refs: BlockRefs, size: int) -> list[list[PhotoBlock]]:
    """Return the blocks of each split. Raise GetTimeoutError of Ray if blocks stay lost."""
    splits = [ray.get(split, timeout=GET_TIMEOUT_S) for split in refs.values()]
    # Blocks without rows, which Ray Data may keep, have no columns either.
    return [[open_block(columns, size) for columns in split if len(columns)] for split in splits]


def open_block(columns: pa.Table | dict[str, np.ndarray], size: int) -> PhotoBlock:
    """Return a block on the memory of the object store, without a copy. size: to decode encoded photos to."""
    if isinstance(columns, dict):
        return PhotoBlock(**columns)
    images = columns["images"].combine_chunks()
    return PhotoBlock(EncodedPhotos(images, size), columns["labels"].to_numpy(), columns["ids"].to_numpy())
