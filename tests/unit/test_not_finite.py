"""Weights and outputs that are not finite, as of training that diverged: never published, read or predicted with."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from carclass.config.schema import FrozenSettings, ModelSettings, TrainSettings
from carclass.data import formats
from carclass.errors import UserError
from carclass.models import architectures, classifier, weights
from carclass.models.classifier import Classifier
from carclass.runs import saved_model
from carclass.runs.checkpoint_index import checkpoint_name
from carclass.runs.predictor import Predictor
from carclass.training import checkpoint
from carclass.training.learner import Learner, make_learner

REPO = Path(__file__).parents[2]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=32)
FACTS = {
    "stage": "frozen",
    "epoch": 1,
    "val_accuracy": 0.5,
    "classes": ["bus", "car"],
    "model": MODEL.model_dump(),
    "precision": "fp32",
}
not_finite = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def make_net(value: float) -> Classifier:
    """Return a network with one weight of this value."""
    net = architectures.build(MODEL, 2)
    net.fc[1].weight.data[1, 7] = value
    return net


def write_model(folder: Path, value: float) -> str:
    """Write a model as versions wrote it that did not check it, and return its URI."""
    pieces = saved_model.serialise(saved_model.copy_to_host(make_net(value).state_dict()))
    (folder / "best.safetensors").write_bytes(b"".join(pieces))
    sha256 = saved_model.storage.sha256(*pieces)
    formats.write(f"{folder}/best.json", "model", {**FACTS, "sha256": sha256})
    return f"{folder}/best"


@pytest.fixture
def learner() -> Learner:
    stage = FrozenSettings(lr=0.1)
    return make_learner(make_net(0.5).fc, stage, classifier.autocast("fp32", torch.device("cpu")), seed=1)


def write_checkpoint(folder: Path, learner: Learner, epoch: int, samples: int, value: float) -> str:
    """Write a checkpoint whose first weight has this value, and return its URI."""
    learner.module[1].weight.data[0, 0] = value
    name = checkpoint_name(epoch, samples)
    state = {"epoch": epoch, "val_accuracies": [0.1 * number for number in range(1, epoch + 1)]}
    checkpoint.write_checkpoint(str(folder), checkpoint.take_snapshot(name, learner, state))
    return f"{folder}/{name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_finite_weights_whose_sum_overflows_are_finite(dtype: torch.dtype):
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert weights.first_not_finite({"a": torch.zeros(0, dtype=dtype), "b": largest, "c": torch.tensor(7)}) is None
    assert weights.first_not_finite({"b": largest, "c": torch.tensor([1, math.inf, -math.inf], dtype=dtype)}) == "c"


@not_finite
def test_a_model_that_is_not_finite_is_not_read(tmp_path: Path, value: float):
    with pytest.raises(UserError, match=r"best.safetensors has weights that are not finite \(first: fc.1.weight\)"):
        saved_model.load_network(write_model(tmp_path, value))


def test_a_model_that_is_not_finite_is_not_published(tmp_path: Path):
    with pytest.raises(AssertionError, match="not finite"):
        saved_model.publish_model(f"{tmp_path}/best", make_net(math.nan), FACTS)
    assert list(tmp_path.iterdir()) == []


@not_finite
def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(tmp_path: Path, learner: Learner, value: float):
    uri = write_checkpoint(tmp_path, learner, 1, 64, value)
    learner.module[1].weight.data[0, 0] = 0.25
    with pytest.raises(UserError, match=r"not finite \(first: 1.weight\).*another `train.name`"):
        checkpoint.restore_checkpoint(uri, learner)
    assert learner.module[1].weight[0, 0] == 0.25


def test_the_best_epoch_is_the_best_that_is_finite(tmp_path: Path, learner: Learner):
    for epoch, value in enumerate((1.0, 2.0, math.nan), 1):
        write_checkpoint(tmp_path, learner, epoch, 0, value)
    assert checkpoint.restore_best(str(tmp_path), learner.module)["epoch"] == 2
    assert learner.module[1].weight[0, 0] == 2.0


def test_no_run_starts_from_an_epoch_that_is_not_finite(tmp_path: Path, learner: Learner):
    with pytest.raises(UserError, match="not finite"):
        checkpoint.read_weights(write_checkpoint(tmp_path, learner, 1, 0, math.inf))


def test_pretrained_weights_that_are_not_finite_are_refused(tmp_path: Path):
    save_file({"a": torch.ones(2), "conv1.weight": torch.tensor([1.0, math.nan])}, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"`train.parent`: .*net.safetensors has .* not finite \(first: conv1.weight\)"):
        weights.load_weights(f"{tmp_path}/net.safetensors", None, sample="backbone.safetensors", key="train.parent")


def test_outputs_that_are_not_finite_are_no_prediction(tmp_path: Path):
    """Finite weights, whose products overflow."""
    predictor = Predictor(write_model(tmp_path, 0.5), use_gpu=False)
    torch.nn.init.constant_(predictor.net.fc[1].weight, 3e38)
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    with pytest.raises(UserError, match=r"best.safetensors has outputs that are not finite"):
        predictor.probabilities([buffer.getvalue()])


# Settings and stored files


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e999"])
@pytest.mark.parametrize("key", ["weight_decay", "warmup_epochs", "lr", "clip_grad_norm"])
def test_settings_are_finite(key: str, value: str):
    with pytest.raises(ValueError, match="finite number"):
        TrainSettings.model_validate({"name": "x", "unfrozen": {key: value}})


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_stored_file_with_a_number_that_is_not_finite_is_damaged(tmp_path: Path, constant: str):
    (tmp_path / "metrics.json").write_text(f'{{"accuracy": {constant}, "num_photos": 3}}')
    with pytest.raises(UserError, match=rf"metrics.json is damaged: {constant} is no number of JSON"):
        formats.read(f"{tmp_path}/metrics.json", "evaluation")


def test_a_former_line_with_a_number_that_is_not_finite_is_read():
    figures = dict.fromkeys(formats.KINDS["metrics"].keys, math.nan)
    line = json.dumps({**figures, "stage": "frozen", "epoch": 1}).encode()
    (row,) = formats.decode_lines(line + b"\n", "metrics", "metrics.jsonl")
    assert math.isnan(row["val_loss"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_is_strict(value: float):
    for write in (formats.to_json, formats.json_text):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write({"a": [value]})


def test_no_json_is_written_with_nan():
    """`json.dumps` writes NaN, which is not JSON, unless it is told otherwise."""
    files = [file for folder in ("carclass", "jobs") for file in (REPO / folder).rglob("*.py")]
    calls = [(file.name, call) for file in files for call in re.findall(r"json\.dumps?\(.*", file.read_text())]
    assert [(file, call) for file, call in calls if "allow_nan=False" not in call] == []
