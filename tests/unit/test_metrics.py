"""Classification metrics against manually counted cases and scikit-learn."""

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from carclass.evaluation.metrics import (
    calibration_bins,
    classification_metrics,
    confusion_matrix,
    coverage_curve,
    expected_calibration_error,
    find_threshold,
    most_confused_pairs,
    wilson_interval,
)
from carclass.evaluation.tables import classification_report


def one_hot(predicted: list[int], num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=np.float32)[predicted]


def random_case(num_photos: int, num_classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(7)
    labels = generator.integers(0, num_classes, num_photos)
    logits = generator.normal(size=(num_photos, num_classes))
    logits[np.arange(num_photos), labels] += 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities.astype(np.float32), [f"class {i}" for i in range(num_classes)]


def test_accuracy_counts_the_photos_whose_most_probable_class_is_the_label():
    result = classification_metrics(np.array([0, 1, 2, 2]), one_hot([0, 1, 2, 0], 3), ["a", "b", "c"])
    assert result["accuracy"] == 0.75


def test_a_result_is_unchanged_by_a_json_round_trip():
    result = classification_metrics(*random_case(50, 4))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_top5_accuracy_agrees_with_sklearn():
    labels, probabilities, names = random_case(400, 12)
    expected = sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5)
    assert classification_metrics(labels, probabilities, names)["top5_accuracy"] == pytest.approx(expected)


def test_top5_accuracy_of_three_classes_reports_k_three():
    result = classification_metrics(*random_case(20, 3))
    assert (result["top5_k"], result["top5_accuracy"]) == (3, 1.0)


def test_constant_probabilities_gain_nothing_from_ties():
    labels = np.arange(10)
    result = classification_metrics(labels, np.full((10, 10), 0.1, np.float32), [str(i) for i in range(10)])
    assert (result["accuracy"], result["top5_accuracy"]) == (0.1, 0.5)


def test_log_loss_agrees_with_sklearn():
    labels, probabilities, names = random_case(300, 6)
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(axis=1, keepdims=True)
    expected = sklearn_metrics.log_loss(labels, exact, labels=range(6))
    assert classification_metrics(labels, probabilities, names)["log_loss"] == pytest.approx(expected, rel=1e-6)


def test_log_loss_is_finite_if_the_label_has_probability_zero():
    result = classification_metrics(np.array([0]), one_hot([1], 2), ["a", "b"])
    assert result["log_loss"] == pytest.approx(-math.log(np.finfo(np.float32).eps))


def test_macro_f1_agrees_with_sklearn():
    labels, probabilities, names = random_case(300, 6)
    expected = sklearn_metrics.f1_score(labels, probabilities.argmax(axis=1), average="macro")
    assert classification_metrics(labels, probabilities, names)["macro_average"]["f1"] == pytest.approx(expected)


def test_per_class_metrics_match_a_manual_count():
    labels, predicted = np.array([0, 0, 0, 1]), [0, 0, 1, 1]
    first = classification_metrics(labels, one_hot(predicted, 2), ["a", "b"])["per_class"][0]
    assert first == {"name": "a", "precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8, "support": 3}


def test_a_class_without_photos_is_listed_with_zero_support():
    result = classification_metrics(np.array([0, 1]), one_hot([0, 1], 3), ["a", "b", "unseen"])
    assert result["per_class"][2] == {"name": "unseen", "precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_a_class_may_have_the_name_of_a_metric():
    result = classification_metrics(np.array([0, 1]), one_hot([0, 1], 2), ["accuracy", "macro avg"])
    assert [row["name"] for row in result["per_class"]] == ["accuracy", "macro avg"]


def test_wilson_interval_of_a_published_example():
    # Newcombe, 1998, Statistics in Medicine 17:857-872, table I, method 3: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_interval_of_all_correct_ends_at_one_with_positive_width():
    low, high = wilson_interval(10, 10)
    assert high == pytest.approx(1)
    assert 0.6 < low < 0.8


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence, correct = np.full(10, 0.9), np.array([True] * 6 + [False] * 4)
    assert expected_calibration_error(calibration_bins(confidence, correct)) == pytest.approx(0.3)


def test_calibration_error_weights_bins_by_photos():
    confidence = np.array([0.5, 0.5, 0.5, 0.95])
    correct = np.array([False, False, False, True])
    error = expected_calibration_error(calibration_bins(confidence, correct))
    assert error == pytest.approx((3 * 0.5 + 1 * 0.05) / 4)


def test_every_confidence_falls_into_one_of_fifteen_bins():
    confidence = np.array([0.0, 1 / 15, 0.5, 1.0])
    bins = calibration_bins(confidence, np.ones(4, bool))
    assert [i for i, b in enumerate(bins) if b["count"]] == [0, 7, 14]
    assert sum(b["count"] for b in bins) == 4


def test_confusion_matrix_has_labels_in_rows_and_predictions_in_columns():
    matrix = confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 2]), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    assert matrix.dtype == np.int64


def test_confused_pairs_are_sorted_by_count_then_share():
    confusion = np.array([[8, 2, 0], [0, 0, 2], [3, 0, 1]])
    pairs = [
        (p["label"], p["predicted"], p["count"], p["share"]) for p in most_confused_pairs(confusion, ["a", "b", "c"])
    ]
    assert pairs == [("c", "a", 3, 0.75), ("b", "c", 2, 1.0), ("a", "b", 2, 0.2)]


def test_confused_pairs_are_limited_to_twenty():
    confusion = np.ones((10, 10), np.int64)
    assert len(most_confused_pairs(confusion, [str(i) for i in range(10)])) == 20


def test_a_perfect_model_has_no_confused_pairs():
    result = classification_metrics(np.array([0, 1]), one_hot([0, 1], 2), ["a", "b"])
    assert result["most_confused_pairs"] == []


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.array([0, 1]), one_hot([0], 2), "2 labels but 1 rows"),
        (np.array([0]), one_hot([0], 3), r"\(N, 2\) for 2 class names, got \(1, 3\)"),
        (np.array([2]), one_hot([0], 2), "row 0 holds class 2, outside 0 to 1"),
        (np.array([-1]), one_hot([0], 2), "row 0 holds class -1"),
        (np.array([0.0]), one_hot([0], 2), "must be integers"),
        (np.array([[0]]), one_hot([0], 2), r"must be integers of shape \(N,\)"),
        (np.array([], int), np.zeros((0, 2), np.float32), "no rows of probabilities"),
        (np.array([0, 0]), np.array([[1, 0], [np.nan, 1]]), "NaN or infinity in 1 rows, first in row 1"),
        (np.array([0]), np.array([[4.0, -2.0]]), "pass softmax outputs, not logits"),
    ],
)
def test_invalid_arrays_are_rejected(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities, ["a", "b"])


def test_repeated_class_names_are_rejected():
    with pytest.raises(ValueError, match=r"more than once: \['a'\]"):
        classification_metrics(np.array([0]), one_hot([0], 2), ["a", "a"])


def test_predictions_out_of_range_are_rejected():
    with pytest.raises(ValueError, match="predicted: row 1 holds class 5"):
        confusion_matrix(np.array([0, 1]), np.array([0, 5]), 2)


# Coverage by threshold


def test_photos_below_a_threshold_are_not_accepted():
    curve = coverage_curve(np.array([0.3, 0.5, 0.5, 0.97]), np.array([False, True, False, True]))
    rows = {row["threshold"]: row for row in curve}
    assert rows[0.0] == {"threshold": 0.0, "count": 4, "coverage": 1.0, "accuracy": 0.5}
    assert (rows[0.5]["count"], rows[0.5]["accuracy"]) == (3, pytest.approx(2 / 3))
    assert (rows[0.55]["coverage"], rows[0.55]["accuracy"]) == (0.25, 1.0)


def test_a_threshold_that_accepts_no_photo_has_no_accuracy():
    assert coverage_curve(np.array([0.5]), np.array([True]))[-1]["accuracy"] is None


def test_a_confidence_in_float32_reaches_the_threshold_of_its_digits():
    confidence = np.array([0.15, 0.35, 0.85], np.float32)
    counts = {row["threshold"]: row["count"] for row in coverage_curve(confidence, np.ones(3, bool))}
    assert (counts[0.15], counts[0.35], counts[0.85]) == (3, 2, 1)


def test_the_lowest_threshold_of_an_accuracy_is_found():
    curve = coverage_curve(np.array([0.3, 0.5, 0.6, 0.97]), np.array([False, True, False, True]))
    assert find_threshold(curve, 0.5)["threshold"] == 0.0
    assert find_threshold(curve, 0.9)["threshold"] == 0.65


def test_an_accuracy_that_no_threshold_gives_is_not_found():
    assert find_threshold(coverage_curve(np.array([0.5]), np.array([False])), 0.9) is None


def test_the_coverage_is_a_part_of_the_metrics():
    labels, probabilities, names = random_case(50, 4)
    result = classification_metrics(labels, probabilities, names)
    assert result["coverage"][0]["accuracy"] == result["accuracy"]


def test_a_class_without_photos_has_no_rates_in_a_table():
    metrics = classification_metrics(np.array([0, 0, 1]), np.eye(3)[[0, 0, 1]], ["a", "b", "c"])
    table = classification_report(metrics)
    assert table.loc["c", ["precision", "recall", "f1"]].isna().all()
    assert table.loc["a", "f1"] == 1
