"""Records of a run that contradict each other, as after an edit or a copy from another run: none is believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from carclass import load_run, storage
from carclass.config.schema import EvaluateSettings, TrainSettings
from carclass.data import dataset, formats, publishing
from carclass.errors import UserError
from carclass.evaluation import evaluate
from carclass.experiments import status
from carclass.experiments.collect import read_test
from carclass.experiments.status import RunStatus
from carclass.runs.preprocessing_record import load_preprocessing
from carclass.runs.report_record import METRICS, PREDICTIONS
from carclass.runs.run import Run, record_best_stage
from tests.helpers.evaluated_run import publish_evaluated_run
from tests.helpers.parts import publish
from tests.helpers.runs import MODEL, begin, finish, publish_dataset

BOTH = {"model": MODEL, "parent": "sample", "frozen": {"epochs": 5}, "unfrozen": {"epochs": 2}}


def make_run(root: Path, name: str, scale: int) -> Run:
    """Finish a run of both stages, better after freezing than after unfreezing; val accuracies are below 5 / scale."""
    run = begin(root, TrainSettings(name=name, **BOTH))
    finish(run, stage="frozen", scale=scale)
    finish(run, stage="unfrozen", epochs=2, scale=scale)
    record_best_stage(run)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run beside another one, `other`, with other val accuracies."""
    publish_dataset(tmp_path)
    make_run(tmp_path, "other", 20)
    return make_run(tmp_path, "first", 10)


def edit(run: Run, file: str, **changes: Any) -> None:
    path = Path(run.uri, file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy(run: Run, *files: str) -> None:
    """Replace files by those of the run `other`."""
    for file in files:
        shutil.copy(f"{run.root}/experiments/other/{file}", f"{run.uri}/{file}")


def change_model(run: Run) -> None:
    path = Path(run.uri, "config.yml")
    config = yaml.safe_load(path.read_text())
    config["model"]["image_size"] = 64
    path.write_text(yaml.safe_dump(config))


def copy_stage(run: Run) -> None:
    for ending in (".json", ".safetensors"):
        shutil.copy(f"{run.model_uri('unfrozen')}{ending}", f"{run.model_uri('frozen')}{ending}")


FAULTS: dict[str, tuple[Callable[[Run], None], str]] = {
    "an edited model": (lambda run: edit(run, "frozen/best.json", val_accuracy=0.99), r"frozen/best.json is damaged"),
    "another run's model": (
        lambda run: copy(run, "frozen/best.json", "frozen/best.safetensors", "model.json"),
        r"frozen/best.json and .*metrics.jsonl contradict .*the val accuracy of frozen epoch 5.*Restore it",
    ),
    "another run's metrics": (lambda run: copy(run, "metrics.jsonl"), r"metrics.jsonl contradict each other"),
    "another stage's model": (copy_stage, r"frozen/best.json and .*config.yml contradict each other \(`stage`\)"),
    "other settings": (change_model, r"frozen/best.json and .*config.yml contradict each other \(`model.image_size`\)"),
    "another best stage": (
        lambda run: edit(run, "model.json", stage="unfrozen"),
        r"model.json is damaged: its `sha256` is not that of the model of stage unfrozen. Delete the file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_other_records_contradict_is_not_used(run: Run, fault: str):
    assert load_run(run.uri).stage == "frozen"
    change, message = FAULTS[fault]
    change(run)
    with pytest.raises(UserError, match=message):
        load_run(run.uri)


def test_a_run_without_metrics_can_still_be_used(run: Run):
    Path(run.uri, "metrics.jsonl").unlink()
    assert load_run(run.uri).stage == "frozen"


def test_a_run_with_damaged_metrics_can_still_be_used(run: Run):
    Path(run.uri, "metrics.jsonl").write_text("{\n")
    assert run.select_stage(None) == "frozen"


# Preprocessing


@pytest.fixture
def evaluated(tmp_path: Path) -> Run:
    return publish_evaluated_run(tmp_path)


def test_preprocessing_of_another_run_is_not_used(evaluated: Run):
    assert load_preprocessing(evaluated).reading
    lineage = storage.join(evaluated.uri, "lineage.json")
    formats.write(lineage, "lineage", {**evaluated.lineage(), "dataset_digest": "0" * 64})
    with pytest.raises(UserError, match=r"preprocessing.json is damaged: it is of another dataset than lineage.json"):
        load_preprocessing(evaluated)


# Reports


def evaluate_again(run: Run) -> dict[str, Any]:
    """Evaluate a run in this process and return the metrics."""
    return evaluate.evaluate_run(run.root, EvaluateSettings(run=run.settings.name)).metrics


def read(run: Run) -> Any:
    return read_test(RunStatus(run, "finished", best=status.find_model(run)))


def test_a_report_is_of_its_dataset_and_its_predictions(evaluated: Run):
    metrics = evaluate_again(evaluated)
    assert metrics["dataset_digest"] == evaluated.lineage()["dataset_digest"]
    predictions = Path(evaluated.uri, "report", PREDICTIONS).read_bytes()
    assert metrics["predictions_sha256"] == storage.sha256(predictions)
    assert read(evaluated) is not None


def test_predictions_of_another_report_are_not_used(evaluated: Run):
    evaluate_again(evaluated)
    path = Path(evaluated.uri, "report", PREDICTIONS)
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "predicted", table["label"]), path)
    assert read(evaluated) is None
    with pytest.raises(UserError, match=r"predictions.parquet has other predictions .* Run jobs/evaluate.py again"):
        load_run(evaluated.uri)


def test_edited_metrics_are_not_used(evaluated: Run):
    evaluate_again(evaluated)
    edit(evaluated, f"report/{METRICS}", accuracy=1.0)
    assert read(evaluated) is None
    with pytest.raises(UserError, match=r"metrics.json is damaged: its values are not those .* Run jobs/evaluate.py"):
        load_run(evaluated.uri)


def remove_last_photo(source: dataset.Dataset) -> None:
    """Publish a dataset without its last test photo in its place."""
    rows = source.read(dataset.ROW.names)
    rows = rows.slice(0, len(rows) - 1)
    shutil.rmtree(source.uri)
    settings = source.manifest["settings"]
    publishing.write_part(source.uri, "parts", rows, settings)
    publish(source.uri, rows["key"].to_pylist(), classes=source.classes, settings=settings)


@pytest.mark.slow
def test_a_report_that_replaces_one_of_another_version_of_the_dataset_says_so(
    evaluated: Run, caplog: pytest.LogCaptureFixture
):
    """As after an update of the dataset, which keeps its name."""
    before = evaluate_again(evaluated)
    assert "another version" not in caplog.text
    remove_last_photo(dataset.load_dataset(evaluated.root, "v1"))
    metrics = evaluate_again(evaluated)
    assert metrics["dataset_digest"] != before["dataset_digest"]
    assert "the former report in" in caplog.text
    assert f"was of another version of dataset v1: accuracy {before['accuracy']:.3f} of 9 photos, now" in caplog.text
    assert "of 8. The two are not of the same photos" in caplog.text
    assert read(evaluated) is None
    assert load_run(evaluated.uri).summary()["test photos"] == 8
    page = Path(evaluated.uri, "report", "report.html").read_text()
    assert "of another version of it than the run was trained on" in page
