"""Contents of an evaluation report: quarantine of all jobs, calibrated probabilities, folder by model."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from carclass import storage
from carclass.config.schema import EvaluateSettings, TrainSettings
from carclass.data import dataset, publishing
from carclass.evaluation import calibrate, calibration, collect
from carclass.evaluation.evaluate import evaluate_run
from carclass.evaluation.target import describe_difference
from carclass.runs.report_record import report_uri
from tests.helpers.evaluated_run import publish_evaluated_run
from tests.helpers.runs import FROZEN, MODEL, begin, finish, publish_dataset


def publish(root: Path, name: str, reasons: dict[str, int], **manifest: Any) -> dataset.Dataset:
    """Publish a dataset without photos."""
    number = sum(reasons.values())
    counts = {"inputs": number, "rows": 0, "quarantined": number, "splits": {}, "reasons": reasons}
    facts = {"classes": ["a", "b"], **counts, "parts": {}, "quarantine": {}, "listing": "", "format": 2}
    complete = dataset.Dataset(dataset.dataset_uri(str(root), name), {**facts, **manifest})
    return publishing.publish_manifest(complete, dataset.find_dataset(str(root), name))


@pytest.fixture
def masked(tmp_path: Path) -> dataset.Dataset:
    """Publish a dataset and one masked from it, with different reasons in their quarantines."""
    source = publish(tmp_path, "v1", {"truncated": 3, "crashed": 1}, kind="photos", settings={})
    made_from = {"settings": {"source": "v1"}, "source_digest": source.digest}
    return publish(tmp_path, "v2", {"doubtful_mask": 2, "crashed": 1}, kind="masked", **made_from)


def test_photos_quarantined_by_ingest_and_by_masking_are_both_listed(masked: dataset.Dataset):
    assert collect.quarantined(masked) == {
        "v1 (ingest)": {"truncated": 3, "crashed": 1},
        "v2 (masking)": {"doubtful_mask": 2, "crashed": 1},
    }


def test_the_quarantine_of_a_source_that_has_changed_is_left_out(masked: dataset.Dataset, tmp_path: Path):
    publish(tmp_path, "v1", {"truncated": 9}, kind="photos", settings={}, classes=["a", "c"])
    assert [*collect.quarantined(masked)] == ["v2 (masking)"]


def test_the_quarantine_of_a_source_that_is_gone_is_left_out(masked: dataset.Dataset, tmp_path: Path):
    storage.delete_folder(f"{tmp_path}/datasets/v1")
    assert [*collect.quarantined(masked)] == ["v2 (masking)"]


@pytest.mark.parametrize(("sampling", "facts"), [("uniform", []), ("balanced", ["balanced: each class equally often"])])
def test_a_report_names_balanced_sampling(tmp_path: Path, sampling: str, facts: list[str]):
    source = publish_dataset(tmp_path, splits={"test": 1})
    run = begin(tmp_path, TrainSettings(name="x", sampling=sampling, **FROZEN))
    finish(run)
    rows = collect._facts(run, source, EvaluateSettings(), run.model_facts("frozen"))
    assert [value for name, value in rows if name == "Sampling"] == facts


def test_probabilities_of_a_report_are_calibrated_as_those_of_predictions():
    raw = np.array([[0.9, 0.1], [0.4, 0.6]], np.float32)
    columns = {"key": ["a", "b"], "label": ["x", "y"], "predicted": ["x", "y"], "confidence": [0.9, 0.6]}
    table = pa.table({**columns, "probabilities": pa.array([*raw])})
    calibrated = calibrate.calibrate_predictions(table, 2.0)
    expected = calibration.apply_temperature(raw, 2.0)
    assert np.stack(calibrated["probabilities"].to_numpy()) == pytest.approx(expected)
    assert calibrated["confidence"].to_pylist() == pytest.approx(expected.max(1).tolist())
    assert calibrated.select(["key", "label", "predicted"]) == table.select(["key", "label", "predicted"])


@pytest.mark.parametrize(
    ("dataset_name", "split", "stage", "folder"),
    [
        ("v2", "test", None, "report"),
        ("v2", "test", "frozen", "report"),
        ("v2", "test", "unfrozen", "report-v2-test-unfrozen"),
        ("v2", "val", None, "report-v2-val"),
        ("v1", "test", "unfrozen", "report-v1-test-unfrozen"),
    ],
)
def test_every_model_and_split_has_a_report_of_its_own(
    tmp_path: Path, dataset_name: str, split: str, stage: str | None, folder: str
):
    publish_dataset(tmp_path)
    run = begin(tmp_path, TrainSettings(name="both", parent="sample", model=MODEL))
    finish(run, stage="frozen", scale=6)
    finish(run, stage="unfrozen", scale=10)
    uri = report_uri(run, dataset_name, split, run.select_stage(stage))
    assert uri == f"{run.uri}/{folder}"


@pytest.mark.slow
def test_a_report_that_is_replaced_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    publish_evaluated_run(tmp_path)
    evaluation = evaluate_run(str(tmp_path), EvaluateSettings(run="first"))
    assert "<h1>Run first: test photos of v1</h1>" in storage.read_bytes(evaluation.report_uri).decode()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        evaluate_run(str(tmp_path), EvaluateSettings(run="first"))
        evaluate_run(str(tmp_path), EvaluateSettings(run="first", split="val"))
    (line,) = [line for line in caplog.messages if "replaced" in line]
    assert re.fullmatch(r"evaluate: .*/first/report/report\.html of \d{4}-\d\d-\d\d \d\d:\d\d will be replaced", line)


@pytest.mark.parametrize(
    ("of_run", "of_dataset", "text"),
    [
        ("abc", "abd", "only the run has 'c'; only the dataset has 'd'"),
        ("ab", "abd", "only the dataset has 'd'"),
        ("ab", "ba", "the same ones in another order"),
    ],
)
def test_the_difference_of_classes_is_named(of_run: str, of_dataset: str, text: str):
    assert describe_difference([*of_run], [*of_dataset]) == text
