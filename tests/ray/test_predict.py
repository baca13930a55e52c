"""Predictions for a folder of photos on a real cluster: every photo once, as evaluation says, killed or not."""

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

from carclass import storage
from carclass.config.schema import (
    DetectorSettings,
    ExcludeSettings,
    MaskSettings,
    ModelSettings,
    PredictSettings,
    TrainSettings,
)
from carclass.data import dataset, publishing
from carclass.errors import UserError
from carclass.masking import mask as masking
from carclass.models import resnet, weights
from carclass.models.preprocessing import decode_photos, to_network_input
from carclass.prediction import calibration, predictions, run_preprocessing
from carclass.prediction.predict import PredictionResult, predict_photos
from carclass.runs.predictor import PredictPhotos
from carclass.runs.run import Run, begin_run, find_run, run_uri
from carclass.runs.saved_model import publish_model, read_model
from carclass.sample.generate import BROKEN_KINDS, ODDITIES
from tests.helpers.clusters import start, wait_for

Rows = list[dict[str, Any]]
MASKED = "v2-to-predict"
RUNS = {"masked": MASKED, "whole": "v1"}
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)
THRESHOLD = 0.3


@pytest.fixture(scope="module", autouse=True)
def two_cpus(ray_cluster: str) -> Iterator[None]:
    """Fewer processes than the tests' cluster would get, as each takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        nodes = [{**node, "Resources": {**node["Resources"], "CPU": 2.0}} for node in ray.nodes() if node["Alive"]]
        patch.setattr(ray, "nodes", lambda: nodes)
        yield


def publish_run(root: str, name: str, source: dataset.Dataset) -> None:
    """A run whose frozen stage is finished: a classifier fitted to the backbone's features of the train photos."""
    torch.manual_seed(1)
    net = resnet.build(MODEL, len(source.classes))
    net.load_state_dict(weights.load("sample", None, sample="backbone.safetensors", key="")[0], strict=False)
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
    settings = TrainSettings(name=name, dataset=source.name, parent="sample", model=MODEL, unfrozen=None)
    this = begin_run(Run(root, settings), source, "0" * 64)
    facts = {"model": MODEL.model_dump(), "classes": source.classes, "precision": "fp32"}
    publish_model(this.best("frozen"), net, facts)


@pytest.fixture(scope="module")
def root(ingested: dataset.Dataset) -> str:
    """A root with a run on masked photos and one on photos as they are."""
    root = ingested.uri.rsplit("/", 2)[0]
    detector = DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30)
    masking.mask_dataset(
        root, MaskSettings(dataset=MASKED, detector=detector, exclude=ExcludeSettings(min_area_fraction=0.2))
    )
    for name, source in RUNS.items():
        publish_run(root, name, dataset.load_dataset(root, source))
    return root


@pytest.fixture(scope="module")
def photos(photos_folder: Path) -> str:
    return str(photos_folder / "photos")


@pytest.fixture(scope="module")
def settings(photos: str) -> PredictSettings:
    return PredictSettings(run="masked", photos=photos, threshold=THRESHOLD, part_rows=8)


@pytest.fixture(scope="module")
def outcome(root: str, settings: PredictSettings) -> PredictionResult:
    return predict_photos(root, settings)


@pytest.fixture(scope="module")
def whole(root: str, photos: str) -> PredictionResult:
    """Predictions of the run on photos as they are."""
    return predict_photos(root, PredictSettings(run="whole", photos=photos))


def rows_of(found: PredictionResult) -> Rows:
    return pq.read_table(Path(found.uri, predictions.TABLE)).to_pylist()


def as_evaluated(root: str, name: str) -> dict[str, np.ndarray]:
    """Calibrated probabilities of the test photos by key, as the evaluation and the kept temperature have them."""
    this = find_run(root, name)
    rows = (
        dataset.load_dataset(root, RUNS[name])
        .read(["key", "label", "split", "image"])
        .filter(pc.field("split") == "test")
    )
    threads = torch.get_num_threads()
    found = PredictPhotos(this.best("frozen"), use_gpu=False)(rows)
    torch.set_num_threads(threads)
    fitted = calibration.read(this.uri, read_model(this.best("frozen"))[1]["sha256"])
    assert fitted is not None
    probabilities = calibration.apply(np.stack(found["probabilities"].to_numpy()), fitted.temperature)
    return dict(zip(found["key"].to_pylist(), probabilities, strict=True))


def assert_same(some: Rows, others: Rows) -> None:
    """Equal rows, but for the last digits of probabilities."""
    numbers = ("probability", "top5_probabilities", "score", "box")
    exact = [[{key: row[key] for key in row if key not in numbers} for row in rows] for rows in (some, others)]
    assert exact[0] == exact[1]
    for one, other in zip(some, others, strict=True):
        for name in numbers:
            assert one[name] == (other[name] if other[name] is None else pytest.approx(other[name], abs=1e-5))


def test_every_photo_comes_out_once(outcome: PredictionResult, whole: PredictionResult, photos: str):
    for found in (outcome, whole):
        assert [row["key"] for row in rows_of(found)] == sorted(storage.list_files(photos))
        assert found.counts.predicted + sum(found.counts.reasons.values()) == found.counts.photos
        assert all((row["label"] is None) == (row["reason"] is not None) for row in rows_of(found))


def test_broken_photos_have_the_reason_that_ingest_gave_them(root: str, outcome: PredictionResult):
    quarantine = publishing.read_written(
        dataset.dataset_uri(root, "v1"), "quarantine", ["key", "reason", "detail"]
    ).to_pylist()
    said = {row["key"]: (row["reason"], row["detail"]) for row in rows_of(outcome) if row["reason"]}
    expected = {
        row["key"]: (row["reason"], row["detail"])
        for row in quarantine
        if row["reason"] in ("truncated", "corrupt", "empty", "not_an_image", "too_small", "unsupported_format")
    }
    assert len(expected) >= len(BROKEN_KINDS) - 1  # all but the missing one
    assert {key: said[key] for key in expected} == expected
    assert len(ODDITIES) > len(expected)


def test_doubtful_masks_are_excluded_as_in_the_runs_dataset(root: str, outcome: PredictionResult):
    quarantine = publishing.read_written(dataset.dataset_uri(root, MASKED), "quarantine", ["key", "detail"]).to_pylist()
    doubted = {row["key"]: row["detail"] for row in rows_of(outcome) if row["reason"] == "doubtful_mask"}
    assert quarantine
    assert {row["key"]: doubted[row["key"]] for row in quarantine} == {row["key"]: row["detail"] for row in quarantine}


def test_the_vehicle_is_where_the_runs_dataset_has_it(root: str, outcome: PredictionResult):
    columns = ["outcome", "vehicle_class", "score", "box"]
    found = {row["key"]: row for row in rows_of(outcome)}
    keys = [key for key in dataset.load_dataset(root, MASKED).read(["key"])["key"].to_pylist() if key in found]
    assert any(found[key]["box"] for key in keys)
    for row in dataset.load_dataset(root, MASKED).rows(keys, columns):
        assert {name: found[row["key"]][name] for name in columns} == {name: row[name] for name in columns}


@pytest.mark.parametrize("name", [*RUNS])
def test_predictions_are_those_of_the_evaluation(
    root: str, name: str, outcome: PredictionResult, whole: PredictionResult
):
    found = {row["key"]: row for row in rows_of(outcome if name == "masked" else whole)}
    classes = dataset.load_dataset(root, RUNS[name]).classes
    for key, probabilities in as_evaluated(root, name).items():
        order = np.argsort(-probabilities)[:5]
        assert found[key]["top5_probabilities"] == pytest.approx(probabilities[order].tolist(), abs=1e-4)
        assert probabilities[classes.index(found[key]["label"])] == pytest.approx(found[key]["probability"], abs=1e-4)


def test_what_is_below_the_threshold_is_rejected(outcome: PredictionResult):
    rows = [row for row in rows_of(outcome) if row["label"]]
    assert [row["rejected"] for row in rows] == [row["probability"] < THRESHOLD for row in rows]
    assert 0 < outcome.counts.rejected < outcome.counts.predicted


def test_the_temperature_is_fitted_on_all_val_photos_and_kept(root: str, outcome: PredictionResult):
    this = find_run(root, "masked")
    fitted = calibration.read(this.uri, read_model(this.best("frozen"))[1]["sha256"])
    assert fitted == outcome.calibration
    assert fitted.num_photos == dataset.load_dataset(root, MASKED).manifest["splits"]["val"]
    assert fitted.log_loss_after <= fitted.log_loss_before


def test_photos_that_are_not_masked_have_no_box(whole: PredictionResult):
    assert {(row["outcome"], row["box"]) for row in rows_of(whole)} == {(None, None)}


def test_a_second_run_writes_nothing(
    root: str, settings: PredictSettings, outcome: PredictionResult, files_below: Callable[[str], Any]
):
    before = files_below(root)
    assert predict_photos(root, settings) == outcome
    assert files_below(root) == before


def test_other_settings_under_the_same_name_are_refused(
    root: str, settings: PredictSettings, outcome: PredictionResult, tmp_path: Path
):
    shutil.copy(Path(settings.photos, sorted(os.listdir(settings.photos))[0]), tmp_path)
    with pytest.raises(UserError, match=r"other settings \(threshold\)\. Choose another `predict.name`"):
        predict_photos(root, settings.model_copy(update={"threshold": 0.9}))
    with pytest.raises(UserError, match=r"other settings \(list of photos, photos\)"):
        predict_photos(root, settings.model_copy(update={"photos": str(tmp_path)}))


def test_a_killed_job_does_what_is_missing_and_ends_as_an_undisturbed_one(
    root: str, settings: PredictSettings, outcome: PredictionResult, ray_cluster: str, tmp_path: Path,
    files_below: Callable[[str], Any],
):  # fmt: skip
    given = settings.model_copy(update={"name": "killed", "part_rows": 4})
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({"root": root, "predict": given.model_dump(mode="json")}))
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    parts = Path(outcome.uri).with_name("killed") / "parts"
    job = start("predict.py", file, environment)
    wait_for(lambda: len(list(parts.glob("*.parquet"))) >= 2, job.process, job.log)
    job.process.kill()
    job.process.wait(timeout=60)
    before = files_below(str(parts))
    assert not parts.with_name(predictions.TABLE).exists()
    found = predict_photos(root, given)
    after = files_below(str(parts))
    assert {path: after.get(path) for path in before} == before
    assert_same(rows_of(found), rows_of(outcome))


def test_an_archive_gives_what_its_folder_gives(root: str, photos: str, whole: PredictionResult, tmp_path: Path):
    archive = shutil.make_archive(str(tmp_path / "photos"), "gztar", photos)
    packed = PredictSettings(run="whole", photos=archive, name="packed")
    assert_same(rows_of(predict_photos(root, packed)), rows_of(whole))


def test_a_run_outlives_its_datasets(root: str, outcome: PredictionResult, settings: PredictSettings, tmp_path: Path):
    """What prediction needs of them was kept; a run without it says what is missing."""
    shutil.copytree(run_uri(root, "masked"), run_uri(str(tmp_path), "masked"))
    assert predict_photos(str(tmp_path), settings)._replace(uri=outcome.uri) == outcome
    copy, original = (find_run(place, "masked") for place in (str(tmp_path), root))
    assert run_preprocessing.run_preprocessing(copy) == run_preprocessing.run_preprocessing(original)
    for file in (calibration.FILE, run_preprocessing.FILE):
        Path(run_uri(str(tmp_path), "masked"), file).unlink()
        with pytest.raises(UserError, match=f"dataset `{MASKED}`, which run `masked` was trained on, is no longer in"):
            predict_photos(str(tmp_path), settings)


def test_detector_weights_are_those_of_the_dataset_or_refused(root: str, tmp_path: Path):
    known = run_preprocessing.run_preprocessing(find_run(root, "masked"))
    assert known.detector_weights == "sample"
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"`predict\.detector_weights`: .* has sha256 .*, expected"):
        known.masking(root, str(tmp_path / "other.safetensors"))
    forgotten = run_preprocessing.Preprocessing(known.reading, known.mask, None)
    with pytest.raises(UserError, match=r"Set `predict\.detector_weights` to the URI of the file with sha256"):
        forgotten.masking(root, None)


def test_mistakes_are_told(root: str, settings: PredictSettings, tmp_path: Path):
    with pytest.raises(UserError, match=r"`predict\.run` is missing"):
        predict_photos(root, settings.model_copy(update={"run": None}))
    with pytest.raises(UserError, match=r"no run `other` in .* There: "):
        predict_photos(root, settings.model_copy(update={"run": "other"}))
    with pytest.raises(UserError, match=r"`predict\.photos`: no files in"):
        predict_photos(root, settings.model_copy(update={"photos": str(tmp_path)}))
