"""A dataset → a dataset without backgrounds: Ray Data streams the photos through a pool of detectors.

places of rows → fetch and decode (tasks) → detect (actors) → cut, encode and write parts (tasks)

Without GPUs, fetching and decoding happen in the actors, where Ray Data puts work that asks for the same resources.

A photo is worked on alone or beside others with the same result, so a job that was killed and run again makes the
rows that an undisturbed one makes.
"""

import logging
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from carclass import capacity, cluster, config, dataset, photo, storage
from carclass.attempts import Attempts
from carclass.errors import UserError
from carclass.inventory import Inventory
from carclass.masking import look, networks, places, quality
from carclass.masking.detector import Detection, Detector
from carclass.masking.write import write_batch
from carclass.photo import PhotoError
from carclass.telemetry import Meter

log = logging.getLogger(__name__)
CPU_BATCH, GPU_BATCHES = 4, 8
"""Photos an actor takes at a time: a second or two of work on a CPU; on a GPU so many forward passes that photos of
the same shape meet."""
MAX_PASSES = 3
"""A second pass over the photos is needed only when parts were written twice, which a lost node may cause."""

TROUBLE = pa.schema([("reason", pa.string()), ("detail", pa.string()), ("attempts", pa.int32())])
SIZE = pa.schema([("source_width", pa.int32()), ("source_height", pa.int32())])
DECODED = pa.schema([*dataset.ROW, *SIZE, *TROUBLE, ("pixels", pa.large_binary())])
FOUND = pa.schema([field for field in dataset.DETECTION if field.name not in ("mask", *SIZE.names)])
DETECTED = pa.schema([*dataset.ROW, *SIZE, *TROUBLE, *FOUND, ("mask_pixels", pa.large_binary())])
MEASURES = ("score", "num_vehicles", "several_vehicles", "touches_border", "area_fraction", "stability")


def run(root: str, settings: config.Mask) -> dataset.Dataset:
    """Publishes `<root>/datasets/<dataset>`, or finds it published. UserError for wrong settings or weights."""
    source = dataset.load(root, settings.source)
    settings = _prepare(root, settings)
    identity = _identity(settings, source)
    if (found := dataset.find_same(root, settings.dataset, identity)) is not None:
        log.info("mask: dataset %s is published, nothing to do", settings.dataset)
        return found
    draft = _mask(dataset.place(root, settings.dataset), source, settings, identity, settings.limit)
    look.write(draft, source, quality.truth(root, settings))
    return dataset.publish(draft)


def preview(root: str, settings: config.Mask) -> str:
    """Masks `preview` photos and keeps nothing but their report and contact sheet; returns their place."""
    source = dataset.load(root, settings.source)
    settings = _prepare(root, settings)
    uri = storage.join(root, "previews", settings.dataset)
    for path in storage.list_files(uri):
        storage.delete(storage.join(uri, path))
    draft = _mask(uri, source, settings, _identity(settings, source), settings.preview)
    look.write(draft, source, quality.truth(root, settings), num_sheet=draft.manifest["rows"])
    for part in draft.part_uris:
        storage.delete(part)
    return uri


def _prepare(root: str, settings: config.Mask) -> config.Mask:
    """Settings whose detector names one weights file by its hash; wrong weights are found before any process waits."""
    settings = settings.model_copy(update={"detector": networks.localise(settings.detector, root)})
    if "mask" in settings.cutout.mode and not Detector(settings.detector).finds_masks:
        raise UserError(
            f"`mask.cutout.mode` is {settings.cutout.mode}, but {settings.detector.model} finds boxes only. "
            "Say `crop`, or choose a detector with masks."
        )
    return settings


def _identity(settings: config.Mask, source: dataset.Dataset) -> dict[str, Any]:
    """What decides the rows: a dataset with the same identity is the same dataset."""
    compute = {"dataset", "preview", "truth", "num_actors", "use_gpu", "batch_size", "part_rows"}
    known = settings.model_dump(mode="json", exclude=compute)
    known["detector"]["weights"] = known["detector"].pop("weights_sha256")
    known["detector"]["architecture"] = networks.architecture_digest(settings.detector)
    return {**known, "source_digest": source.digest}


def _mask(
    uri: str, source: dataset.Dataset, settings: config.Mask, identity: dict[str, Any], limit: int | None
) -> dataset.Dataset:
    """The complete dataset at uri, not published yet."""
    cluster.connect()
    with Inventory() as inventory:
        inventory.add_rows((row.number, row.key) for row in places.chosen(source, limit))
        for _ in range(MAX_PASSES):
            dataset.take_stock(uri, inventory, identity)
            dataset.drop_repeats(uri, inventory, identity)
            if not inventory.count_todo():
                break
            _write(uri, source, inventory, settings, identity)
        outcomes = Counter(dataset.written(uri, "parts", ["outcome"])["outcome"].to_pylist())
        facts = {
            "kind": "masked",
            "outcomes": dict(sorted(outcomes.items())),
            # Where they lie, for predictions: the settings have the hash.
            "detector_weights": settings.detector.weights,
        }
        return dataset.draft(uri, inventory, settings=identity, classes=source.classes, facts=facts)


def _write(
    uri: str, source: dataset.Dataset, inventory: Inventory, settings: config.Mask, identity: dict[str, Any]
) -> None:
    """Streams the rows that are to do through the detectors into parts."""
    use_gpu = capacity.gpus(settings.use_gpu, settings.num_actors or 1, "mask.use_gpu", capacity.MASK, together=False)
    place = capacity.selector(capacity.MASK) if use_gpu else None
    count = settings.num_actors or max(1, capacity.room("GPU" if use_gpu else "CPU", 1, place))
    if "batch_size" in settings.model_fields_set and not use_gpu:
        log.warning("mask: `mask.batch_size` has no effect without GPUs: a CPU takes photos one by one")
    capacity.check_cpus(1 + (count + 1) * cluster.TASK_CPUS, "mask.num_actors")  # 1: Ray's own repartitioning
    attempts, block_rows = Attempts(), GPU_BATCHES * settings.batch_size if use_gpu else CPU_BATCH
    todo = places.by_part(source, inventory.todo_numbers())
    decoded = cluster.stream_places(todo, block_rows).map_batches(
        partial(decode_batch, attempts=attempts),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=cluster.TASK_CPUS,
    )
    detected = decoded.map_batches(
        DetectPhotos,
        fn_constructor_kwargs={"settings": settings, "attempts": attempts, "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=block_rows,
        batch_format="pyarrow",
        num_cpus=cluster.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
        label_selector=place,
    )
    written = detected.map_batches(
        partial(write_batch, uri=uri, settings=settings, identity=identity),
        batch_size=settings.part_rows,
        batch_format="pyarrow",
        num_cpus=cluster.TASK_CPUS,
    )
    with Meter("mask", inventory.count_todo()) as meter:
        for summary in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(summary, pa.Table)
            meter.add(summary["outcome"].drop_null().to_pylist(), summary["reason"].drop_null().to_pylist())


def decode_batch(batch: pa.Table, attempts: Attempts) -> pa.Table:
    """Places of rows → rows of DECODED."""
    return decode_rows(_fetch(batch), attempts)


def decode_rows(batch: pa.Table, attempts: Attempts) -> pa.Table:
    """Rows of a dataset → rows of DECODED: with their pixels, or with what is wrong with them."""
    images = batch["image"].to_pylist()
    decoded = attempts.run("decode", batch["key"].to_pylist(), lambda chosen: [_decode(images[i]) for i in chosen])
    return _extend(batch, [_trouble(item) if isinstance(item, PhotoError) else _raw(item) for item in decoded], DECODED)


def _fetch(batch: pa.Table) -> pa.Table:
    """The source's rows at these places."""
    parts = dict.fromkeys(batch["part"].to_pylist())
    positions = {part: batch.filter(pc.field("part") == part)["position"].to_pylist() for part in parts}
    return pa.concat_tables(dataset.take(part, found, dataset.ROW.names) for part, found in positions.items())


def _decode(image: bytes) -> np.ndarray | PhotoError:
    try:
        return photo.decode(image, min_side=1)
    except PhotoError as error:
        return error


def _raw(pixels: np.ndarray) -> dict[str, Any]:
    return {"source_height": pixels.shape[0], "source_width": pixels.shape[1], "pixels": pixels.tobytes()}


def _trouble(error: PhotoError) -> dict[str, Any]:
    return {"reason": str(error.reason), "detail": error.detail, "attempts": error.attempts}


def _extend(batch: pa.Table, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The columns of schema: from rows those that their dicts speak of, from the batch the others."""
    named = set().union(*rows)
    more = pa.Table.from_pylist(
        rows, pa.schema([f for f in schema if f.name in named or f.name not in batch.schema.names])
    )
    return pa.table([(more if name in more.schema.names else batch)[name] for name in schema.names], schema=schema)


class DetectPhotos:
    """A detector process: rows of DECODED → rows of DETECTED."""

    def __init__(self, settings: config.Mask, attempts: Attempts, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        self.settings, self.attempts = settings, attempts
        self.detect = Detector(settings.detector, settings.choice, "cuda" if use_gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.select(["key", "source_height", "source_width", *TROUBLE.names, "pixels"]).to_pylist()
        sound = [row for row in rows if row["reason"] is None]
        photos = [
            np.frombuffer(row["pixels"], np.uint8).reshape(row["source_height"], row["source_width"], 3)
            for row in sound
        ]  # fmt: skip
        keys, size = [row["key"] for row in sound], self.settings.batch_size
        found = self.attempts.run("detect", keys, lambda chosen: self.detect([photos[i] for i in chosen], size))
        for row, result in zip(sound, found, strict=True):
            row |= _trouble(result) if isinstance(result, PhotoError) else self._columns(result)
        return _extend(batch.drop(["pixels"]), [{**row, "pixels": None} for row in rows], DETECTED)

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
