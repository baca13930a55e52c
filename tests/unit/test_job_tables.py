"""Tables that jobs print: figures under the name of their split and model."""

import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from carclass.config.pipeline_sections import check_evaluation
from carclass.config.schema import Config, IngestSettings, MaskSettings, TrainSettings
from carclass.errors import UserError
from carclass.evaluation.evaluate import Evaluation
from carclass.experiments.pipeline_preflight import check_split

JOBS = Path(__file__).parents[2] / "jobs"


def functions(job: str) -> dict[str, Any]:
    """Return the functions of a job."""
    return runpy.run_path(str(JOBS / f"{job}.py"))


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_pipeline_names_accuracies_after_the_evaluated_split(split: str):
    evaluation = Evaluation(0.5, {"split": split}, "")
    name_accuracy = functions("pipeline")["name_accuracy"]
    assert name_accuracy(evaluation) == {f"{split}_accuracy": 0.5}
    assert name_accuracy(evaluation, "_unmasked") == {f"{split}_accuracy_unmasked": 0.5}


def test_a_pipeline_without_photos_to_evaluate_on_stops_before_training():
    check_split(Config(root="/r"), {"splits": {"test": 1, "val": 0}})
    with pytest.raises(UserError, match=r"`evaluate.split` is test, but no photo is in test.*--evaluate.split val\."):
        check_split(Config(root="/r"), {"splits": {"test": 0, "val": 1}})


def test_a_pipeline_counts_the_quarantine_of_ingest_and_of_masking():
    manifests = [{"inputs": 10, "rows": 8, "quarantined": 2}, {"inputs": 8, "rows": 5, "quarantined": 3}]
    count_photos = functions("pipeline")["count_photos"]
    assert count_photos(manifests) == {"photos_in": 10, "rows": 5, "quarantined": 5}
    assert count_photos(manifests[:1]) == {"photos_in": 10, "rows": 8, "quarantined": 2}


@pytest.mark.parametrize(("seconds", "text"), [(43.788, "44 s"), (243.788, "4 min"), (9000.0, "2.5 h")])
def test_a_pipeline_prints_how_long_it_took(seconds: float, text: str):
    summary = {"photos_in": 1200, "model": "frozen epoch 5", "test_accuracy": 0.8, "seconds": seconds}
    assert functions("pipeline")["summary_rows"](summary) == [
        ("photos in", "1,200"),
        ("model", "frozen epoch 5"),
        ("test accuracy", "0.800"),
        ("time", text),
    ]


def test_a_pipeline_ends_with_the_places_of_its_results_and_the_next_commands():
    pipeline = functions("pipeline")
    settings = Config(
        root="/r", ingest=IngestSettings(photos="/p"), mask=MaskSettings(), train=TrainSettings(name="first")
    )
    assert pipeline["list_results"](settings, {"report": "/r/experiments/first/report/report.html"}) == [
        ("dataset v1", "/r/datasets/v1/report.html"),
        ("dataset v2", "/r/datasets/v2/report.html"),
        ("report", "/r/experiments/first/report/report.html"),
        ("summary", "/r/experiments/first/summary.json"),
    ]
    assert pipeline["list_commands"](Namespace(config="my cars.yml", root=None), "first") == [
        ("predict new photos", "python jobs/predict.py PHOTOS --config 'my cars.yml' --run first"),
        ("export the model", "python jobs/export.py --run first --config 'my cars.yml'"),
    ]
    assert pipeline["list_commands"](Namespace(config="my.yml", root="s3://b/r"), "first") == [
        ("predict new photos", "python jobs/predict.py PHOTOS --config my.yml --root s3://b/r --run first"),
        ("export the model", "python jobs/export.py --run first --root s3://b/r"),
    ]


def test_an_evaluation_prints_its_split_photos_and_model():
    metrics = {"split": "val", "dataset": "v2", "num_photos": 1234, "stage": "frozen", "epoch": 7}
    accuracies = {"accuracy": 0.5, "top5_accuracy": 0.9, "top5_k": 5, "num_classes": 6}
    assert functions("evaluate")["metrics_rows"](metrics | accuracies) == [
        ("val accuracy", "0.500"),
        ("val top-5 accuracy", "0.900"),
        ("photos", "1,234 of v2"),
        ("model", "frozen epoch 7"),
    ]


@pytest.mark.parametrize("num_classes", [2, 5])
def test_an_evaluation_of_five_classes_or_fewer_prints_no_top_5_accuracy(num_classes: int):
    metrics = {"split": "test", "dataset": "v2", "num_photos": 9, "stage": "frozen", "epoch": 7}
    accuracies = {"accuracy": 0.5, "top5_accuracy": 1.0, "top5_k": num_classes, "num_classes": num_classes}
    assert [name for name, _ in functions("evaluate")["metrics_rows"](metrics | accuracies)][1] == "photos"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"stage": "unfrozen"}, "`evaluate.stage` is unfrozen, but `train.unfrozen` is null"),
        ({"dataset": "v1"}, "`evaluate.dataset` is v1, but a pipeline evaluates on the dataset it trains on, v2"),
    ],
)
def test_a_pipeline_refuses_an_evaluation_that_it_would_not_do(evaluate: dict[str, str], message: str):
    settings, train = Config(root="/r", evaluate=evaluate), TrainSettings(name="a", unfrozen=None)
    with pytest.raises(UserError, match=message):
        check_evaluation(settings, train)


@pytest.mark.parametrize("key", ["mask.detector.weights", "train.parent"])
def test_a_pipeline_checks_all_weights_before_it_reads_photos(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", "--root", str(tmp_path / "root"), f"--{key}", "/nowhere/w.pth"])
    with pytest.raises(UserError, match=f"`{key}`: /nowhere/w.pth cannot be read"):
        functions("pipeline")["main"]()
    assert not (tmp_path / "root" / "datasets").exists()
