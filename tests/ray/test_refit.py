"""The refit of a run on train and val photos: its model, its figures, and its interruption."""

import math
from pathlib import Path
from typing import Any

import pytest

from carclass import storage
from carclass.config.schema import EvaluateSettings, TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.evaluation.evaluate import evaluate_run
from carclass.runs.calibration_record import read_calibration
from carclass.runs.run import REFIT, Run, epoch_text, find_run
from carclass.training.train import load_run_inputs, train_run

TRAIN: dict[str, Any] = {
    "dataset": "v1",
    "parent": "sample",
    "model": {"architecture": "resnet26-narrow", "image_size": 64},
    "frozen": {"epochs": 4, "batch_size": 8},
    "unfrozen": {"epochs": 3, "batch_size": 16, "lr": 1e-3},
}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cluster")]  # 60 s


def train(root: str, name: str, **changes: Any) -> Run:
    return train_run(root, TrainSettings(**{**TRAIN, "name": name, **changes}))


def model_sha256(run: Run, name: str) -> str:
    return str(run.model_facts(name)["sha256"])


@pytest.fixture
def run(root: str) -> Run:
    """Return the finished run; the first test trains it."""
    return train(root, "refitted", refit=True)


def test_the_refit_is_the_model_of_the_run(run: Run):
    assert run.select_stage(None) == REFIT
    assert model_sha256(run, REFIT) != model_sha256(run, run.best_stage)


def test_it_has_the_epochs_and_the_accuracy_of_the_chosen_model(run: Run):
    facts, chosen = run.model_facts(REFIT), run.model_facts(run.best_stage)
    assert (facts["epoch"], facts["val_accuracy"]) == (chosen["epoch"], chosen["val_accuracy"])
    assert epoch_text(facts) == f"refit on train and val after {epoch_text(chosen)}"


def test_it_is_trained_on_train_and_val_photos(root: str, run: Run):
    splits = dataset.load_dataset(root, "v1").manifest["splits"]
    again = Run(root, run.settings.model_copy(update={"name": REFIT}), "experiments/refitted")
    before, after = (math.ceil(number / 8) for number in (splits["train"], splits["train"] + splits["val"]))
    assert before < after
    assert (len(run.steps("frozen", 1)), len(again.steps("frozen", 1))) == (before, after)


def test_curves_are_of_the_run_before(run: Run):
    assert {row["stage"] for row in run.metrics()} == {"frozen", "unfrozen"}


def test_the_report_is_of_the_refit_with_the_calibration_of_the_chosen_model(root: str, run: Run):
    evaluation = evaluate_run(root, EvaluateSettings(run="refitted"))
    assert evaluation.metrics["model_sha256"] == model_sha256(run, REFIT)
    chosen = read_calibration(run.model_uri(run.best_stage), model_sha256(run, run.best_stage))
    assert chosen is not None
    assert evaluation.metrics["temperature"] == chosen.temperature
    assert "by the model before the refit" in storage.read_bytes(evaluation.report_uri).decode()


def test_it_is_not_evaluated_on_val_photos(root: str, run: Run):
    with pytest.raises(UserError, match=rf"trained on the val photos too.*`evaluate.stage: {run.best_stage}`"):
        evaluate_run(root, EvaluateSettings(run="refitted", split="val"))


def test_a_run_that_starts_from_the_best_epoch_has_not_seen_val_photos(root: str, run: Run):
    settings = TrainSettings(**{**TRAIN, "name": "child", "parent": "refitted@best", "frozen": None})
    assert load_run_inputs(root, settings)[1] == model_sha256(run, run.best_stage)


def test_a_finished_run_may_be_refitted(root: str, run: Run):
    plain = train(root, "plain")
    assert (plain.settings.refit, plain.is_finished(REFIT)) == (False, False)
    later = train(root, "plain", refit=True)
    assert find_run(root, "plain").settings.refit
    assert storage.read_bytes(f"{later.model_uri(REFIT)}.safetensors") == storage.read_bytes(
        f"{run.model_uri(REFIT)}.safetensors"
    )


def test_an_interrupted_refit_is_resumed(root: str, run: Run):
    weights = Path(f"{run.model_uri(REFIT)}.safetensors")
    expected = weights.read_bytes()
    for path in Path(run.uri, "refit").glob("**/best.*"):
        path.unlink()
    train(root, "refitted", refit=True)
    assert weights.read_bytes() == expected
