"""A dataset → a dataset without backgrounds: Ray Data streams the photos through a pool of detectors."""

import logging
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from carclass import cluster, config, dataset, photo
from carclass.masking.cutout import cut
from carclass.masking.detector import Detection, Detector, decode_mask, encode_mask
from carclass.progress import Progress

log = logging.getLogger(__name__)
TASK_CPUS = 0.5
"""CPUs reserved by a reading or writing task and by a detector on a CPU: detectors never hold all of a machine,
which would leave none for the tasks that feed them."""


class DetectPhotos:
    """A detector process: adds DETECTION's columns to a batch of rows."""

    def __init__(self, settings: config.Detector, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        self.settings = settings
        self.detect = Detector(settings, "cuda" if use_gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        photos = [photo.decode(data) for data in batch["image"].to_pylist()]
        found = [self._columns(*pair) for pair in zip(self.detect(photos), photos, strict=True)]
        columns = pa.Table.from_pylist(found, dataset.DETECTION)
        return pa.Table.from_arrays([*batch.columns, *columns.columns], schema=dataset.MASKED_ROW)

    def _columns(self, found: Detection | None, pixels: np.ndarray) -> dict[str, Any]:
        size = {"source_width": pixels.shape[1], "source_height": pixels.shape[0]}
        if found is None:
            return {"outcome": "no_vehicle", **size}
        return {
            "outcome": "vehicle",
            "vehicle_class": self.settings.classes[found.category],
            "score": found.score,
            "box": found.box.tolist(),
            "mask": encode_mask(found.mask),
            **size,
        }


def run(root: str, settings: config.Mask) -> dataset.Dataset:
    """Publishes `<root>/datasets/<dataset>`, or finds it published. UserError for wrong settings or weights."""
    source = dataset.load(root, settings.source)
    compute = {"dataset", "truth", "num_actors", "use_gpu", "batch_size", "part_rows"}
    identity = {**settings.model_dump(mode="json", exclude=compute), "source_digest": source.digest}
    if (found := dataset.find_same(root, settings.dataset, identity)) is not None:
        log.info("mask: dataset %s is published, nothing to do", settings.dataset)
        return found
    Detector(settings.detector)  # wrong weights are found here, before any process waits for them
    cluster.connect()
    uri = dataset.place(root, settings.dataset)
    wanted = choose(source.read(["image_id", "key"]), settings.limit)
    _write(uri, source, wanted - dataset.finished(uri, identity), settings, identity)
    outcomes = Counter(dataset.written(uri, "parts", ["outcome"])["outcome"].to_pylist())
    log.info("mask: %s", ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())))
    facts = {"kind": "masked", "outcomes": dict(sorted(outcomes.items()))}
    return dataset.publish(uri, inputs=wanted, settings=identity, classes=source.classes, facts=facts)


def choose(rows: pa.Table, limit: int | None) -> set[str]:
    """Keys to mask: all, or as many as the limit, by the order of their content's hash."""
    pairs = sorted(zip(rows["image_id"].to_pylist(), rows["key"].to_pylist(), strict=True))
    return {key for _, key in pairs[:limit]}


def _write(uri: str, source: dataset.Dataset, todo: set[str], settings: config.Mask, identity: dict[str, Any]) -> None:
    """Streams the rows whose key is in todo through the detectors into parts."""
    if not todo:
        return
    count = settings.num_actors or int(ray.cluster_resources().get("GPU", 0) or ray.cluster_resources()["CPU"])
    use_gpu = cluster.gpus(settings.use_gpu, 1 if settings.num_actors is None else count, "mask.use_gpu")
    cluster.check_cpus((count + 1) * TASK_CPUS, "mask.num_actors")
    rows = cluster.stream(source, dataset.ROW.names)
    masked = (
        rows.map_batches(
            partial(keep, keys=ray.put(todo)),
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
        )
        .map_batches(
            DetectPhotos,
            fn_constructor_kwargs={"settings": settings.detector, "use_gpu": use_gpu},
            compute=ray.data.ActorPoolStrategy(size=count),
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
            num_gpus=1 if use_gpu else 0,
        )
        .map_batches(
            partial(write_batch, uri=uri, settings=settings, identity=identity),
            batch_size=settings.part_rows,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
        )
    )
    progress = Progress("mask", len(todo))
    for summary in masked.iter_rows():
        progress.add(summary["rows"])


def keep(batch: pa.Table, keys: Any) -> pa.Table:
    """Rows whose key is among those still to do."""
    wanted = ray.get(keys)
    return batch.filter(pa.array([key in wanted for key in batch["key"].to_pylist()], pa.bool_()))


def write_batch(batch: pa.Table, uri: str, settings: config.Mask, identity: dict[str, Any]) -> pa.Table:
    """Cuts the vehicles out and makes a part; returns how many rows."""
    rows = [_cut_row(row, settings) for row in batch.to_pylist()]
    if rows:
        dataset.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.MASKED_ROW), identity)
    return pa.table({"rows": [len(rows)]})


def _cut_row(row: dict[str, Any], settings: config.Mask) -> dict[str, Any]:
    """A row with its photo cut out; a photo without a vehicle stays whole."""
    if row["outcome"] == "no_vehicle":
        return row
    mask = decode_mask(row["mask"], row["source_height"], row["source_width"])
    pixels = cut(photo.decode(row["image"], min_side=1), np.array(row["box"]), mask, settings.cutout)
    image = photo.encode(pixels, quality=settings.quality)
    return {**row, "image": image, "width": pixels.shape[1], "height": pixels.shape[0]}
