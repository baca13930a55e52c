"""Temperature scaling: the fit, its effect on the loss, and its storage."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from carclass.data import formats
from carclass.evaluation import calibration
from carclass.runs.calibration_record import read_calibration, write_calibration


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def draw(temperature: float, num_photos: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels, and the probabilities of a network whose logits are too large by a factor of `temperature`."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.5, (num_photos, 8))
    true = softmax(logits).cumsum(1)
    labels = (rng.random((num_photos, 1)) > true).sum(1).clip(max=7)
    return labels, softmax(logits * temperature).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 3.0])
def test_a_known_temperature_is_recovered(temperature: float):
    assert calibration.fit_temperature(*draw(temperature)) == pytest.approx(temperature, rel=0.03)


def test_the_fitted_temperature_has_the_least_loss():
    labels, probabilities = draw(2.0, 500)
    fitted = calibration.fit_temperature(labels, probabilities)
    around = [calibration.log_loss(labels, probabilities, fitted * factor) for factor in (0.9, 0.99, 1, 1.01, 1.1)]
    assert min(around) == around[2]


def test_a_calibration_reports_metrics_before_and_after():
    labels, probabilities = draw(3.0)
    fitted = calibration.fit_calibration(labels, probabilities, "f" * 64)
    assert fitted.log_loss_after < fitted.log_loss_before
    assert fitted.expected_calibration_error_after < 0.02 < fitted.expected_calibration_error_before
    assert fitted.num_photos == len(labels)


def draw_spoiled() -> tuple[np.ndarray, np.ndarray]:
    """Return calibrated predictions with a few certain mistakes: the temperature of least loss spoils the others."""
    confidences = np.array([0.8] * 200 + [1 - 1e-6] * 4)
    labels = np.array([0] * 160 + [1] * 44)
    return labels, np.stack([confidences, 1 - confidences], axis=1)


def test_a_temperature_that_raises_the_calibration_error_is_not_used():
    fitted = calibration.fit_calibration(*draw_spoiled(), "f" * 64)
    assert fitted.log_loss_after < fitted.log_loss_before
    assert fitted.expected_calibration_error_after > fitted.expected_calibration_error_before
    assert fitted.temperature == 1
    assert fitted.fitted_temperature > 1
    assert re.search(
        r"^1; \d\.\d{3}, fitted from 204 val photos, is not used, as it would change the "
        r"calibration error from 0\.0\d+ to 0\.",
        fitted.text,
    )


def test_a_temperature_at_the_lower_bound_of_the_fit_is_not_used():
    labels = np.arange(6) % 3
    fitted = calibration.fit_calibration(labels, softmax(np.eye(3)[labels] * 2), "f" * 64)
    assert fitted.temperature == 1
    assert "0.055, fitted from 6 val photos, is not used, as it is near the lower bound of the fit" in fitted.text


def test_a_temperature_that_does_not_help_other_photos_is_not_used():
    """Few photos of a calibrated network: the fit improves them by chance."""
    used, chances = 0, range(200)
    for seed in chances:
        generator = np.random.default_rng(seed)
        logits = generator.normal(0, 1.5, (24, 5))
        labels = (generator.random((24, 1)) > softmax(logits).cumsum(1)).sum(1).clip(max=4)
        fitted = calibration.fit_calibration(labels, softmax(logits), "f" * 64)
        used += fitted.temperature != 1
        assert fitted.temperature != 1 or "is not used" in fitted.text
    assert used < 0.05 * len(chances)


@pytest.mark.parametrize(("num_photos", "is_used"), [(150, False), (300, True)])
def test_few_photos_do_not_raise_confidences(num_photos: int, is_used: bool):
    fitted = calibration.fit_calibration(*draw(0.5, num_photos), "f" * 64)
    assert fitted.fitted_temperature < 0.8
    assert (fitted.temperature != 1) == is_used
    assert ("these are too few to raise probabilities" in fitted.text) != is_used


def test_few_photos_of_which_nearly_all_are_correct_raise_confidences():
    """Half as many as a network needs that is often wrong; confidences are low, as after label smoothing."""
    labels = np.arange(100) % 4
    predicted = np.where(np.isin(np.arange(100), [3, 27, 56, 84]), (labels + 1) % 4, labels)
    probabilities = softmax(np.random.default_rng(0).normal(0, 0.1, (100, 4)) + 2 * np.eye(4)[predicted])
    assert calibration.fit_calibration(labels, probabilities, "f" * 64).temperature < 0.7


def test_few_photos_on_which_the_epoch_was_chosen_do_not_spoil_the_probabilities_of_others():
    """Epochs that differ by chance: the one with most hits on val has no better confidences on test."""
    spoiled = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        logits = generator.normal(0, 2, (2040, 5))
        probabilities = softmax(logits)
        epochs = [(generator.random((2040, 1)) > probabilities.cumsum(1)).sum(1).clip(max=4) for _ in range(15)]
        labels = max(epochs, key=lambda each: (each[:40] == logits[:40].argmax(1)).sum())
        fitted = calibration.fit_calibration(labels[:40], probabilities[:40], "f" * 64)
        test = labels[40:], probabilities[40:]
        calibrated = calibration.apply_temperature(test[1], fitted.temperature)
        spoiled += calibration.calibration_error(test[0], calibrated) > calibration.calibration_error(*test) + 0.02
    assert spoiled == 0


@pytest.mark.parametrize(("num_photos", "temperature"), [(60, 1), (600, 0.5)])
def test_a_temperature_below_one_that_was_stored_before_is_not_used_if_it_is_of_few_photos(
    tmp_path: Path, num_photos: int, temperature: float
):
    fitted = calibration.fit_calibration(*draw(2.0, 100), "f" * 64)
    stored = {**dataclasses.asdict(fitted), "temperature": 0.5, "fitted_temperature": 0.5, "num_photos": num_photos}
    formats.write(f"{tmp_path}/calibration.json", "calibration", stored)
    read = read_calibration(f"{tmp_path}/frozen/best", "f" * 64)
    assert read is not None
    assert (read.temperature, read.fitted_temperature) == (temperature, 0.5)
    assert (read.coverage == [], "too few to raise" in read.text) == (temperature == 1, temperature == 1)


def test_a_calibration_is_shown_in_short():
    used = calibration.fit_calibration(*draw(2.0), "f" * 64)
    unused = calibration.fit_calibration(*draw_spoiled(), "f" * 64)
    assert repr(used) == f"Calibration(calibrated: temperature {used.text})"
    assert repr(unused).startswith("Calibration(not calibrated: temperature 1; ")
    assert max(len(repr(used)), len(repr(unused))) < 250


def test_a_network_that_has_learnt_nothing_is_calibrated_to_chance():
    labels = np.arange(40) % 4
    fitted = calibration.fit_calibration(labels, softmax(np.tile([3.0, 0, 0, 0], (40, 1))), "f" * 64)
    assert fitted.temperature > 10


def test_a_temperature_that_improves_the_probabilities_is_used():
    fitted = calibration.fit_calibration(*draw(2.0), "f" * 64)
    assert fitted.temperature == fitted.fitted_temperature == pytest.approx(2, rel=0.03)
    assert fitted.text == f"{fitted.temperature:.3f}, from 20,000 val photos"


def test_a_worse_temperature_that_was_stored_before_is_not_used(tmp_path: Path):
    fitted = dataclasses.asdict(calibration.fit_calibration(*draw_spoiled(), "f" * 64))
    stored = {**fitted, "temperature": fitted.pop("fitted_temperature")}
    del stored["fitted_temperature"]
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "calibration.json").write_text(json.dumps(stored))
    read = read_calibration(f"{tmp_path}/frozen/best", "f" * 64)
    assert read is not None
    assert (read.temperature, read.fitted_temperature) == (1, stored["temperature"])


def test_calibrated_probabilities_keep_their_order():
    _, probabilities = draw(2.0, 50)
    calibrated = calibration.apply_temperature(probabilities, 2.0)
    assert calibrated.sum(1) == pytest.approx(np.ones(50))
    assert (calibrated.argsort(1) == probabilities.argsort(1)).all()


def test_a_temperature_of_one_changes_nothing():
    _, probabilities = draw(1.0, 50)
    assert calibration.apply_temperature(probabilities, 1.0) == pytest.approx(probabilities, abs=1e-6)


def test_a_temperature_divides_the_logits():
    logits = np.array([[4.0, 2.0, 0.0], [-1.0, 0.0, 1.0]])
    assert calibration.apply_temperature(softmax(logits), 2.0) == pytest.approx(softmax(logits / 2))


def test_probabilities_of_zero_stay_finite():
    probabilities = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    labels = np.array([0, 1, 1])
    fitted = calibration.fit_calibration(labels, probabilities, "f" * 64)
    assert np.isfinite([fitted.log_loss_before, fitted.log_loss_after]).all()
    assert calibration.apply_temperature(probabilities, fitted.temperature).max(1) == pytest.approx(2 / 3, abs=0.35)


def test_the_temperature_is_bounded_if_every_photo_is_classified_correctly():
    labels = np.arange(6) % 3
    probabilities = softmax(np.eye(3)[labels] * 2)
    assert (
        calibration.MIN_TEMPERATURE
        <= calibration.fit_temperature(labels, probabilities)
        < 2 * calibration.MIN_TEMPERATURE
    )


def test_a_stored_calibration_is_read_for_the_same_network_only(tmp_path: Path):
    model, fitted = f"{tmp_path}/frozen/best", calibration.fit_calibration(*draw(2.0, 100), "a" * 64)
    assert read_calibration(model, "a" * 64) is None
    write_calibration(model, fitted)
    assert read_calibration(model, "a" * 64) == fitted
    assert read_calibration(model, "b" * 64) is None


def test_each_stage_has_its_calibration(tmp_path: Path):
    fitted = {stage: calibration.fit_calibration(*draw(2.0, 100), stage) for stage in ("frozen", "unfrozen")}
    for stage, calibrated in fitted.items():
        write_calibration(f"{tmp_path}/{stage}/best", calibrated)
    assert {stage: read_calibration(f"{tmp_path}/{stage}/best", stage) for stage in fitted} == fitted


def test_the_coverage_of_the_val_photos_is_that_of_calibrated_probabilities():
    labels, probabilities = draw(3.0, 500)
    fitted = calibration.fit_calibration(labels, probabilities, "f" * 64)
    calibrated = calibration.apply_temperature(probabilities, fitted.temperature).max(1)
    assert fitted.temperature != 1
    assert [row["count"] for row in fitted.coverage] == [
        (calibrated >= row["threshold"]).sum() for row in fitted.coverage
    ]
