"""The steps of a prediction job on batches, without a cluster: fingerprints and thumbnails reach the written rows."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from carclass.config.schema import DetectorSettings, IngestSettings, MaskSettings, PredictSettings
from carclass.data import photo
from carclass.data.draft import Draft
from carclass.data.inventory import INPUT, Inventory
from carclass.masking import networks
from carclass.models import architectures
from carclass.prediction import classify, few_photos
from carclass.prediction.collect import THUMBNAIL_SIDE
from carclass.prediction.predictions import PREDICTED
from carclass.progress import Progress
from carclass.runs.run import find_run
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS
from tests.helpers.evaluated_run import CLASSES, MODEL, publish_photos
from tests.helpers.inventories import run_all
from tests.helpers.runs import publish_frozen_run

GUARD = SimpleNamespace(run=run_all)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a car, a photo without one, and a file that is no photo."""
    folder = tmp_path_factory.mktemp("box")
    pixels, _ = draw_photo((3, 1), MODELS[1], next(iter(SCENES)))
    (folder / "car.jpg").write_bytes(photo.encode(pixels))
    (folder / "grey.jpg").write_bytes(photo.encode(np.full((90, 120, 3), 128, np.uint8)))
    (folder / "text.jpg").write_text("no photo")
    return folder


@pytest.fixture(scope="module")
def inputs(box: Path) -> pa.Table:
    """Return the photos as rows of INPUT."""
    keys = sorted(path.name for path in box.iterdir())
    rows = [{"key": key, "fingerprint": f"of {key}", "subset": "test", "size": 1} for key in keys]
    return pa.Table.from_pylist(rows, INPUT)


@pytest.fixture(scope="module")
def read(box: Path, inputs: pa.Table) -> pa.Table:
    """Return the photos as rows of READ."""
    settings = IngestSettings(photos=str(box), max_side=320)
    return pa.concat_tables(classify.read_batch(inputs, GUARD, settings))


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> MaskSettings:
    detector = DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30)
    return MaskSettings(detector=networks.pin_weights(detector, str(tmp_path_factory.mktemp("weights"))))


def cut(read: pa.Table, mask: MaskSettings, share: float) -> pa.Table:
    detect = classify.DetectNewPhotos(mask, GUARD, use_gpu=False)
    detected = detect(classify.decode_valid(read, GUARD))
    return pa.concat_tables(classify.cut_photos(detected, mask, share)).sort_by("key")


@pytest.fixture(scope="module")
def masked(read: pa.Table, mask: MaskSettings) -> pa.Table:
    return cut(read, mask, 1.0)


def test_masked_photos_keep_their_fingerprints(masked: pa.Table):
    assert masked["fingerprint"].to_pylist() == ["of car.jpg", "of grey.jpg", "of text.jpg"]
    assert masked["reason"].to_pylist() == [None, None, "not_an_image"]


def test_a_masked_photo_has_thumbnails_of_the_whole_and_of_the_cutout(masked: pa.Table):
    car, grey, text = masked.select(["photo", "cutout", "outcome"]).to_pylist()
    assert car["outcome"] == "vehicle"
    assert max(photo.decode(car["photo"]).shape) == max(photo.decode(car["cutout"]).shape) == THUMBNAIL_SIDE
    assert car["photo"] != car["cutout"]
    assert (grey["outcome"], grey["cutout"]) == ("no_vehicle", None)
    assert grey["photo"]
    assert (text["photo"], text["cutout"]) == (None, None)


def test_photos_that_the_page_leaves_out_have_no_thumbnails(read: pa.Table):
    assert classify.select_input(read, 0.0)["photo"].to_pylist() == [None] * 3


def test_photos_that_are_not_masked_have_one_thumbnail(read: pa.Table):
    rows = classify.select_input(read, 1.0).to_pylist()
    assert [(row["photo"] is None, row["cutout"]) for row in rows] == [(False, None), (False, None), (True, None)]
    assert [row["fingerprint"] for row in rows] == ["of car.jpg", "of grey.jpg", "of text.jpg"]


@pytest.fixture
def job(tmp_path: Path) -> classify.PredictionJob:
    publish_frozen_run(str(tmp_path), publish_photos(tmp_path), "first", MODEL, architectures.build(MODEL, 3).eval())
    model_uri = find_run(str(tmp_path), "first").model_uri("frozen")
    settings = PredictSettings(photos="/box", threshold=0.5, batch_size=4)
    return classify.PredictionJob(settings, IngestSettings(photos="/box"), None, model_uri, CLASSES, 1.0, 1.0)


def test_classified_rows_have_all_that_is_written(read: pa.Table, job: classify.PredictionJob):
    rows = classify.ClassifyPhotos(job, GUARD, use_gpu=False)(classify.select_input(read, 1.0))
    assert rows.schema == PREDICTED
    assert [row["label"] is None for row in rows.to_pylist()] == [False, False, True]
    assert [row["fingerprint"] for row in rows.to_pylist()] == ["of car.jpg", "of grey.jpg", "of text.jpg"]
    assert [row["photo"] is None for row in rows.to_pylist()] == [False, False, True]


def test_a_few_photos_are_predicted_here_without_a_gpu_or_its_use(
    tmp_path: Path, job: classify.PredictionJob, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with Inventory() as inventory:
        draft = Draft(str(tmp_path), {}, inventory)
        assert few_photos.can_predict_here(draft, job._replace(use_gpu=False))
        assert not few_photos.can_predict_here(draft, job)


def test_a_few_masked_photos_are_counted_one_by_one(
    inputs: pa.Table, masked: pa.Table, box: Path, mask: MaskSettings, job: classify.PredictionJob,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    job = job._replace(reading=IngestSettings(photos=str(box), max_side=320), mask=mask)
    with caplog.at_level(logging.INFO, "carclass"):
        steps = few_photos.PhotoSteps.load(job, 3)
        prepared = [*steps._replace(masked=Progress("predict", total=3, interval=0)).prepare(inputs)]
    assert "predict: masking and classifying 3 photos" in caplog.messages
    assert [line.split(",")[0] for line in caplog.messages[-3:]] == [f"predict: {i} of 3 photos" for i in (1, 2, 3)]
    assert pa.concat_tables(prepared).sort_by("key") == masked


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_an_actor_with_both_networks_gives_the_rows_of_two_actors(
    read: pa.Table, mask: MaskSettings, masked: pa.Table, job: classify.PredictionJob, repeats: int
):
    decoded = classify.decode_valid(read, GUARD)
    both = classify.DetectAndClassifyPhotos(job._replace(mask=mask), GUARD, use_gpu=False)
    (rows,) = both(pa.concat_tables([decoded] * repeats) if repeats else decoded.slice(0, 0))
    expected = classify.ClassifyPhotos(job, GUARD, use_gpu=False)(masked)
    assert rows.schema == PREDICTED
    assert rows.sort_by("key").to_pylist() == [row for row in expected.to_pylist() for _ in range(repeats)]
