"""run.predict and photos named one by one: predictions in the calling process, without Ray."""

import dataclasses
import io
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps

import carclass
from carclass.config.schema import DetectorSettings, ExcludeSettings, MaskSettings, ModelSettings
from carclass.data import dataset, formats, photo
from carclass.errors import UserError
from carclass.evaluation.calibration import apply_temperature, fit_calibration
from carclass.masking import networks
from carclass.models import architectures, classifier, preprocessing
from carclass.prediction.loaded_run import LoadedRun
from carclass.prediction.photo_predictor import PhotoPredictor
from carclass.prediction.predictions import PREDICTION
from carclass.runs.calibration_record import write_calibration
from carclass.runs.preprocessing_record import record_preprocessing
from carclass.runs.saved_model import read_model
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo, mask_to_box
from carclass.sample.models import MODELS
from tests.helpers.runs import publish_frozen_run

HOUSE = Path(__file__).parents[2]
CLASSES = ["one", "two", "three"]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)


READING = {"min_side": 16, "max_pixels": 1_000_000, "max_side": 80, "quality": 92}
TEMPERATURE = 0.1


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return architectures.build(MODEL, len(CLASSES)).eval()


@pytest.fixture
def predicting(net: torch.nn.Module, tmp_path: Path) -> LoadedRun:
    """Load a calibrated run on unmasked photos."""
    manifest = {"kind": "photos", "settings": READING, "classes": CLASSES}
    source = dataset.Dataset(f"{tmp_path}/datasets/v2", manifest)
    run = publish_frozen_run(str(tmp_path), source, "first", MODEL, net)
    record_preprocessing(run, source)
    model_uri = run.model_uri("frozen")
    calibrated = fit_calibration(np.array([0, 1]), np.full((2, 2), 0.5), read_model(model_uri)[1]["sha256"])
    write_calibration(model_uri, dataclasses.replace(calibrated, temperature=TEMPERATURE, num_photos=1000))
    return carclass.load_run(run.uri)


@pytest.fixture
def image() -> Image.Image:
    """Return an image of 120 x 90 pixels with a gradient and noise."""
    rng = np.random.default_rng(1)
    gradient = np.linspace(0, 200, 120)[None, :, None] * np.array([1, 0.5, 0.2])
    return Image.fromarray((gradient + rng.integers(0, 50, (90, 120, 3))).astype(np.uint8))


def probability(table: pa.Table) -> list[float]:
    return table["top5_probabilities"].combine_chunks().flatten().to_pylist()


def test_a_file_is_read_shrunk_and_calibrated(
    predicting: LoadedRun, net: torch.nn.Module, image: Image.Image, tmp_path: Path
):
    image.save(tmp_path / "car.png")
    (row,) = predicting.predict([tmp_path / "car.png"]).to_pylist()
    stored, _, _ = photo.reencode((tmp_path / "car.png").read_bytes(), **READING)
    pixels = torch.from_numpy(photo.decode_photos([stored], 64)).permute(0, 3, 1, 2)
    with torch.inference_mode(), classifier.autocast("fp32", torch.device("cpu")):
        raw = net(preprocessing.normalise(pixels)).softmax(1).numpy()
    (expected,) = apply_temperature(raw, TEMPERATURE)
    assert row["label"] == CLASSES[expected.argmax()]
    assert row["top5_probabilities"] == pytest.approx(sorted(expected, reverse=True), abs=1e-4)
    assert (row["key"], row["reason"], row["outcome"]) == (str(tmp_path / "car.png"), None, None)


def test_a_run_trained_without_gpus_predicts_without(
    predicting: LoadedRun, image: Image.Image, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = dataclasses.replace(predicting.run, settings=predicting.settings.model_copy(update={"use_gpu": False}))
    assert PhotoPredictor(run, run.model_uri("frozen"))(image)["label"].null_count == 0


def test_the_table_has_the_columns_of_the_job_without_rejection(predicting: LoadedRun, image: Image.Image):
    assert predicting.predict(image).schema.names == [name for name in PREDICTION.names if name != "rejected"]


@pytest.mark.parametrize("name", ["car.jpg", "car.png", "grey16.png", "turned.jpg", "alpha.png", "cmyk.jpg", "car.gif"])
def test_an_opened_image_is_predicted_as_its_file(predicting: LoadedRun, image: Image.Image, tmp_path: Path, name: str):
    write_photo(image, tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        of_image = predicting.predict([opened])
    of_file = predicting.predict(tmp_path / name)
    assert of_image.drop(["key"]) == of_file.drop(["key"])
    assert of_file["reason"].to_pylist() == [None]


@pytest.mark.parametrize(
    "name", ["car.png", "grey16.png", "turned.png", "alpha.png", "palette.png", "car.jpg", "turned.jpg", "cmyk.jpg"]
)
def test_a_loaded_image_is_predicted_as_its_file(predicting: LoadedRun, image: Image.Image, tmp_path: Path, name: str):
    write_photo(image.resize((80, 60)), tmp_path / name)  # not shrunk when it is read
    with Image.open(tmp_path / name) as opened:
        opened.load()
    assert probability(predicting.predict(opened)) == probability(predicting.predict(str(tmp_path / name)))


def test_an_image_that_was_changed_after_loading_is_predicted_as_it_is(
    predicting: LoadedRun, image: Image.Image, tmp_path: Path
):
    write_photo(image, tmp_path / "car.png")
    with Image.open(tmp_path / "car.png") as opened:
        opened.paste((255, 0, 0), (0, 0, 100, 60))
    assert probability(predicting.predict(opened)) == probability(predicting.predict(opened.copy()))


def test_a_drafted_image_that_is_not_loaded_is_predicted_as_its_file(
    predicting: LoadedRun, image: Image.Image, tmp_path: Path
):
    write_photo(image, tmp_path / "car.jpg")
    with Image.open(tmp_path / "car.jpg") as opened:
        opened.draft("RGB", (40, 30))
        assert probability(predicting.predict(opened)) == probability(predicting.predict(tmp_path / "car.jpg"))


@pytest.mark.parametrize("way", ["draft", "grey draft", "thumbnail", "draft in memory"])
def test_an_image_that_was_reduced_in_place_is_refused(
    predicting: LoadedRun, image: Image.Image, tmp_path: Path, way: str
):
    path = tmp_path / "car.jpg"
    write_photo(image, path)
    with Image.open(io.BytesIO(path.read_bytes()) if way == "draft in memory" else path) as opened:
        if way == "thumbnail":
            opened.thumbnail((100, 80))
        else:
            opened.draft("L" if way == "grey draft" else "RGB", None if way == "grey draft" else (40, 30))
        opened.load()
    with pytest.raises(UserError, match=r"photo 1 has another size or mode than its file.*`copy\(\)`"):
        predicting.predict([image, opened])
    assert predicting.predict(opened.copy())["reason"].to_pylist() == [None]


def write_photo(image: Image.Image, path: Path) -> None:
    """Write an image in the way that the file's name tells."""
    exif, kind = Image.Exif(), path.stem
    exif[0x0112] = 6 if kind == "turned" else 1
    if kind == "grey16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77)
    modes = {"alpha": "RGBA", "cmyk": "CMYK", "palette": "P"}
    image = image.convert(modes[kind]) if kind in modes else image
    if kind == "alpha":
        image.putalpha(100)
    image.save(path, exif=exif)


def test_exif_orientation_matters(predicting: LoadedRun, image: Image.Image, tmp_path: Path):
    write_photo(image.resize((80, 60)), tmp_path / "turned.png")
    with Image.open(tmp_path / "turned.png") as opened:
        upright = ImageOps.exif_transpose(opened)
        flat = Image.fromarray(np.asarray(opened))
    of_file = probability(predicting.predict(tmp_path / "turned.png"))
    assert probability(predicting.predict(upright)) == of_file
    ImageOps.exif_transpose(opened, in_place=True)
    assert probability(predicting.predict(opened)) == of_file
    assert probability(predicting.predict(flat)) != of_file


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "1", "LA", "La", "RGBa", "RGBX"])
def test_images_of_all_modes_are_predicted(predicting: LoadedRun, image: Image.Image, mode: str):
    converted = image.convert("RGBA").convert("RGBa") if mode == "RGBa" else image
    converted = image.convert("LA").convert("La") if mode == "La" else converted
    if mode == "LAB":
        converted = Image.frombytes("LAB", image.size, image.tobytes())
    elif mode not in ("RGBa", "La"):
        converted = image.convert(mode)
    assert converted.mode == mode
    assert predicting.predict(converted)["reason"].to_pylist() == [None]


def test_photos_that_fail_have_a_reason_and_the_others_a_label(
    predicting: LoadedRun, image: Image.Image, tmp_path: Path
):
    (tmp_path / "text.jpg").write_text("no photo")
    rows = predicting.predict([tmp_path / "none.jpg", image, tmp_path / "text.jpg", image.resize((8, 8))]).to_pylist()
    assert [row["reason"] for row in rows] == ["unreadable", None, "not_an_image", "too_small"]
    assert [row["label"] is None for row in rows] == [True, False, True, True]
    assert [row["key"] for row in rows] == [f"{tmp_path}/none.jpg", "photo 1", f"{tmp_path}/text.jpg", "photo 3"]


def test_an_image_of_a_closed_file_is_unreadable(predicting: LoadedRun, image: Image.Image, tmp_path: Path):
    image.save(tmp_path / "car.jpg")
    with Image.open(tmp_path / "car.jpg") as closed:
        pass
    (row,) = predicting.predict(closed).to_pylist()
    assert (row["key"], row["reason"]) == (str(tmp_path / "car.jpg"), "unreadable")


def test_the_shown_frame_of_an_animation_is_predicted(predicting: LoadedRun, image: Image.Image, tmp_path: Path):
    image.save(tmp_path / "car.gif", save_all=True, append_images=[Image.new("RGB", image.size, "red")])
    with Image.open(tmp_path / "car.gif") as opened:
        opened.seek(1)
        of_frame, of_copy = (probability(predicting.predict(one)) for one in (opened, opened.copy()))
    assert of_frame == of_copy != probability(predicting.predict(tmp_path / "car.gif"))


def test_more_photos_than_a_batch_keep_their_order(predicting: LoadedRun, image: Image.Image):
    table = predicting.predict([image] * 70)
    assert table["key"].to_pylist() == [f"photo {i}" for i in range(70)]
    assert len(set(table["label"].to_pylist())) == 1


@pytest.fixture
def masking(predicting: LoadedRun, tmp_path: Path) -> LoadedRun:
    """Load the run as if its photos were masked, without photos of no vehicle."""
    predicting.predict([])  # reads the record that is replaced here
    detector = DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30)
    detector = networks.pin_weights(detector, str(tmp_path))
    mask = MaskSettings(detector=detector, exclude=ExcludeSettings(no_vehicle=True)).model_dump(mode="json")
    mask["detector"]["weights"] = mask["detector"].pop("weights_sha256")
    mask["detector"]["architecture"] = networks.architecture_digest(detector)
    reading = {**READING, "max_side": 320}
    changed = dataclasses.replace(
        predicting.preprocessing, reading=reading, mask=mask, detector_weights=detector.weights
    )
    formats.write(f"{predicting.run.uri}/preprocessing.json", "preprocessing", dataclasses.asdict(changed))
    return carclass.load_run(predicting.run.uri)


def test_photos_are_masked_if_those_of_the_run_are(masking: LoadedRun, predicting: LoadedRun):
    pixels, (vehicle, *_) = draw_photo((3, 1), MODELS[1], next(iter(SCENES)))
    (row,) = masking.predict(Image.fromarray(pixels)).to_pylist()
    assert row["outcome"] == "vehicle"
    x1, y1, x2, y2 = mask_to_box(vehicle.mask)
    scale = min(1, 320 / max(pixels.shape))
    assert row["box"] == pytest.approx([x1 * scale, y1 * scale, x2 * scale, y2 * scale], abs=6)
    assert row["top5_probabilities"] != probability(predicting.predict(Image.fromarray(pixels)))


def test_photos_that_masking_excludes_are_not_classified(masking: LoadedRun):
    (row,) = masking.predict(Image.new("RGB", (60, 60), "grey")).to_pylist()
    assert (row["reason"], row["label"], row["probability"]) == ("doubtful_mask", None, None)


def test_no_photos_give_no_rows(predicting: LoadedRun):
    assert len(predicting.predict([])) == 0


@pytest.mark.parametrize(
    ("photos", "error"),
    [
        ([torch.zeros(3, 64, 64)], "photo 0 is of type Tensor"),
        ([b"bytes"], "photo 0 is of type bytes"),
        (b"bytes", "photo 0 is of type bytes"),
        (None, "photo 0 is of type NoneType"),
        (".", "^. is a folder: give a list of its photos"),
        (["car.jpg", np.zeros((9, 9, 3))], "photo 1 is of type ndarray"),
        (Image.fromarray(np.zeros((20, 20), np.float32)), "PIL's mode F"),
        (Image.fromarray(np.zeros((20, 20), np.int32)), "PIL's mode I"),
    ],
)
def test_other_kinds_of_photos_are_refused(predicting: LoadedRun, photos: Any, error: str):
    with pytest.raises(UserError, match=error):
        predicting.predict(photos)


def test_a_run_that_can_no_longer_be_calibrated_is_told_so(predicting: LoadedRun, image: Image.Image):
    """Its dataset is gone: advice to evaluate it would lead nowhere."""
    Path(predicting.run.uri, "frozen", "calibration.json").unlink()
    with pytest.raises(UserError, match=r"which run `first` was trained on, is no longer in .* Restore the dataset"):
        predicting.predict(image)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    runpy.run_path(str(HOUSE / "jobs" / "predict.py"))["main"]()


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "my.yml").write_text(f"root: {tmp_path}\ntrain: {{name: first}}\n")
    return str(tmp_path / "my.yml")


def test_one_photo_is_predicted_by_its_name_with_the_run_of_the_config_file(
    predicting: LoadedRun, image: Image.Image, config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    image.save(tmp_path / "car.png")
    run_command(monkeypatch, str(tmp_path / "car.png"), "--config", config_file)
    (row,) = predicting.predict(tmp_path / "car.png").to_pylist()
    printed = capsys.readouterr().out
    assert printed.startswith("predictions of first\n")
    for name, share in zip(row["top5"], row["top5_probabilities"], strict=True):
        assert f"{share:.3f}  {name}" in printed
    assert not Path(predicting.run.uri, "predictions").exists()


def test_several_photos_are_predicted_by_their_names_and_rejected_below_the_threshold(
    predicting: LoadedRun, image: Image.Image, config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    image.save(tmp_path / "car.png")
    (tmp_path / "text.jpg").write_text("no photo")
    names = [str(tmp_path / name) for name in ("car.png", "text.jpg")]
    run_command(monkeypatch, *names, "--config", config_file, "--threshold", "1")
    _, _, first, second, last = capsys.readouterr().out.splitlines()
    assert last.split(maxsplit=1)[0] == "probabilities"
    assert "(rejected: below the threshold)" in first
    assert "not_an_image" in second


@pytest.mark.parametrize(("temperature", "verdict"), [(TEMPERATURE, "calibrated: "), (1.0, "not calibrated: ")])
def test_one_photo_is_printed_with_the_calibration_of_its_probabilities(
    temperature: float, verdict: str, predicting: LoadedRun, image: Image.Image, config_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    assert predicting.calibration is not None
    write_calibration(
        predicting.run.model_uri("frozen"), dataclasses.replace(predicting.calibration, temperature=temperature)
    )
    image.save(tmp_path / "car.png")
    run_command(monkeypatch, str(tmp_path / "car.png"), "--config", config_file)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split(maxsplit=1)[1].startswith(f"{verdict}temperature {temperature:g}")


def test_the_phases_of_a_prediction_are_logged(
    predicting: LoadedRun, image: Image.Image, config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    image.save(tmp_path / "car.png")
    with caplog.at_level(logging.INFO, "carclass"):
        run_command(monkeypatch, str(tmp_path / "car.png"), "--config", config_file)
    assert [line for line in caplog.messages if line.startswith("predict: ")] == [
        "predict: loading PyTorch",
        "predict: loading the classifier of run first",
        "predict: classifying 1 photo",
    ]


def test_an_option_without_effect_on_single_photos_is_refused(
    predicting: LoadedRun, config_file: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="`--name` has no effect on photos that are named one by one"):
        run_command(monkeypatch, config_file, "--config", config_file, "--name", "monday")


def test_preprocessing_and_temperature_are_parts_of_a_loaded_run(predicting: LoadedRun):
    assert (predicting.preprocessing.reading, predicting.preprocessing.mask) == (READING, None)
    assert predicting.calibration is not None
    assert predicting.calibration.temperature == TEMPERATURE
