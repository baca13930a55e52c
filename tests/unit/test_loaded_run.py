"""load_run: a finished run with its model, metrics, lineage and predictions."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import carclass
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.models import architectures, preprocessing
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, begin_run, find_run
from tests.helpers.runs import publish_frozen_run

HOUSE = Path(__file__).parents[2]
CLASSES = ["one", "two", "three"]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)
SOURCE = {"classes": CLASSES}


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    """Return a run without a finished stage."""
    settings = TrainSettings(name="first", parent="sample", model=MODEL, unfrozen=None)
    return begin_run(Run(str(tmp_path), settings), dataset.Dataset(f"{tmp_path}/datasets/v2", SOURCE), "0" * 64)


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Run, torch.nn.Module]:
    torch.manual_seed(3)
    net = architectures.build(MODEL, len(CLASSES)).eval()
    source = dataset.Dataset(f"{tmp_path}/datasets/v2", SOURCE)
    return publish_frozen_run(str(tmp_path), source, "first", MODEL, net), net


def test_the_model_returns_the_logits_of_the_network(finished: tuple[Run, torch.nn.Module]):
    run, net = finished
    loaded = carclass.load_run(run.uri)
    photos = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(loaded.model(photos), net(preprocessing.normalise(photos)), atol=1e-4)
    assert not loaded.model.training
    assert loaded.classes == CLASSES


def test_settings_lineage_and_metrics_are_loaded(finished: tuple[Run, torch.nn.Module]):
    run, _ = finished
    figures = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"), 0.5)
    MetricsLog(run, "frozen", 0).add({"epoch": 1, "time": 0.0, **figures}, [])
    loaded = carclass.load_run(Path(run.uri))
    assert loaded.settings == run.settings
    assert loaded.lineage["parent_sha256"] == "0" * 64
    assert [row["val_accuracy"] for row in loaded.metrics] == [0.5]


def test_predictions_are_loaded_after_an_evaluation(finished: tuple[Run, torch.nn.Module]):
    run, _ = finished
    assert carclass.load_run(run.uri).predictions is None
    table = pa.table({"key": ["a"], "label": ["one"]})
    Path(run.uri, "report").mkdir()
    formats.write(
        f"{run.uri}/report/metrics.json",
        "evaluation",
        {"accuracy": 1.0, "num_photos": 1, "model_sha256": run.model_facts("frozen")["sha256"]},
    )
    pq.write_table(table, Path(run.uri, "report", "predictions.parquet"))
    assert carclass.load_run(run.uri).predictions == table


@pytest.mark.parametrize("other", [{"split": "val"}, {"dataset": "v1"}])
def test_metrics_of_another_split_or_dataset_are_not_those_of_the_run(
    finished: tuple[Run, torch.nn.Module], other: dict[str, str]
):
    run, _ = finished
    metrics = {"accuracy": 1.0, "num_photos": 1, "model_sha256": run.model_facts("frozen")["sha256"], **other}
    formats.write(f"{run.uri}/report/metrics.json", "evaluation", metrics)
    assert carclass.load_run(run.uri).evaluation is None


def test_a_copied_folder_is_loaded_from_a_relative_path(
    finished: tuple[Run, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path(finished[0].uri).rename(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert carclass.load_run("copy/").settings.name == "first"


def test_a_copied_folder_is_found_by_its_own_name(finished: tuple[Run, torch.nn.Module]):
    run, _ = finished
    shutil.copytree(run.uri, Path(run.uri).with_name("copy"))
    found = find_run(run.root, "copy")
    assert found.uri == str(Path(run.uri).with_name("copy"))
    assert found.settings == run.settings.model_copy(update={"name": "copy"})


def test_a_folder_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yml"):
        carclass.load_run(tmp_path / "experiments" / "none")


def test_an_unfinished_run_is_an_error(begun: Run):
    with pytest.raises(UserError, match="has not finished this stage"):
        carclass.load_run(begun.uri)


# The model's input


@pytest.mark.parametrize(
    ("photos", "found"),
    [
        (torch.rand(2, 3, 64, 64), r"float32 \(2,3,64,64\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), r"int64 \(2,3,64,64\)"),
        (torch.zeros(2, 3, 32, 64, dtype=torch.uint8), r"uint8 \(2,3,32,64\)"),
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"uint8 \(2,64,64,3\)"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), r"uint8 \(3,64,64\)"),
        (torch.ones(2, 3, 64, 64, dtype=torch.uint8), "uint8 with values of at most 1"),
        (np.zeros((2, 3, 64, 64), np.uint8), "an object of type ndarray"),
    ],
)
def test_other_input_is_refused(finished: tuple[Run, torch.nn.Module], photos: Any, found: str):
    model = carclass.load_run(finished[0].uri).model
    with pytest.raises(UserError, match=rf"`run.model` takes uint8 \(N,3,64,64\) .* but got {found}.*`run.predict`"):
        model(photos)


def test_a_black_photo_is_classified(finished: tuple[Run, torch.nn.Module]):
    photos = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert carclass.load_run(finished[0].uri).model(photos).shape == (1, len(CLASSES))


def test_no_photos_give_no_logits(finished: tuple[Run, torch.nn.Module]):
    photos = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    assert carclass.load_run(finished[0].uri).model(photos).shape == (0, len(CLASSES))


@pytest.mark.slow
def test_the_model_can_be_exported(finished: tuple[Run, torch.nn.Module]):
    photos = torch.randint(2, 256, (2, 3, 64, 64), dtype=torch.uint8)
    model = carclass.load_run(finished[0].uri).model
    exported = torch.export.export(model, (photos,)).module()
    assert torch.allclose(exported(photos), model(photos), atol=1e-4)


def test_importing_the_package_imports_no_large_library():
    code = "import sys, carclass; sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'ray', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE, check=False).returncode == 0
