"""One evaluation as one HTML file: no network, no files beside it, readable in light, dark and on paper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carclass.evaluation import charts
from carclass.reporting import page

LARGEST_CONFUSION_TABLE = 24
"""Classes up to which the confusion is a table of numbers; more would not fit a page and become a picture."""


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
    """A photo that was given the wrong class."""

    photo: bytes
    """JPEG file, embedded as it is: about 300 pixels wide is enough."""
    key: str
    """Source key of the photo."""
    label: str
    predicted: str
    confidence: float
    """Probability of the predicted class, 0 to 1."""


@dataclass(kw_only=True, slots=True)
class Report:
    """Everything the page shows; nothing is computed from photos or models here."""

    title: str
    facts: list[tuple[str, str]]
    """What was evaluated, as (name, value): run, dataset, parent, code version, seed."""
    metrics: dict[str, Any]
    """As `classification_metrics` returns it."""
    class_names: list[str]
    confusion: np.ndarray
    """int64 (C, C), row = true label, column = predicted class."""
    history: dict[str, list[dict[str, Any]]]
    """Stage name → one dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, lr, seconds.

    Stages are in the order in which they ran. May be empty.
    """
    masking: list[MaskingSample]
    """May be empty."""
    mistakes: list[Mistake]
    """Worst first. May be empty."""
    quarantined: dict[str, int]
    """Reason → number of photos of the dataset that were set aside. May be empty."""

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        assert self.confusion.shape == (num_classes, num_classes), self.confusion.shape
        assert [row["name"] for row in self.metrics["per_class"]] == self.class_names


def render(report: Report) -> str:
    """Return the page as one HTML document, with every photo inside it as a data: URI."""
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=report.title,
        facts=report.facts,
        report=report,
        metrics=report.metrics,
        classes=_weakest_first(report.metrics["per_class"]),
        class_numbers={name: i + 1 for i, name in enumerate(report.class_names)},
        best=charts.best_epoch(report.history),
        charts=charts,
        summary=_summary(report.metrics),
        confusion_as_table=len(report.class_names) <= LARGEST_CONFUSION_TABLE,
    )


def _summary(metrics: dict[str, Any]) -> dict[str, int | float]:
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
    """Order classes by F1, the weakest first; classes without photos have nothing to say and come last."""
    return sorted(per_class, key=lambda row: (row["support"] == 0, row["f1"]))
