"""HTML report of an evaluation: one self-contained file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carclass.evaluation import charts
from carclass.evaluation.metrics import find_threshold, wilson_interval
from carclass.reporting import page
from carclass.runs.run import best_epoch_row

LARGEST_CONFUSION_TABLE = 24
"""Number of classes up to which the confusion matrix is a table; above, it is a heat map."""
WANTED_ACCURACIES = (0.9, 0.95, 0.99)
"""Accuracies of accepted photos for which the report names a threshold."""


@dataclass(kw_only=True, slots=True)
class MaskingSample:
    """A photo before and after masking."""

    caption: str
    before: bytes
    """JPEG file."""
    after: bytes
    """JPEG file."""


@dataclass(kw_only=True, slots=True)
class Mistake:
    """A misclassified photo."""

    photo: bytes
    """JPEG file, embedded unchanged; a width of about 300 pixels is enough."""
    key: str
    """Source key of the photo."""
    label: str
    predicted: str
    confidence: float
    """Probability of the predicted class, 0 to 1."""


@dataclass(kw_only=True, slots=True)
class Report:
    """Contents of the page; rendering computes nothing from photos or models."""

    title: str
    facts: list[tuple[str, str]]
    """(name, value) pairs on the evaluated model: run, dataset, parent, code version, seed."""
    split: str
    """Split of the photos: `test` or `val`."""
    model: tuple[str, int]
    """Stage and epoch of the evaluated model."""
    metrics: dict[str, Any]
    """Result of `classification_metrics`."""
    calibration: str
    """Sentence on the temperature of the probabilities."""
    val_coverage: list[dict[str, Any]]
    """Rows of `coverage_curve` of the run's val photos; empty if they are not known, or are those of the report."""
    class_names: list[str]
    confusion: np.ndarray
    """int64 (C,C), row = true label, column = predicted class."""
    history: dict[str, list[dict[str, Any]]]
    """Stage name → one dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds.

    Stages are in training order. May be empty.
    """
    masking: list[MaskingSample]
    """May be empty."""
    mistakes: list[Mistake]
    """Highest confidence first. May be empty."""
    quarantined: dict[str, dict[str, int]]
    """By dataset and the job that made it, the first one first: reason → number of photos in quarantine."""
    dataset_pages: list[tuple[str, str]]
    """(name, link) of the pages of the datasets."""
    missing_source: str | None
    """Name of the dataset that the photos were masked from, if it is gone or has changed since."""

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        assert self.confusion.shape == (num_classes, num_classes), self.confusion.shape
        assert [row["name"] for row in self.metrics["per_class"]] == self.class_names


def render(report: Report) -> str:
    """Return the page as one HTML document, with photos embedded as data URIs."""
    curves = {"val": report.val_coverage} if report.val_coverage else {}
    curves |= {report.split: report.metrics["coverage"]}
    chosen_on = next(iter(curves.values()))
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=report.title,
        facts=report.facts,
        report=report,
        metrics=report.metrics,
        classes=_weakest_first(report.metrics["per_class"]),
        class_numbers={name: i + 1 for i, name in enumerate(report.class_names)},
        ringed=charts.find_epoch(report.history, *report.model),
        best=best_epoch_row([{"stage": name, **row} for name, rows in report.history.items() for row in rows]),
        charts=charts,
        curves=curves,
        thresholds=_thresholds(chosen_on),
        summary=_summary(report.metrics),
        confusion_as_table=len(report.class_names) <= LARGEST_CONFUSION_TABLE,
    )


def _thresholds(curve: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any] | None, float]]:
    """Return wanted accuracies, the row of the lowest threshold of each, and the lower end of that row's interval.

    Of several accuracies with the same row, only the highest is returned; without a row, only the lowest.
    """
    found: dict[float | None, tuple[float, dict[str, Any] | None, float]] = {}
    for wanted in WANTED_ACCURACIES:
        if (row := find_threshold(curve, wanted)) is None:
            found.setdefault(None, (wanted, None, 0.0))
        else:
            low, _ = wilson_interval(round(row["accuracy"] * row["count"]), row["count"])
            found[row["threshold"]] = wanted, row, low
    return [*found.values()]


def _summary(metrics: dict[str, Any]) -> dict[str, int | float]:
    """Return the counts for the summary's sentences."""
    supports = [row["support"] for row in metrics["per_class"]]
    with_photos = [row for row in metrics["per_class"] if row["support"]]
    return {
        "num_correct": round(metrics["accuracy"] * metrics["num_photos"]),
        "largest_class_share": max(supports) / metrics["num_photos"],
        "num_without_photos": len(supports) - len(with_photos),
        "num_below_half": sum(row["recall"] < 0.5 for row in with_photos),
        "num_perfect": sum(row["f1"] == 1 for row in with_photos),
    }


def _weakest_first(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort classes by ascending F1; classes without photos come last."""
    return sorted(per_class, key=lambda row: (row["support"] == 0, row["f1"]))
