"""Calibration of probabilities by temperature scaling (Guo et al., 2017, ICML), fitted on the val photos.

Networks are overconfident on photos outside their train split, or underconfident after label smoothing. The logits are
divided by one scalar, the temperature. This does not change the order of the classes, and so no prediction.
"""

import numpy as np
from scipy.optimize import minimize_scalar

from carclass.evaluation import metrics
from carclass.runs.calibration_record import MIN_USED_TEMPERATURE, Calibration

MIN_TEMPERATURE, MAX_TEMPERATURE = MIN_USED_TEMPERATURE / 2, 20.0
"""Bounds of the fit: if every val photo is classified correctly, the loss has no minimum."""
NUM_FOLDS = 5


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, model_sha256: str) -> Calibration:
    """Fit the calibration of a network. labels: int (N,); probabilities: float (N,C), uncalibrated.

    A temperature that does not lower both log loss and calibration error is not used, nor one at the lower bound of the
    fit, as all photos are classified correctly there, nor any if temperatures that are fitted on some of the photos do
    not lower the log loss of the others.
    """
    fitted = fit_temperature(labels, probabilities)
    losses = log_loss(labels, probabilities), log_loss(labels, probabilities, fitted)
    calibrated = apply_temperature(probabilities, fitted)
    errors = calibration_error(labels, probabilities), calibration_error(labels, calibrated)
    is_used = fitted > MIN_USED_TEMPERATURE and losses[1] < losses[0] and errors[1] < errors[0]
    is_used = is_used and held_out_log_loss(labels, probabilities) < losses[0]
    used = calibrated if is_used else probabilities
    return Calibration(
        temperature=fitted if is_used else 1.0,
        fitted_temperature=fitted,
        num_photos=len(labels),
        log_loss_before=losses[0],
        log_loss_after=losses[1],
        expected_calibration_error_before=errors[0],
        expected_calibration_error_after=errors[1],
        model_sha256=model_sha256,
        coverage=metrics.coverage_curve(used.max(1), used.argmax(1) == labels),
    )


def held_out_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean log loss under temperatures fitted on the other photos: cross-validation with NUM_FOLDS folds.

    labels: int (N,), in any order that does not depend on correctness; probabilities: float (N,C).
    """
    folds, total = np.arange(len(labels)) % NUM_FOLDS, 0.0
    for fold in range(min(NUM_FOLDS, len(labels))):
        held_out, others = folds == fold, folds != fold
        temperature = fit_temperature(labels[others], probabilities[others]) if others.any() else 1.0
        total += log_loss(labels[held_out], probabilities[held_out], temperature) * held_out.sum()
    return total / len(labels)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the temperature from MIN_TEMPERATURE to MAX_TEMPERATURE with the least mean log loss.

    labels: int (N,); probabilities: float (N,C), whose logarithms are logits up to a constant per row. The loss is
    convex in 1 / temperature, so its minimum is unique.
    """
    assert len(labels) == len(probabilities) > 0, (len(labels), len(probabilities))
    result = minimize_scalar(
        lambda log_temperature: log_loss(labels, probabilities, np.exp(log_temperature)),
        bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(result.x))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log(probabilities) / temperature), float64 (N,C). probabilities: float (N,C)."""
    return np.exp(_scaled_log_softmax(probabilities, temperature))


def log_loss(labels: np.ndarray, probabilities: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood, in nats, of labels (N,) under float (N,C) at a temperature."""
    return float(-_scaled_log_softmax(probabilities, temperature)[np.arange(len(labels)), labels].mean())


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the expected calibration error of labels, int (N,), and probabilities, float (N,C), as in the report."""
    correct = probabilities.argmax(1) == labels
    return metrics.expected_calibration_error(metrics.calibration_bins(probabilities.max(1), correct))


def _scaled_log_softmax(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    # Probabilities that underflowed to 0 are replaced by the smallest normal float32.
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
