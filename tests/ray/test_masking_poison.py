"""Masking of photos that crash workers, photos that do not decode, and unusual photos.

The crashes are injected in a separate job: this file, run as a script, is its driver.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from carclass import storage
from carclass.config.schema import DetectorSettings, IngestSettings, MaskSettings
from carclass.data import dataset, photo, publishing
from carclass.data.crash_guard import MAX_SINGLE_ATTEMPTS, AttemptLedger
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.masking import mask
from carclass.masking.detect import CPU_BATCH, DetectPhotos
from carclass.masking.detector import Detector
from carclass.masking.mask import mask_dataset
from carclass.masking.rle import decode_mask, mask_iou
from carclass.sample.background import paint_scene
from carclass.sample.car import Pen, Pose, draw_car
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS

Rows = list[dict[str, Any]]
SETTINGS = MaskSettings(
    detector=DetectorSettings(model="sample", weights="sample", short_side=96, num_proposals=10),
    num_actors=2,
    part_rows=8,
    max_quarantined=1,
)
CRASH_COLOURS = {"detect": (255, 0, 255), "decode": (255, 255, 0)}
"""Stage → colour of a photo's corner that crashes the worker in it."""
CORNER = 24


# The ledger of attempts


def test_a_batch_is_not_suspect_if_new_or_finished():
    ledger = AttemptLedger()
    assert not ledger.begin_batch(["a", "b"])
    ledger.end(["a", "b"])
    assert not ledger.begin_batch(["a", "b"])


def test_a_batch_with_an_unfinished_photo_is_suspect():
    ledger = AttemptLedger()
    ledger.begin_batch(["a", "b"])
    assert ledger.begin_batch(["b", "c"])


def test_single_attempts_are_counted_per_photo():
    ledger = AttemptLedger()
    assert [ledger.begin_single(name) for name in ("a", "a", "b", "a")] == [0, 1, 0, 2]


def test_finished_attempts_are_removed():
    ledger = AttemptLedger()
    for _ in range(2):
        ledger.begin_batch(["a", "b"])
    for name in ("a", "b"):
        ledger.begin_single(name)
    ledger.end(["a", "b"])
    assert not any(vars(ledger).values())


def begin_singles(ledger: AttemptLedger, name: str, attempts: int) -> list[int]:
    return [ledger.begin_single(name) for _ in range(attempts)]


def test_a_photo_that_was_given_up_is_not_tried_again_when_its_finished_batch_is_repeated():
    ledger = AttemptLedger()
    ledger.begin_batch(["a", "b"])
    begin_singles(ledger, "a", MAX_SINGLE_ATTEMPTS + 1)
    ledger.end(["a", "b"])
    assert ledger.begin_batch(["a", "b"])
    assert ledger.begin_single("a") > MAX_SINGLE_ATTEMPTS
    assert ledger.begin_single("b") == 0


def test_only_attempts_that_were_made_are_counted_as_crashes():
    ledger = AttemptLedger()
    begin_singles(ledger, "a", MAX_SINGLE_ATTEMPTS + 5)
    assert ledger.count_crashes() == MAX_SINGLE_ATTEMPTS


# A job with injected crashes


def inject_crashes(log: str) -> None:
    """Patch detection and decoding to log photos with a coloured corner and crash the process."""
    detect, decode = Detector.__call__, photo.decode_stored

    def crash_on_marked(stage: str, photos: Sequence[np.ndarray]) -> None:
        corners = [pixels[: CORNER // 2, : CORNER // 2].mean((0, 1)) for pixels in photos]
        marked = [abs(corner - CRASH_COLOURS[stage]).max() < 30 for corner in corners]
        if any(marked):
            names = [storage.sha256(pixels.tobytes()) for pixels, hit in zip(photos, marked, strict=True) if hit]
            with open(log, "a") as file:
                file.write(json.dumps([stage, names]) + "\n")
            os.kill(os.getpid(), signal.SIGSEGV)

    def detect_or_crash(self: Detector, photos: Sequence[np.ndarray], batch_size: int = 1) -> Any:
        crash_on_marked("detect", photos)
        return detect(self, photos, batch_size)

    def decode_or_crash(data: bytes) -> np.ndarray:
        pixels = decode(data)
        crash_on_marked("decode", [pixels])
        return pixels

    Detector.__call__, photo.decode_stored = detect_or_crash, decode_or_crash  # type: ignore[method-assign]


def drive(root: str, log: str) -> None:
    """Run a masking job with crashing detector actors; without GPUs they decode the photos too."""
    import ray

    class CrashingDetectPhotos(DetectPhotos):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            inject_crashes(log)
            super().__init__(*args, **kwargs)

    mask.DetectPhotos = CrashingDetectPhotos  # type: ignore[misc]
    ray.init(address="local", num_cpus=4, include_dashboard=False)
    mask_dataset(root, SETTINGS)


class Poisoned(NamedTuple):
    """A dataset with bad photos, masked with and without injected crashes."""

    masked: dataset.Dataset
    uninterrupted: dataset.Dataset
    bad: dict[str, list[str]]  # defect → keys
    crashes: list[tuple[str, list[str]]]  # of each crash: the stage, and keys of the bad photos in its batch


def with_corner(image: bytes, colour: tuple[int, int, int]) -> bytes:
    pixels = photo.decode(image).copy()
    pixels[:CORNER, :CORNER] = colour
    return photo.encode(pixels)


def publish(root: str, rows: Rows) -> dataset.Dataset:
    """Publish a source dataset of one part."""
    uri, settings = dataset.dataset_uri(root, "v1"), {"made": "by hand"}
    publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), settings)
    keys, classes = [row["key"] for row in rows], sorted({row["label"] for row in rows})
    with Inventory() as inventory:
        inventory.add_inputs(map(Listed, keys))
        draft = Draft(uri, settings, inventory)
        return draft.publish(draft.complete(classes, {"kind": "photos"}))


@pytest.fixture(scope="module")
def poisoned(ingested: dataset.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    """Five batches of four photos: one with two that crash detection, one with a crash in decoding, one damaged."""
    root = tmp_path_factory.mktemp("poisoned")
    assert CPU_BATCH == 4
    keys = sorted(ingested.read(["key"])["key"].to_pylist())[:20]
    rows = ingested.rows(keys, dataset.ROW.names)
    positions = {"detect": [1, 2], "decode": [9], "damaged": [13, 14]}
    for stage, colour in CRASH_COLOURS.items():
        for i in positions[stage]:
            rows[i]["image"] = with_corner(rows[i]["image"], colour)
    names = {storage.sha256(photo.decode(row["image"]).tobytes()): row["key"] for row in rows}
    rows[13]["image"], rows[14]["image"] = rows[13]["image"][:-1000], b"a page of text"
    publish(str(root), rows)
    command = [sys.executable, __file__, str(root), str(root / "crashes")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    crashes = [json.loads(line) for line in (root / "crashes").read_text().splitlines()]
    return Poisoned(
        dataset.load_dataset(str(root), "v2"),
        mask_dataset(str(root), SETTINGS.model_copy(update={"dataset": "uninterrupted"})),
        {defect: [keys[i] for i in indices] for defect, indices in positions.items()},
        [(stage, [names[digest] for digest in digests]) for stage, digests in crashes],
    )


def quarantine(published: dataset.Dataset) -> dict[str, dict[str, Any]]:
    table = publishing.read_written(published.uri, "quarantine", dataset.QUARANTINE.names)
    return {row["key"]: row for row in table.to_pylist()}


@pytest.mark.nightly  # 60 s with its fixture
@pytest.mark.parametrize("stage", CRASH_COLOURS)
def test_photos_that_crash_workers_are_quarantined_as_crashed(poisoned: Poisoned, stage: str):
    rows = {key: row for key, row in quarantine(poisoned.masked).items() if key in poisoned.bad[stage]}
    assert sorted(rows) == poisoned.bad[stage]
    for row in rows.values():
        assert (row["reason"], row["attempts"]) == ("crashed", MAX_SINGLE_ATTEMPTS + 1)
        assert stage in row["detail"]


@pytest.mark.nightly  # 60 s with its fixture
@pytest.mark.parametrize("stage", CRASH_COLOURS)
def test_no_photo_crashes_more_workers_than_it_has_attempts(poisoned: Poisoned, stage: str):
    counts = Counter(key for where, keys in poisoned.crashes for key in keys if where == stage)
    assert sorted(counts) == poisoned.bad[stage]
    assert max(counts.values()) <= MAX_SINGLE_ATTEMPTS + 1


@pytest.mark.nightly  # 60 s with its fixture
def test_two_bad_photos_were_in_the_same_batch(poisoned: Poisoned):
    assert ("detect", poisoned.bad["detect"][:2]) in poisoned.crashes


@pytest.mark.nightly  # 60 s with its fixture
def test_photos_that_do_not_decode_are_quarantined_with_their_reason(poisoned: Poisoned):
    rows = quarantine(poisoned.masked)
    reasons = [(rows[key]["reason"], rows[key]["attempts"]) for key in poisoned.bad["damaged"]]
    assert reasons == [("truncated", 1), ("not_an_image", 1)]


@pytest.mark.nightly  # 60 s with its fixture
def test_all_other_photos_have_the_same_rows_as_without_crashes(
    poisoned: Poisoned, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    crashed = {*poisoned.bad["detect"], *poisoned.bad["decode"]}
    rows, expected = contents(poisoned.masked)[0], contents(poisoned.uninterrupted)[0]
    expected = [row for row in expected if row["key"] not in crashed]
    assert [row["key"] for row in rows] == [row["key"] for row in expected]
    assert [row["key"] for row, other in zip(rows, expected, strict=True) if row != other] == []


# Unusual photos

BIG = (4619, 3464)
ROWS, COLUMNS = 2, 20


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo.encode(pixels))


def crowd() -> np.ndarray:
    """Draw 40 cars on a photo of 4000x400 pixels, large enough for a detector with a third of that as input."""
    rng = np.random.default_rng(3)
    canvas = Image.new("RGB", (200 * COLUMNS, 200 * ROWS))
    paint_scene(canvas, "field", 60, rng)
    for i in range(ROWS * COLUMNS):
        model, (row, column) = MODELS[i % len(MODELS)], divmod(i, COLUMNS)
        length = model.shape.length
        pose = Pose(x=100 + 200 * column, y=170 + 200 * row, scale=170 / length, angle=0.0, mirrored=bool(i % 2))
        draw_car(Pen(canvas, Image.new("L", canvas.size), pose, length), model, rng)
    return np.asarray(canvas)


def empty() -> np.ndarray:
    canvas = Image.new("RGB", (256, 180))
    paint_scene(canvas, "desert", 110, np.random.default_rng(3))
    return np.asarray(canvas)


@pytest.fixture(scope="module")
def unusual(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], np.ndarray]:
    """Masked rows of unusual photos by name, and the true mask of the car on the big one."""
    root = tmp_path_factory.mktemp("unusual")
    pixels, vehicles = draw_photo((3, 1), MODELS[0], "city")
    save(np.asarray(Image.fromarray(pixels).resize(BIG, Image.Resampling.BICUBIC)), root / "photos" / "A" / "big.jpg")
    save(crowd(), root / "photos" / "A" / "crowd.jpg")
    save(empty(), root / "photos" / "B" / "empty.jpg")
    save(pixels[:1, :1], root / "photos" / "B" / "dot.jpg")
    ingest_photos(str(root), IngestSettings(photos=str(root / "photos"), max_side=None, min_side=1))
    settings = MaskSettings(detector=DetectorSettings(model="sample", weights="sample", short_side=160), num_actors=1)
    rows = mask_dataset(str(root), settings).read(dataset.MASKED_ROW.names).to_pylist()
    truth = np.asarray(Image.fromarray(vehicles[0].mask).resize(BIG, Image.Resampling.NEAREST))
    return {Path(row["key"]).stem: row | {"source": (root / "photos" / row["key"])} for row in rows}, truth


@pytest.mark.slow  # 60 s with its fixture
def test_a_photo_of_16_million_pixels_is_cut_at_full_resolution(unusual: tuple[dict, np.ndarray]):
    row, truth = unusual[0]["big"], unusual[1]
    x1, y1, x2, y2 = row["box"]
    assert (row["outcome"], row["source_width"], row["source_height"]) == ("vehicle", *BIG)
    assert 0 <= x1 < x2 <= BIG[0]
    assert 0 <= y1 < y2 <= BIG[1]
    assert mask_iou(decode_mask(row["mask"], BIG[1], BIG[0]), truth) >= 0.9


@pytest.mark.slow  # 60 s with its fixture
def test_a_photo_of_forty_cars_has_several_vehicles(unusual: tuple[dict, np.ndarray]):
    row = unusual[0]["crowd"]
    assert (row["outcome"], row["several_vehicles"]) == ("vehicle", True)


@pytest.mark.slow  # 60 s with its fixture
@pytest.mark.parametrize("name", ["empty", "dot"])
def test_a_photo_without_a_vehicle_keeps_its_bytes(unusual: tuple[dict, np.ndarray], name: str):
    row = unusual[0][name]
    assert (row["outcome"], row["image"]) == ("no_vehicle", row["source"].read_bytes())


def test_a_photo_of_one_pixel_is_too_small_by_default(ray_cluster: str, tmp_path: Path):
    for name in ("A/dot.jpg", "B/dot.jpg"):
        save(np.zeros((1, 1, 3), np.uint8), tmp_path / "photos" / name)
    with pytest.raises(UserError, match="2 too_small"):
        ingest_photos(str(tmp_path), IngestSettings(photos=str(tmp_path / "photos")))


if __name__ == "__main__":
    drive(*sys.argv[1:])
