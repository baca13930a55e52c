"""Calibration of probabilities by temperature scaling (Guo et al., 2017, ICML), fitted on the val photos.

Networks are overconfident on photos outside their train split, or underconfident after label smoothing. The logits are
divided by one scalar, the temperature. This does not change the order of the classes, and so no prediction.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from carclass import storage
from carclass.data import formats
from carclass.evaluation import metrics

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Bounds of the fit: if every val photo is classified correctly, the loss has no minimum."""
FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A temperature, with the metrics on the val photos before and after; log losses are in nats."""

    temperature: float
    num_photos: int
    log_loss_before: float
    log_loss_after: float
    expected_calibration_error_before: float
    expected_calibration_error_after: float
    model_sha256: str


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, model_sha256: str) -> Calibration:
    """Fit the calibration of a network. labels: int (N,); probabilities: float (N,C), uncalibrated."""
    temperature = fit_temperature(labels, probabilities)
    return Calibration(
        temperature=temperature,
        num_photos=len(labels),
        log_loss_before=log_loss(labels, probabilities),
        log_loss_after=log_loss(labels, probabilities, temperature),
        expected_calibration_error_before=calibration_error(labels, probabilities),
        expected_calibration_error_after=calibration_error(labels, apply_temperature(probabilities, temperature)),
        model_sha256=model_sha256,
    )


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


def read_calibration(run_uri: str, model_sha256: str) -> Calibration | None:
    """Read the calibration of a run; return None if there is none, or it belongs to another network."""
    uri = storage.join(run_uri, FILE)
    try:
        values = formats.read(uri, "calibration")
    except FileNotFoundError:
        return None
    calibration = formats.build(Calibration, values, "calibration", uri)
    return calibration if calibration.model_sha256 == model_sha256 else None


def write_calibration(run_uri: str, calibration: Calibration) -> None:
    """Write the calibration of a run."""
    formats.write(storage.join(run_uri, FILE), "calibration", dataclasses.asdict(calibration))


def _scaled_log_softmax(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    # Probabilities that underflowed to 0 are replaced by the smallest normal float32.
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
