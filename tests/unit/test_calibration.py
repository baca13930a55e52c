"""Temperature scaling: it finds the temperature that was put in, changes no answer, and lowers the loss."""

from pathlib import Path

import numpy as np
import pytest

from carclass.prediction import calibration


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def draw(temperature: float, num_photos: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from true probabilities, and what a network says of them whose logits are too large by a factor."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.5, (num_photos, 8))
    true = softmax(logits).cumsum(1)
    labels = (rng.random((num_photos, 1)) > true).sum(1).clip(max=7)
    return labels, softmax(logits * temperature).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float):
    assert calibration.fit_temperature(*draw(temperature)) == pytest.approx(temperature, rel=0.03)


def test_the_fitted_temperature_has_the_least_loss():
    labels, probabilities = draw(2.0, 500)
    found = calibration.fit_temperature(labels, probabilities)
    around = [calibration.log_loss(labels, probabilities, found * factor) for factor in (0.9, 0.99, 1, 1.01, 1.1)]
    assert min(around) == around[2]


def test_a_fit_says_what_it_did():
    labels, probabilities = draw(3.0)
    fitted = calibration.fit(labels, probabilities, "f" * 64)
    assert fitted.log_loss_after < fitted.log_loss_before
    assert fitted.expected_calibration_error_after < 0.02 < fitted.expected_calibration_error_before
    assert fitted.num_photos == len(labels)


def test_applying_gives_probabilities_in_the_same_order():
    _, probabilities = draw(2.0, 50)
    found = calibration.apply(probabilities, 2.0)
    assert found.sum(1) == pytest.approx(np.ones(50))
    assert (found.argsort(1) == probabilities.argsort(1)).all()


def test_a_temperature_of_one_changes_nothing():
    _, probabilities = draw(1.0, 50)
    assert calibration.apply(probabilities, 1.0) == pytest.approx(probabilities, abs=1e-6)


def test_dividing_logits_is_what_is_done():
    logits = np.array([[4.0, 2.0, 0.0], [-1.0, 0.0, 1.0]])
    assert calibration.apply(softmax(logits), 2.0) == pytest.approx(softmax(logits / 2))


def test_probabilities_of_zero_are_no_trouble():
    probabilities = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    labels = np.array([0, 1, 1])
    fitted = calibration.fit(labels, probabilities, "f" * 64)
    assert np.isfinite([fitted.log_loss_before, fitted.log_loss_after]).all()
    assert calibration.apply(probabilities, fitted.temperature).max(1) == pytest.approx(2 / 3, abs=0.35)


def test_where_every_answer_is_right_the_temperature_stays_within_its_bounds():
    labels = np.arange(6) % 3
    probabilities = softmax(np.eye(3)[labels] * 2)
    assert calibration.COLDEST <= calibration.fit_temperature(labels, probabilities) < 2 * calibration.COLDEST


def test_what_is_kept_is_found_again_for_the_same_network_only(tmp_path: Path):
    run, fitted = str(tmp_path), calibration.fit(*draw(2.0, 100), "a" * 64)
    assert calibration.read(run, "a" * 64) is None
    calibration.write(run, fitted)
    assert calibration.read(run, "a" * 64) == fitted
    assert calibration.read(run, "b" * 64) is None
