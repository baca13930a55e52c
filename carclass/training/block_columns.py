"""Rows of a dataset → columns of a PhotoBlock, in tasks of Ray Data or in the job's process.

A module without PyTorch, whose import would take seconds in every process that only decodes.
"""

import numpy as np
import pyarrow as pa

from carclass import storage
from carclass.data.crash_guard import CrashGuard
from carclass.data.dataset import class_indices
from carclass.data.photo import decode_photos


def to_block_columns(
    batch: pa.Table, classes: list[str], size: int | None, crash_guard: CrashGuard | None = None
) -> pa.Table | dict[str, np.ndarray]:
    """Convert a dataset's rows to the columns of a PhotoBlock.

    crash_guard: None in a process that ends with the job. Raise UserError for a photo that crashes workers, or a label
    that is none of the classes.
    """
    names = [f"{i}/{key}" for i, key in zip(batch["image_id"].to_pylist(), batch["key"].to_pylist(), strict=True)]
    ids = np.array([int(storage.sha256(name.encode())[:16], 16) for name in names], np.uint64)
    labels = class_indices(batch["label"], classes)
    if size is None:
        return pa.table({"images": batch["image"], "labels": labels, "ids": ids})
    images = batch["image"].to_pylist()
    if crash_guard is None:
        return {"pixels": decode_photos(images, size), "labels": labels, "ids": ids}
    photos = crash_guard.run_strictly(
        "decode", batch["key"].to_pylist(), lambda indices: (decode_photos([images[i]], size)[0] for i in indices)
    )
    return {"pixels": np.stack(photos), "labels": labels, "ids": ids}
