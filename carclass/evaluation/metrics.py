"""Classification metrics: functions from labels and predicted probabilities to plain JSON data.

The report shows these numbers and `metrics.json` stores them.
"""

import math
from typing import Any

import numpy as np

NUM_CALIBRATION_BINS = 15  # as in Guo et al., 2017, for comparability
NUM_CONFUSED_PAIRS = 20
THRESHOLDS = (*(step / 20 for step in range(20)), 0.99)
"""Confidences from which predictions may be accepted."""
TOP_K = 5
Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def classification_metrics(labels: np.ndarray, probabilities: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """Compute all metrics of int (N,) labels and float (N,C) probabilities over C class names.

    The result is JSON-serialisable; all rates are fractions:
    - `num_photos`, `num_classes`, `accuracy` and `accuracy_interval`, its 95 % Wilson interval;
    - `top5_accuracy`: the label is among the `top5_k` = min(5, C) most probable classes, so it is 1 for C <= 5;
    - `log_loss` in nats, and `expected_calibration_error` with the `calibration_bins` it is computed from;
    - `per_class`: name, precision, recall, f1 and support of every class in order, including those without photos;
    - `macro_average`, `weighted_average` of the same, as in scikit-learn's `classification_report`: a class without
      photos counts as 0 in the macro average;
    - `coverage`, a `coverage_curve`, and `most_confused_pairs`: see the functions.

    Raise ValueError if shapes do not match, there are no rows, a label is out of range, class names repeat, or a row
    is not a probability distribution (NaN, negative, does not sum to 1).
    """
    _check_names(class_names)
    num_classes = len(class_names)
    probabilities = _checked_probabilities(probabilities, num_classes)
    _check_indices("labels", labels, num_classes)
    if len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels but {len(probabilities)} rows of probabilities: pass one each")

    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predicted == labels
    bins = calibration_bins(confidence, correct)
    top_k = min(TOP_K, num_classes)
    return {
        "num_photos": len(labels),
        "num_classes": num_classes,
        "accuracy": float(correct.mean()),
        "accuracy_interval": list(wilson_interval(int(correct.sum()), len(labels))),
        "top5_k": top_k,
        "top5_accuracy": _top_k_accuracy(labels, probabilities, top_k),
        "coverage": coverage_curve(confidence, correct),
        "log_loss": _log_loss(labels, probabilities),
        "expected_calibration_error": expected_calibration_error(bins),
        "calibration_bins": bins,
        **_averages_and_classes(labels, predicted, class_names),
        "most_confused_pairs": most_confused_pairs(confusion_matrix(labels, predicted, num_classes), class_names),
    }


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count labels against predictions: int64 (C,C), row = true label, column = predicted class.

    `labels` and `predicted` are int (N,) in [0, num_classes). Raise ValueError otherwise.
    """
    _check_indices("labels", labels, num_classes)
    _check_indices("predicted", predicted, num_classes)
    if len(labels) != len(predicted):
        raise ValueError(f"{len(labels)} labels but {len(predicted)} predictions: pass one each")
    cells = labels.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).astype(np.int64).reshape(num_classes, num_classes)


def most_confused_pairs(confusion: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """Return the largest off-diagonal cells, at most 20: label, predicted, count, share.

    `share` is the fraction of the label's photos. Ordered by count, then share, then class order, so that the list is
    deterministic.
    """
    support = confusion.sum(axis=1)
    rows, columns = np.nonzero(confusion - np.diag(np.diag(confusion)))
    counts = confusion[rows, columns]
    shares = counts / support[rows]
    order = np.lexsort((columns, rows, -shares, -counts))[:NUM_CONFUSED_PAIRS]
    return [
        {
            "label": class_names[rows[i]],
            "predicted": class_names[columns[i]],
            "count": int(counts[i]),
            "share": float(shares[i]),
        }
        for i in order
    ]


def wilson_interval(num_correct: int, num_photos: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion as (low, high); Wilson, 1927, JASA 22:209-212.

    Unlike the normal approximation it stays within [0, 1] and is valid for few photos and for accuracies near 1.
    It assumes independent photos: with many near-duplicates it is too narrow.
    """
    share, z2 = num_correct / num_photos, Z_95**2
    centre = (share + z2 / (2 * num_photos)) / (1 + z2 / num_photos)
    spread = math.sqrt(share * (1 - share) / num_photos + z2 / (4 * num_photos**2))
    half_width = Z_95 / (1 + z2 / num_photos) * spread
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Bin photos into 15 equal intervals of confidence: lower, upper, count, mean confidence, accuracy.

    `confidence` is float (N,) in [0, 1], `correct` bool (N,). A bin is (lower, upper]; the first one includes 0.
    An empty bin has None for confidence and accuracy.
    """
    edges = np.linspace(0, 1, NUM_CALIBRATION_BINS + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, NUM_CALIBRATION_BINS - 1)
    bins = []
    for i in range(NUM_CALIBRATION_BINS):
        inside = index == i
        count = int(inside.sum())
        bins.append(
            {
                "lower": float(edges[i]),
                "upper": float(edges[i + 1]),
                "count": count,
                "confidence": float(confidence[inside].mean()) if count else None,
                "accuracy": float(correct[inside].mean()) if count else None,
            }
        )
    return bins


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Return the mean gap between confidence and accuracy over `calibration_bins`, weighted by photos.

    Naeini et al., 2015 (AAAI); on the top class: Guo et al., 2017 (ICML).
    """
    filled = [b for b in bins if b["count"]]
    gaps = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in filled)
    return float(gaps / sum(b["count"] for b in filled))


def coverage_curve(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Return the photos accepted at each of THRESHOLDS: threshold, count, coverage, their accuracy.

    `confidence` is float (N,) in [0, 1], `correct` bool (N,). A photo is accepted if its confidence is not below the
    threshold; `coverage` is the share of these. Without any, the accuracy is None.
    """
    curve = []
    for threshold in THRESHOLDS:
        accepted = correct[confidence >= threshold]
        count, coverage = len(accepted), len(accepted) / len(correct)
        accuracy = float(accepted.mean()) if count else None
        curve.append({"threshold": threshold, "count": count, "coverage": coverage, "accuracy": accuracy})
    return curve


def find_threshold(curve: list[dict[str, Any]], accuracy: float) -> dict[str, Any] | None:
    """Return the row of the lowest threshold whose accepted photos have at least an accuracy; None without."""
    return next((row for row in curve if row["count"] and row["accuracy"] >= accuracy), None)


def _averages_and_classes(labels: np.ndarray, predicted: np.ndarray, class_names: list[str]) -> dict[str, Any]:
    """Return precision, recall, F1 and support per class, and their averages."""
    # By index, not by name: a class named "accuracy" would overwrite the report's own entry.
    from sklearn.metrics import classification_report  # imported late: it takes seconds, and listing runs needs none

    report = classification_report(labels, predicted, labels=range(len(class_names)), output_dict=True, zero_division=0)

    def scores(key: str) -> dict[str, Any]:
        row = report[key]
        return {
            "precision": float(row["precision"]),
            "recall": float(row["recall"]),
            "f1": float(row["f1-score"]),
            "support": int(row["support"]),
        }

    return {
        "macro_average": scores("macro avg"),
        "weighted_average": scores("weighted avg"),
        "per_class": [{"name": name, **scores(str(i))} for i, name in enumerate(class_names)],
    }


def _top_k_accuracy(labels: np.ndarray, probabilities: np.ndarray, k: int) -> float:
    # A stable sort breaks ties as argmax does, so that top-1 equals the accuracy and constant outputs gain nothing.
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((top == labels[:, None]).any(axis=1).mean())


def _log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    label_probabilities = probabilities[np.arange(len(labels)), labels]
    # Probabilities that underflow to 0 would make the mean infinite; scikit-learn clips at the same value.
    return float(-np.log(np.clip(label_probabilities, np.finfo(np.float32).eps, 1)).mean())


def _check_names(class_names: list[str]) -> None:
    if len(set(class_names)) != len(class_names):
        repeated = sorted({name for name in class_names if class_names.count(name) > 1})
        raise ValueError(f"class names must be unique, but these occur more than once: {repeated}")


def _check_indices(name: str, indices: np.ndarray, num_classes: int) -> None:
    """Raise ValueError unless `indices` is a non-empty int (N,) array of classes; `name` is for the message."""
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape (N,), got {indices.dtype} of shape {indices.shape}")
    if not len(indices):
        raise ValueError(f"no {name} to evaluate: check that the split has photos")
    outside = np.flatnonzero((indices < 0) | (indices >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"{name}: row {row} holds class {int(indices[row])}, outside 0 to {num_classes - 1} "
            f"({len(outside)} such rows); pass labels and class names of the same dataset"
        )


def _checked_probabilities(probabilities: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float64 (N,C) rows normalised to sum to 1; raise ValueError with the first invalid row."""
    if probabilities.ndim != 2 or probabilities.shape[1] != num_classes:
        raise ValueError(
            f"probabilities must be (N, {num_classes}) for {num_classes} class names, got {probabilities.shape}"
        )
    if not len(probabilities):
        raise ValueError("no rows of probabilities to evaluate: check that the split has photos")
    rows = probabilities.astype(np.float64)
    not_finite = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(not_finite):
        raise ValueError(
            f"probabilities hold NaN or infinity in {len(not_finite)} rows, first in row "
            f"{int(not_finite[0])}; did training diverge?"
        )
    sums = rows.sum(axis=1)
    # Softmax in bfloat16 deviates by up to about half a percent; logits by far more.
    invalid = np.flatnonzero((rows < 0).any(axis=1) | (np.abs(sums - 1) > 0.01))
    if len(invalid):
        raise ValueError(
            f"probabilities: row {int(invalid[0])} has a negative value or sums to {sums[invalid[0]]:.4g}, not 1 "
            f"({len(invalid)} such rows); pass softmax outputs, not logits"
        )
    return rows / sums[:, None]
