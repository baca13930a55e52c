"""Calibration of probabilities by temperature scaling (Guo et al., 2017, ICML), fitted on the val photos.

Networks are overconfident on photos outside their train split, or underconfident after label smoothing. The logits are
divided by one scalar, the temperature. This does not change the order of the classes, and so no prediction.
"""

import numpy as np

from carclass.evaluation import metrics
from carclass.runs.calibration_record import MIN_USED_TEMPERATURE, Calibration, refuse_sharpening

MIN_TEMPERATURE, MAX_TEMPERATURE = MIN_USED_TEMPERATURE / 2, 20.0
"""Bounds of the fit: if every val photo is classified correctly, the loss has no minimum."""
NUM_FOLDS = 5
SIGNIFICANCE = 0.05
"""Largest probability that photos left out of the fit improve as much as they do by chance."""


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, model_sha256: str) -> Calibration:
    """Fit the calibration of a network. labels: int (N,); probabilities: float (N,C), uncalibrated.

    The temperature is used only if nothing speaks against it, see _find_objection.
    """
    fitted = fit_temperature(labels, probabilities)
    calibrated = apply_temperature(probabilities, fitted)
    errors = calibration_error(labels, probabilities), calibration_error(labels, calibrated)
    objection = _find_objection(labels, probabilities, fitted, errors)
    used = probabilities if objection else calibrated
    return Calibration(
        temperature=1.0 if objection else fitted,
        fitted_temperature=fitted,
        num_photos=len(labels),
        log_loss_before=log_loss(labels, probabilities),
        log_loss_after=log_loss(labels, probabilities, fitted),
        expected_calibration_error_before=errors[0],
        expected_calibration_error_after=errors[1],
        model_sha256=model_sha256,
        coverage=metrics.coverage_curve(used.max(1), used.argmax(1) == labels),
        objection=objection,
    )


def _find_objection(
    labels: np.ndarray, probabilities: np.ndarray, fitted: float, errors: tuple[float, float]
) -> str | None:
    """Return the reason not to use a fitted temperature; None if there is none. errors: before and after it."""
    if fitted <= MIN_USED_TEMPERATURE:
        return "it is near the lower bound of the fit, as if every photo were classified correctly"
    accuracy = float((probabilities.argmax(1) == labels).mean())
    if (objection := refuse_sharpening(fitted, len(labels), accuracy)) is not None:
        return objection
    if errors[1] >= errors[0]:
        return f"it would change the calibration error from {errors[0]:.3f} to {errors[1]:.3f}"
    if not improves_others(labels, probabilities):
        return "it does not improve val photos that are left out of its fit beyond chance"
    return None


def improves_others(labels: np.ndarray, probabilities: np.ndarray) -> bool:
    """Return True if temperatures fitted on some photos lower the log loss of the others beyond chance.

    Every photo is left out of one of NUM_FOLDS fits; a one-sided t-test of the differences decides. labels: int (N,),
    in any order that does not depend on correctness; probabilities: float (N,C).
    """
    from scipy.stats import t as student  # late: predictions do without it, and it takes a second

    if len(labels) < 2:
        return False
    folds, gains = np.arange(len(labels)) % NUM_FOLDS, np.zeros(len(labels))
    for fold in range(min(NUM_FOLDS, len(labels))):
        held_out, others = folds == fold, folds != fold
        temperature = fit_temperature(labels[others], probabilities[others])
        parts = labels[held_out], probabilities[held_out]
        gains[held_out] = log_losses(*parts) - log_losses(*parts, temperature)
    error = gains.std(ddof=1) / np.sqrt(len(labels))
    return bool(gains.mean() > student.ppf(1 - SIGNIFICANCE, len(labels) - 1) * error)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the temperature from MIN_TEMPERATURE to MAX_TEMPERATURE with the least mean log loss.

    labels: int (N,); probabilities: float (N,C), whose logarithms are logits up to a constant per row. The loss is
    convex in 1 / temperature, so its minimum is unique.
    """
    from scipy.optimize import minimize_scalar  # late, as above

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
    return float(log_losses(labels, probabilities, temperature).mean())


def log_losses(labels: np.ndarray, probabilities: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the negative log-likelihood of each label, in nats, float64 (N,); see log_loss."""
    return -_scaled_log_softmax(probabilities, temperature)[np.arange(len(labels)), labels]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the expected calibration error of labels, int (N,), and probabilities, float (N,C), as in the report."""
    correct = probabilities.argmax(1) == labels
    return metrics.expected_calibration_error(metrics.calibration_bins(probabilities.max(1), correct))


def _scaled_log_softmax(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    # Probabilities that underflowed to 0 are replaced by the smallest normal float32.
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
