"""The chain of jobs on a small sample: ingest, mask, train and evaluate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from carclass import storage
from carclass.config.schema import (
    CutoutSettings,
    EvaluateSettings,
    ExcludeSettings,
    FrozenSettings,
    MaskSettings,
    ModelSettings,
    TrainSettings,
    UnfrozenSettings,
)
from carclass.data import dataset
from carclass.data.photo import decode
from carclass.errors import UserError
from carclass.evaluation.calibrate import calibrate_run
from carclass.evaluation.collect import NUM_MASKING_SAMPLES
from carclass.evaluation.evaluate import Evaluation, evaluate_run
from carclass.masking import quality
from carclass.masking.mask import mask_dataset
from carclass.models.weights import load_weights
from carclass.runs.calibration_record import read_calibration
from carclass.runs.run import Run, begin_run, run_uri
from carclass.runs.saved_model import read_model
from carclass.training.photo_store import PhotoStore
from carclass.training.train import all_resources, load_run_inputs, train_run, train_stages
from tests.helpers.browser import BROWSER, open_page
from tests.helpers.own_cluster import treated_as_own

Rows = list[dict[str, Any]]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)


def train_settings(name: str, **changes: object) -> TrainSettings:
    settings = TrainSettings(
        name=name,
        dataset="v2",
        parent="sample",
        model=MODEL,
        frozen=FrozenSettings(epochs=4, batch_size=16),
        unfrozen=UnfrozenSettings(epochs=2, batch_size=16, lr=1e-3),
    )
    return settings.model_copy(update=changes)


@pytest.fixture(scope="module")
def run(root: str, masked: dataset.Dataset) -> Run:
    """Train the frozen stage in this process and resume with two workers, whose start takes many seconds a stage."""
    with treated_as_own():
        begun = train_settings("two-workers")
        source, parent_sha256 = load_run_inputs(root, begun)
        first = begin_run(Run(root, begun), source, parent_sha256)
        train_stages(
            first, source, PhotoStore(begun, source).get, all_resources(begun, use_gpu=False), first.stages[:1]
        )
    return train_run(root, train_settings("two-workers", num_workers=2))


@pytest.fixture(scope="module")
def evaluation(root: str, run: Run) -> Evaluation:
    """Classify the test photos on the cluster, with a calibration fitted in this process."""
    uri = run.model_uri(run.best_stage)
    with treated_as_own():
        calibrate_run(run, uri, run.model_facts(run.best_stage), batch_size=64)
    return evaluate_run(root, EvaluateSettings(run="two-workers"))


def test_every_photo_is_masked_or_excluded_once(
    ingested: dataset.Dataset, masked: dataset.Dataset, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    rows, quarantine = contents(masked)
    assert rows
    assert quarantine
    assert sorted(row["key"] for row in rows + quarantine) == sorted(ingested.read(["key"])["key"].to_pylist())
    assert masked.manifest["inputs"] == masked.manifest["rows"] + len(quarantine) == ingested.manifest["rows"]


def test_masks_match_the_drawn_truth(masked: dataset.Dataset, photos_folder: Path):
    assert quality.mean_iou(masked, str(photos_folder / "truth.json"), "test") >= 0.9


def test_masked_photos_are_crops_on_the_fill_colour(masked: dataset.Dataset):
    keys = masked.read(["key", "outcome"]).filter(pc.field("outcome") == "vehicle")["key"].to_pylist()[:5]
    for row in masked.rows(keys, ["image", "width", "height", "source_width"]):
        pixels = decode(row["image"])
        assert pixels.shape == (row["height"], row["width"], 3)
        # A corner of the box is background; JPEG moves a plain colour by a few levels at most.
        assert np.abs(pixels[0, 0].astype(int) - CutoutSettings().fill).max() <= 8


@pytest.mark.slow  # 10 s
def test_limit_is_the_number_of_masked_photos(root: str, mask_settings: MaskSettings):
    changes = {"dataset": "few", "limit": 7, "num_actors": 1, "exclude": ExcludeSettings(), "truth": None}
    limited = mask_dataset(root, mask_settings.model_copy(update=changes))
    assert limited.manifest["rows"] == limited.manifest["inputs"] == 7


def test_a_second_masking_run_writes_nothing(
    root: str, masked: dataset.Dataset, mask_settings: MaskSettings, files_below: Callable[[str], Any]
):
    before = files_below(root)
    mask_dataset(root, mask_settings)
    assert files_below(root) == before


def test_both_stages_log_metrics_for_every_epoch(run: Run):
    assert [(row["stage"], row["epoch"]) for row in run.metrics()] == [
        *(("frozen", epoch) for epoch in (1, 2, 3, 4)),
        *(("unfrozen", epoch) for epoch in (1, 2)),
    ]


def test_a_run_has_the_files_of_its_contract(run: Run):
    files = storage.list_files(run.uri)
    for expected in (
        "config.yml",
        "lineage.json",
        "preprocessing.json",
        "metrics.jsonl",
        "frozen/best.safetensors",
        "unfrozen/best.json",
        "model.json",
    ):
        assert expected in files
    assert any(path.startswith("tensorboard/unfrozen/events.out") for path in files)


def test_best_and_latest_checkpoints_are_kept(run: Run):
    kept = {path.split("/")[1] for path in storage.list_files(run.uri) if path.endswith("/checkpoint.json")}
    assert 2 <= len(kept) <= 5  # two best and the latest, in either stage
    assert "epoch-0002" in kept


def test_a_ray_train_run_is_named_after_run_and_stage(run: Run):
    """Look for the folder that Ray Train names after its run."""
    folders = {
        path.split("/")[-2] for path in storage.list_files(run.uri) if path.endswith("/.validate_storage_marker")
    }
    assert folders == {"two-workers-unfrozen"}


def test_the_frozen_stage_does_not_change_the_backbone(run: Run):
    trained, _ = read_model(run.model_uri("frozen"))
    parent, _ = load_weights("sample", None, sample="backbone.safetensors", key="train.parent")
    assert (trained["layer4.0.conv1.weight"] == parent["layer4.0.conv1.weight"].float()).all()


def test_the_unfrozen_stage_changes_the_backbone(run: Run):
    frozen, unfrozen = (read_model(run.model_uri(stage))[0] for stage in ("frozen", "unfrozen"))
    assert not (frozen["layer4.0.conv1.weight"] == unfrozen["layer4.0.conv1.weight"]).all()


def test_a_finished_run_is_not_modified(root: str, run: Run):
    before = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*")}
    train_run(root, train_settings("two-workers", num_workers=2))
    assert {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*")} == before


def test_a_run_name_with_other_settings_is_refused(root: str, run: Run):
    with pytest.raises(UserError, match=r"begun with other settings \(seed\)"):
        train_run(root, train_settings("two-workers", num_workers=2, seed=7))


def test_missing_gpus_are_a_user_error(root: str, masked: dataset.Dataset):
    with pytest.raises(UserError, match=r"`train.use_gpu` asks for 1 GPU"):
        train_run(root, train_settings("on-gpus", use_gpu=True))


def test_more_workers_than_cpus_are_a_user_error(root: str, masked: dataset.Dataset):
    with pytest.raises(UserError, match=r"`train.num_workers` needs 500 CPUs"):
        train_run(root, train_settings("many", num_workers=500))


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(root: str, masked: dataset.Dataset):
    with pytest.raises(UserError, match=r"`train.unfrozen.batch_size`: 1000000 photos of 64 pixels .* Up to \d+ fit"):
        train_run(root, train_settings("huge", unfrozen=UnfrozenSettings(batch_size=10**6)))
    assert not Path(run_uri(root, "huge")).exists()


def test_every_test_photo_is_classified_once(masked: dataset.Dataset, evaluation: Evaluation):
    predictions = pq.read_table(Path(evaluation.report_uri).parent / "predictions.parquet")
    tested = masked.read(["key", "split"]).filter(pc.field("split") == "test")
    assert predictions["key"].to_pylist() == sorted(tested["key"].to_pylist())


def test_the_stored_metrics_match_the_predictions(evaluation: Evaluation):
    folder = Path(evaluation.report_uri).parent
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    hits = [label == predicted for label, predicted in zip(table["label"], table["predicted"], strict=True)]
    assert json.loads((folder / "metrics.json").read_text())["accuracy"] == pytest.approx(np.mean(hits))


def test_metrics_name_the_model_the_photos_and_the_temperature(run: Run, evaluation: Evaluation):
    metrics, facts = evaluation.metrics, run.model_facts(run.best_stage)
    assert (metrics["dataset"], metrics["split"]) == ("v2", "test")
    assert metrics["model_sha256"] == facts["sha256"]
    calibration = read_calibration(run.model_uri(run.best_stage), facts["sha256"])
    assert calibration is not None
    assert metrics["temperature"] == calibration.temperature


@pytest.mark.usefixtures("own_cluster")
def test_validation_and_evaluation_agree(root: str, run: Run, masked: dataset.Dataset):
    on_val = evaluate_run(root, EvaluateSettings(run="two-workers", split="val"))
    val_photos = masked.manifest["splits"]["val"]
    # One prediction may differ: batches of other sizes round differently in bf16.
    assert on_val.accuracy == pytest.approx(run.best_val_accuracy(run.best_stage), abs=1.01 / val_photos)


def test_the_report_shows_photos_before_and_after_masking(evaluation: Evaluation):
    page = Path(evaluation.report_uri).read_text()
    assert page.count("data:image/jpeg;base64,") >= 2 * NUM_MASKING_SAMPLES


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_report_opens_in_a_browser_with_a_silent_console(evaluation: Evaluation, tmp_path: Path):
    _, console = open_page(Path(evaluation.report_uri).read_text(), tmp_path)
    assert console == []
