"""Prediction jobs on a Ray cluster: complete, equal to the evaluation, and resumable."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml

import carclass
from carclass import storage
from carclass.config.schema import ModelSettings, PredictSettings
from carclass.data import dataset, publishing
from carclass.data.photo import decode_photos
from carclass.errors import UserError
from carclass.evaluation import calibration
from carclass.evaluation.calibrate import calibrate_run
from carclass.models import architectures, weights
from carclass.models.preprocessing import to_network_input
from carclass.prediction import few_photos, predictions
from carclass.prediction.detector_weights import mask_settings
from carclass.prediction.predict import PredictionResult, predict_photos
from carclass.runs import calibration_record, preprocessing_record
from carclass.runs.calibration_record import read_calibration
from carclass.runs.predictor import Predictor
from carclass.runs.run import find_run, run_uri
from carclass.runs.saved_model import read_model
from carclass.sample.generate import BROKEN_KINDS, ODDITIES
from tests.helpers.clusters import start, wait_for
from tests.helpers.own_cluster import treated_as_own
from tests.helpers.runs import publish_frozen_run

Rows = list[dict[str, Any]]
RUNS = {"masked": "v2", "unmasked": "v1"}
both_runs = pytest.mark.parametrize("name", ["masked", pytest.param("unmasked", marks=pytest.mark.slow)])  # 15 s
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)
THRESHOLD = 0.7


@pytest.fixture(scope="module", autouse=True)
def two_cpus(ray_cluster: str) -> Iterator[None]:
    """Report two CPUs per node, for fewer actors, as each takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        nodes = [{**node, "Resources": {**node["Resources"], "CPU": 2.0}} for node in ray.nodes() if node["Alive"]]
        patch.setattr(ray, "nodes", lambda: nodes)
        yield


def publish_run(root: str, name: str, source: dataset.Dataset) -> None:
    """Publish a run with a finished frozen stage: a head fitted to the backbone's features of the train photos."""
    torch.manual_seed(1)
    net = architectures.build(MODEL, len(source.classes))
    net.load_state_dict(weights.load_weights("sample", None, sample="backbone.safetensors", key="")[0], strict=False)
    rows = source.read(["split", "label", "image"]).filter(pc.field("split") == "train")
    labels = torch.tensor([source.classes.index(label) for label in rows["label"].to_pylist()])
    head, net.fc = net.fc[1], torch.nn.Identity()
    with torch.no_grad():
        features = net.eval()(
            to_network_input(decode_photos(rows["image"].to_pylist(), MODEL.image_size), torch.device("cpu"))
        )
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    net.fc = torch.nn.Sequential(torch.nn.Dropout(0.2), head)
    publish_frozen_run(root, source, name, MODEL, net)


@pytest.fixture(scope="module", autouse=True)
def runs(root: str, ingested: dataset.Dataset, masked: dataset.Dataset) -> None:
    """Publish a run on masked photos and one on unmasked photos; calibrate the first in this process."""
    publish_run(root, "masked", masked)
    publish_run(root, "unmasked", ingested)
    run = find_run(root, "masked")
    with treated_as_own():
        calibrate_run(run, run.model_uri("frozen"), run.model_facts("frozen"), batch_size=64)


@pytest.fixture(scope="module")
def photos(photos_folder: Path) -> str:
    return str(photos_folder / "photos")


@pytest.fixture(scope="module")
def settings(photos: str) -> PredictSettings:
    return PredictSettings(run="masked", photos=photos, threshold=THRESHOLD, part_rows=8)


@pytest.fixture(scope="module")
def predicted(root: str, settings: PredictSettings) -> PredictionResult:
    """Predictions of the run on masked photos."""
    return predict_photos(root, settings)


@pytest.fixture(scope="module")
def unmasked(root: str, photos: str) -> PredictionResult:
    """Predictions of the run on unmasked photos."""
    return predict_photos(root, PredictSettings(run="unmasked", photos=photos))


@pytest.fixture
def result(name: str, request: pytest.FixtureRequest) -> PredictionResult:
    """Predictions of the run of a parametrized name."""
    fixture: PredictionResult = request.getfixturevalue("predicted" if name == "masked" else name)
    return fixture


def rows_of(result: PredictionResult) -> Rows:
    return pq.read_table(Path(result.uri, predictions.TABLE)).to_pylist()


def evaluated_probabilities(root: str, name: str) -> dict[str, np.ndarray]:
    """Return calibrated probabilities of the test photos by key, from the evaluation and the stored temperature."""
    run = find_run(root, name)
    rows = (
        dataset.load_dataset(root, RUNS[name])
        .read(["key", "label", "split", "image"])
        .filter(pc.field("split") == "test")
    )
    probabilities = Predictor(run.model_uri("frozen"), use_gpu=False).probabilities(rows["image"].to_pylist())
    fitted = read_calibration(run.model_uri("frozen"), read_model(run.model_uri("frozen"))[1]["sha256"])
    assert fitted is not None
    calibrated = calibration.apply_temperature(probabilities, fitted.temperature)
    return dict(zip(rows["key"].to_pylist(), calibrated, strict=True))


def assert_equal_rows(actual: Rows, expected: Rows) -> None:
    """Assert that rows are equal up to the last digits of numbers."""
    numbers = ("probability", "top5_probabilities", "score", "box")
    exact = [[{key: row[key] for key in row if key not in numbers} for row in rows] for rows in (actual, expected)]
    assert exact[0] == exact[1]
    for row, other in zip(actual, expected, strict=True):
        for name in numbers:
            assert row[name] == (other[name] if other[name] is None else pytest.approx(other[name], abs=1e-5, rel=1e-6))


@both_runs
def test_every_photo_is_listed_once(result: PredictionResult, photos: str):
    assert [row["key"] for row in rows_of(result)] == sorted(storage.list_files(photos))
    assert result.counts.predicted + sum(result.counts.reasons.values()) == result.counts.files
    assert all((row["label"] is None) == (row["reason"] is not None) for row in rows_of(result))


def test_broken_photos_have_the_same_reason_as_in_ingestion(root: str, predicted: PredictionResult):
    quarantine = publishing.read_written(
        dataset.dataset_uri(root, "v1"), "quarantine", ["key", "reason", "detail"]
    ).to_pylist()
    actual = {row["key"]: (row["reason"], row["detail"]) for row in rows_of(predicted) if row["reason"]}
    expected = {
        row["key"]: (row["reason"], row["detail"])
        for row in quarantine
        if row["reason"] in ("truncated", "corrupt", "empty", "not_an_image", "too_small", "unsupported_format")
    }
    assert len(expected) >= len(BROKEN_KINDS) - 1  # all but the missing one
    assert {key: actual[key] for key in expected} == expected
    assert len(ODDITIES) > len(expected)


def test_doubtful_masks_are_excluded_as_in_the_runs_dataset(masked: dataset.Dataset, predicted: PredictionResult):
    quarantine = publishing.read_written(masked.uri, "quarantine", ["key", "detail"]).to_pylist()
    excluded = {row["key"]: row["detail"] for row in rows_of(predicted) if row["reason"] == "doubtful_mask"}
    assert quarantine
    assert {row["key"]: excluded[row["key"]] for row in quarantine} == {row["key"]: row["detail"] for row in quarantine}


def test_detections_equal_those_in_the_runs_dataset(masked: dataset.Dataset, predicted: PredictionResult):
    columns = ["outcome", "vehicle_class", "score", "box"]
    rows = {row["key"]: row for row in rows_of(predicted)}
    keys = [key for key in masked.read(["key"])["key"].to_pylist() if key in rows]
    assert any(rows[key]["box"] for key in keys)
    for row in masked.rows(keys, columns):
        assert {name: rows[row["key"]][name] for name in columns} == {name: row[name] for name in columns}


@both_runs
def test_predictions_equal_the_evaluation(root: str, name: str, result: PredictionResult):
    predicted = {row["key"]: row for row in rows_of(result)}
    classes = dataset.load_dataset(root, RUNS[name]).classes
    for key, probabilities in evaluated_probabilities(root, name).items():
        order = np.argsort(-probabilities)[:5]
        assert predicted[key]["top5_probabilities"] == pytest.approx(probabilities[order].tolist(), abs=1e-4)
        assert probabilities[classes.index(predicted[key]["label"])] == pytest.approx(
            predicted[key]["probability"], abs=1e-4
        )


@both_runs
def test_a_loaded_run_predicts_in_process_as_the_job(root: str, name: str, result: PredictionResult, photos: str):
    rows = [{key: row[key] for key in row if key != "rejected"} for row in rows_of(result)]
    some = [row for row in rows if row["reason"] not in ("junk", "bad_name")][::4]
    loaded = carclass.load_run(run_uri(root, name)).predict(storage.join(photos, row["key"]) for row in some)
    keys = [key.removeprefix(f"{photos}/") for key in loaded["key"].to_pylist()]
    assert_equal_rows([row | {"key": key} for row, key in zip(loaded.to_pylist(), keys, strict=True)], some)


def test_predictions_below_the_threshold_are_rejected(predicted: PredictionResult):
    rows = [row for row in rows_of(predicted) if row["label"]]
    assert [row["rejected"] for row in rows] == [row["probability"] < THRESHOLD for row in rows]
    assert 0 < predicted.counts.rejected < predicted.counts.predicted


def test_the_temperature_is_fitted_on_all_val_photos_and_stored(
    root: str, masked: dataset.Dataset, predicted: PredictionResult
):
    run = find_run(root, "masked")
    fitted = read_calibration(run.model_uri("frozen"), read_model(run.model_uri("frozen"))[1]["sha256"])
    assert fitted == predicted.calibration
    assert fitted.num_photos == masked.manifest["splits"]["val"]
    assert fitted.log_loss_after <= fitted.log_loss_before


@pytest.mark.slow  # 15 s with its fixture
def test_unmasked_photos_have_no_box(unmasked: PredictionResult):
    assert {(row["outcome"], row["box"]) for row in rows_of(unmasked)} == {(None, None)}


def test_a_repeated_job_writes_nothing(
    root: str, settings: PredictSettings, predicted: PredictionResult, files_below: Callable[[str], Any]
):
    before = files_below(root)
    assert predict_photos(root, settings) == predicted
    assert files_below(root) == before


def test_other_settings_under_the_same_name_are_rejected(
    root: str, settings: PredictSettings, predicted: PredictionResult, tmp_path: Path
):
    shutil.copy(Path(settings.photos, sorted(os.listdir(settings.photos))[0]), tmp_path)
    with pytest.raises(UserError, match=r"other settings \(photos\)\. Choose another name \(--name\)"):
        predict_photos(root, settings.model_copy(update={"photos": str(tmp_path)}))


def test_another_threshold_is_applied_without_predicting_again(
    root: str, settings: PredictSettings, predicted: PredictionResult, files_below: Callable[[str], Any]
):
    files, rows = files_below(f"{predicted.uri}/parts"), rows_of(predicted)
    page = Path(predicted.uri, predictions.PAGE).read_bytes()
    strict = predict_photos(root, settings.model_copy(update={"threshold": 1.0}))
    assert (strict.uri, strict.counts.rejected) == (predicted.uri, strict.counts.predicted)
    assert files_below(f"{predicted.uri}/parts") == files
    predict_photos(root, settings)
    assert rows_of(predicted) == rows
    assert Path(predicted.uri, predictions.PAGE).read_bytes() == page


@both_runs
def test_the_page_shows_every_predicted_photo(name: str, result: PredictionResult):
    page = Path(result.uri, predictions.PAGE).read_text(encoding="utf-8")
    assert f"<h1>Run {name}: predictions</h1>" in page
    num_cutouts = sum(row["outcome"] == "vehicle" and row["label"] is not None for row in rows_of(result))
    assert page.count("<figure data-class=") == result.counts.predicted
    assert page.count('alt="cut out for the classifier"') == num_cutouts
    assert (num_cutouts > 0) == (name == "masked")


@pytest.mark.slow  # 25 s with its fixture
@pytest.mark.usefixtures("own_cluster")
@pytest.mark.parametrize("source", ["folder", "archive"])
def test_few_photos_are_predicted_without_a_cluster_as_on_one(
    root: str, photos: str, unmasked: PredictionResult, source: str, tmp_path: Path
):
    place = photos if source == "folder" else shutil.make_archive(str(tmp_path / "photos"), "gztar", photos)
    alone = predict_photos(
        root, PredictSettings(run="unmasked", photos=place, name=f"alone-{source}", part_rows=30, batch_size=16)
    )
    assert_equal_rows(rows_of(alone), rows_of(unmasked))
    assert len(list(Path(alone.uri, "parts").iterdir())) >= 2


@pytest.mark.slow  # 30 s
def test_a_process_that_was_killed_in_its_attempt_is_followed_by_a_cluster(
    root: str, photos: str, unmasked: PredictionResult, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
):  # fmt: skip
    settings = PredictSettings(run="unmasked", photos=photos, name="crashed")
    file, folder = tmp_path / "config.yml", Path(unmasked.uri).with_name("crashed")
    file.write_text(yaml.safe_dump({"root": root, "predict": settings.model_dump(mode="json")}))
    job = start("predict.py", file, {key: value for key, value in os.environ.items() if not key.startswith("RAY_")})
    wait_for((folder / few_photos.ATTEMPT).exists, job.process, job.log)
    job.process.kill()
    job.process.wait(timeout=60)
    request.getfixturevalue("own_cluster")
    result = predict_photos(root, settings)
    assert "on a cluster, photos that crash their process are set aside" in caplog.text
    assert_equal_rows(rows_of(result), rows_of(unmasked))


@pytest.mark.usefixtures("own_cluster")
def test_new_and_changed_photos_of_a_folder_are_predicted_alone(
    root: str, settings: PredictSettings, predicted: PredictionResult, tmp_path: Path
):
    by_key = {row["key"]: row for row in rows_of(predicted) if row["label"]}
    kept, changed, new = [key for key in by_key if "/" not in key][:3]
    box = settings.model_copy(update={"photos": str(tmp_path), "name": "box"})
    for key in (kept, changed):
        shutil.copy(Path(settings.photos, key), tmp_path)
    predict_photos(root, box)
    shutil.copy(Path(settings.photos, new), tmp_path)
    shutil.copy(Path(settings.photos, new), tmp_path / changed)
    result = predict_photos(root, box)
    expected = [by_key[kept], {**by_key[new], "key": changed}, by_key[new]]
    assert_equal_rows(rows_of(result), sorted(expected, key=lambda row: row["key"]))
    parts = [pq.read_table(path)["key"].to_pylist() for path in Path(result.uri, "parts").iterdir()]
    assert sorted(map(sorted, parts)) == sorted([[kept], sorted([changed, new])])


@pytest.mark.nightly  # 25 s
def test_a_killed_job_resumes_with_the_same_result(
    root: str, settings: PredictSettings, predicted: PredictionResult, ray_cluster: str, tmp_path: Path,
    files_below: Callable[[str], Any],
):  # fmt: skip
    killed = settings.model_copy(update={"name": "killed", "part_rows": 4})
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({"root": root, "predict": killed.model_dump(mode="json")}))
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    parts = Path(predicted.uri).with_name("killed") / "parts"
    job = start("predict.py", file, environment)
    wait_for(lambda: len(list(parts.glob("*.parquet"))) >= 2, job.process, job.log)
    job.process.kill()
    job.process.wait(timeout=60)
    before = {path: stat for path, stat in files_below(str(parts)).items() if path.endswith(".parquet")}
    assert not parts.with_name(predictions.TABLE).exists()
    result = predict_photos(root, killed)
    after = files_below(str(parts))
    assert {path: after.get(path) for path in before} == before
    assert_equal_rows(rows_of(result), rows_of(predicted))


@pytest.mark.slow  # 20 s
def test_an_archive_gives_the_predictions_of_its_folder(
    root: str, photos: str, unmasked: PredictionResult, tmp_path: Path
):
    archive = shutil.make_archive(str(tmp_path / "photos"), "gztar", photos)
    packed = PredictSettings(run="unmasked", photos=archive, name="packed")
    assert_equal_rows(rows_of(predict_photos(root, packed)), rows_of(unmasked))


@pytest.mark.slow  # 15 s
def test_a_run_predicts_without_its_datasets(
    root: str, predicted: PredictionResult, settings: PredictSettings, tmp_path: Path
):
    """Predict from the stored calibration and preprocessing; without either, name the missing dataset."""
    shutil.copytree(run_uri(root, "masked"), run_uri(str(tmp_path), "masked"))
    assert predict_photos(str(tmp_path), settings)._replace(uri=predicted.uri) == predicted
    copy, original = (find_run(folder, "masked") for folder in (str(tmp_path), root))
    assert preprocessing_record.load_preprocessing(copy) == preprocessing_record.load_preprocessing(original)
    for file in (f"frozen/{calibration_record.FILE}", preprocessing_record.FILE):
        Path(run_uri(str(tmp_path), "masked"), file).unlink()
        with pytest.raises(UserError, match="dataset `v2`, which run `masked` was trained on, is no longer in"):
            predict_photos(str(tmp_path), settings)


def test_detector_weights_must_be_those_of_the_dataset(root: str, tmp_path: Path):
    stored = preprocessing_record.load_preprocessing(find_run(root, "masked"))
    assert stored.detector_weights == "sample"
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"`predict\.detector_weights`: .* has sha256 .*, expected"):
        mask_settings(stored, root, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"Set `predict\.detector_weights` to the URI of the file with sha256"):
        mask_settings(dataclasses.replace(stored, detector_weights=None), root)


def test_errors_name_the_setting(root: str, settings: PredictSettings, tmp_path: Path):
    with pytest.raises(UserError, match=r"`predict\.run` is missing"):
        predict_photos(root, settings.model_copy(update={"run": None}))
    with pytest.raises(UserError, match=r"no run `other` in .* Available: "):
        predict_photos(root, settings.model_copy(update={"run": "other"}))
    with pytest.raises(UserError, match=r"`predict\.photos`: no files in"):
        predict_photos(root, settings.model_copy(update={"photos": str(tmp_path)}))
