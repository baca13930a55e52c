"""Rows of detections of large photos, and the parts written of them."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from carclass.config.schema import DetectorSettings, ExcludeSettings, MaskSettings
from carclass.data import dataset, photo, publishing, streaming
from carclass.masking.detect import (
    CPU_BATCH,
    DetectPhotos,
    decode_rows,
    detector_batch_size,
    fetch_and_decode,
    reading_window,
)
from carclass.masking.rle import decode_mask
from carclass.masking.writer import DETECTED, cut_rows, write_batch
from tests.helpers.inventories import run_all

SETTINGS = MaskSettings(detector=DetectorSettings(model="sample", weights="sample", short_side=96, num_proposals=10))
SIDES = (1200, 1600)
NUM_PHOTOS = 3


class Unguarded:
    """A CrashGuard's methods without Ray."""

    run = staticmethod(run_all)


@pytest.fixture(scope="module")
def detected(photos_folder: Path) -> Iterator[pa.Table]:
    """Detections in photos of the sample that are enlarged."""
    threads = torch.get_num_threads()
    files = sorted((photos_folder / "photos").glob("0000*.jpg"))[:NUM_PHOTOS]
    rows = []
    for file in files:
        pixels = photo.resize(photo.decode(file.read_bytes()), *SIDES)
        row = {"key": file.name, "image_id": file.name, "label": "A", "split": "train"}
        rows.append(row | {"width": SIDES[1], "height": SIDES[0], "image": photo.encode(pixels)})
    detect = DetectPhotos(SETTINGS, Unguarded(), use_gpu=False)  # type: ignore[arg-type]
    yield detect(decode_rows(pa.Table.from_pylist(rows, dataset.ROW), Unguarded()))  # type: ignore[arg-type]
    torch.set_num_threads(threads)


def test_rows_that_wait_for_their_part_hold_no_pixels(detected: pa.Table):
    assert detected["grid"].null_count == 0
    assert detected.drop(["image"]).nbytes < 15_000 * NUM_PHOTOS


def test_a_mask_smaller_than_a_pixel_is_no_vehicle(detected: pa.Table):
    (row,) = detected.slice(0, 1).to_pylist()
    row["box"] = [10.1, 10.1, 10.2, 10.2]
    (cut,) = cut_rows(pa.Table.from_pylist([row], DETECTED), SETTINGS)
    assert (cut["outcome"], cut["num_vehicles"]) == ("no_vehicle", 0)
    assert [cut[name] for name in ("box", "mask", "score", "vehicle_class", "area_fraction")] == [None] * 5
    assert (cut["source_width"], cut["image"]) == (SIDES[1], row["image"])


def test_the_background_is_removed_with_the_mask_that_is_stored(detected: pa.Table, tmp_path: Path):
    settings = SETTINGS.model_copy(update={"cutout": SETTINGS.cutout.model_copy(update={"mode": "mask"})})
    write_batch(detected, str(tmp_path), settings, {})
    for row in publishing.read_written(str(tmp_path), "parts", dataset.MASKED_ROW.names).to_pylist():
        mask = decode_mask(row["mask"], row["source_height"], row["source_width"])
        assert mask.mean() == pytest.approx(row["area_fraction"], abs=1e-6)
        background = photo.decode(row["image"])[:16, :16][~mask[:16, :16]]
        assert np.abs(background.astype(int) - settings.cutout.fill).max() <= 3


def test_large_masked_photos_are_written_in_several_parts(
    detected: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publishing, "PART_BYTES", 1)
    assert len(write_batch(detected, str(tmp_path), SETTINGS, {})) == NUM_PHOTOS
    assert len(publishing.list_parts(str(tmp_path))) == NUM_PHOTOS


def test_writers_return_the_rows_that_would_be_read_from_their_files(
    detected: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publishing, "PART_BYTES", 1)
    limit = float(np.median([row["area_fraction"] for row in cut_rows(detected, SETTINGS)]))
    settings = SETTINGS.model_copy(update={"exclude": ExcludeSettings(min_area_fraction=limit)})
    records = write_batch(detected, str(tmp_path), settings, {})
    written = {part.path: part for part in publishing.from_records(records)}
    assert sorted(written) == publishing.list_parts(str(tmp_path))
    assert {path.split("/")[0] for path in written} == {"parts", "quarantine"}
    for path, part in written.items():
        read = publishing.read_written_columns(str(tmp_path), path)
        assert read is not None
        assert part.content.encode() == read.schema.metadata[dataset.CONTENT_KEY]
        assert part.rows.select(read.column_names).to_pylist() == read.to_pylist()


def test_detectors_on_gpus_get_fewer_photos_if_these_are_large():
    sizes = [detector_batch_size(SETTINGS, max_side, use_gpu=True) for max_side in (800, 2400, 10_000, None)]
    assert sizes == [8 * SETTINGS.batch_size, 15, CPU_BATCH, CPU_BATCH]


def sizes_of(batch: pa.Table) -> list[tuple[int, int]]:
    return [(row["height"], row["width"]) for row in batch.select(["height", "width"]).to_pylist()]


def test_rows_for_several_batches_are_ordered_by_canvas(tmp_path: Path):
    shapes = [(40, 60), (60, 40), (40, 61), (60, 41), (40, 60), (60, 40)] * 2
    images = [photo.encode(np.full((*shape, 3), 7, np.uint8)) for shape in shapes]
    rows = [
        {"key": f"{i}", "image_id": f"{i}", "height": shape[0], "width": shape[1], "image": image}
        for i, (shape, image) in enumerate(zip(shapes, images, strict=True))
    ]
    part = publishing.write_part(str(tmp_path), "parts", pa.Table.from_pylist(rows, dataset.ROW), {}).path
    table = pa.table([[f"{tmp_path}/{part}"] * len(shapes), range(len(shapes))], schema=streaming.ROW_POSITION)
    batches = [*fetch_and_decode(table, Unguarded(), SETTINGS.detector, 6)]  # type: ignore[arg-type]
    is_wide = [{height < width for height, width in sizes_of(batch)} for batch in batches]
    assert is_wide == [{False}, {True}] or is_wide == [{True}, {False}]
    assert sorted(key for batch in batches for key in batch["key"].to_pylist()) == sorted(row["key"] for row in rows)


@pytest.mark.parametrize(("max_side", "batches"), [(400, 8), (800, 6), (3000, 1), (None, 1)])
def test_windows_of_large_photos_are_smaller(max_side: int | None, batches: int):
    assert reading_window(128, max_side, use_gpu=True) == 128 * batches
    assert reading_window(4, max_side, use_gpu=False) == 4


def test_photos_of_any_size_that_ingestion_permits_are_decoded():
    """A header of 102 megapixels without pixels: the size is checked before them."""
    header = struct.pack(">IIBBBBB", 10_200, 10_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    png = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    row = {"key": "a.png", "image_id": "0", "label": "A", "split": "train", "width": 10_200, "height": 10_000}
    rows = pa.Table.from_pylist([row | {"image": b"\x89PNG\r\n\x1a\n" + png}], dataset.ROW)
    (reason,) = decode_rows(rows, Unguarded())["reason"].to_pylist()  # type: ignore[arg-type]
    assert reason in ("truncated", "corrupt")
