"""How far a probability can be believed: temperature scaling (Guo et al., 2017, ICML), fitted on the val photos.

A network's probabilities are those of its training, in which it came to be too sure (or, by label smoothing, not sure
enough). One number, the temperature, divides its logits so that they fit photos that it was not trained on. The order
of the classes stays, so no answer changes.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from carclass import storage
from carclass.evaluation import metrics

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the temperature: where every val photo is right, colder would be better without end."""
FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it did on the val photos that it was fitted on; log losses are in nats."""

    temperature: float
    num_photos: int
    log_loss_before: float
    log_loss_after: float
    expected_calibration_error_before: float
    expected_calibration_error_after: float
    model_sha256: str


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature at which the mean log loss is least, from COLDEST to HOTTEST.

    labels: int (N,); probabilities: float (N,C), whose logarithms are logits but for a constant in each row. In
    1 / temperature the loss is convex, so it has a single minimum.
    """
    assert len(labels) == len(probabilities) > 0, (len(labels), len(probabilities))
    bounds = (np.log(COLDEST), np.log(HOTTEST))
    found = minimize_scalar(
        lambda log_temperature: log_loss(labels, probabilities, np.exp(log_temperature)),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """float64 (N,C): softmax(log p / temperature) of probabilities, float (N,C)."""
    return np.exp(_log_apply(probabilities, temperature))


def log_loss(labels: np.ndarray, probabilities: np.ndarray, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood in nats of the labels, int (N,), at a temperature."""
    return float(-_log_apply(probabilities, temperature)[np.arange(len(labels)), labels].mean())


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The expected calibration error of labels, int (N,), and probabilities, float (N,C), as the report has it."""
    correct = probabilities.argmax(1) == labels
    return metrics.expected_calibration_error(metrics.calibration_bins(probabilities.max(1), correct))


def fit(labels: np.ndarray, probabilities: np.ndarray, model_sha256: str) -> Calibration:
    """The calibration of a network from labels, int (N,), and what it said of their photos, float (N,C)."""
    temperature = fit_temperature(labels, probabilities)
    return Calibration(
        temperature=temperature,
        num_photos=len(labels),
        log_loss_before=log_loss(labels, probabilities),
        log_loss_after=log_loss(labels, probabilities, temperature),
        expected_calibration_error_before=calibration_error(labels, probabilities),
        expected_calibration_error_after=calibration_error(labels, apply(probabilities, temperature)),
        model_sha256=model_sha256,
    )


def read(run_uri: str, model_sha256: str) -> Calibration | None:
    """What was kept of a run; None where nothing was, or its network was another one then."""
    try:
        kept: dict[str, Any] = json.loads(storage.read_bytes(storage.join(run_uri, FILE)))
    except FileNotFoundError:
        return None
    return Calibration(**kept) if kept["model_sha256"] == model_sha256 else None


def write(run_uri: str, found: Calibration) -> None:
    """Keeps a calibration with its run."""
    storage.write_bytes(storage.join(run_uri, FILE), json.dumps(dataclasses.asdict(found), indent=1).encode())


def _log_apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    # A probability that underflowed to 0 counts as the smallest that a float32 can be.
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
