"""Page of predictions as one HTML file: photos with their most probable classes, to be filtered and reviewed."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from carclass.reporting import page


class ShownPhoto(NamedTuple):
    """A classified photo on the page."""

    key: str
    photo: bytes  # JPEG file
    cutout: bytes | None  # JPEG file of the classifier's input; None if that is the whole photo
    top: list[tuple[str, float]]  # (class, probability), best first
    rejected: bool
    detection: str | None  # in words; None for photos that are not masked


class PredictedClass(NamedTuple):
    """Photos with one predicted class."""

    name: str
    num_photos: int
    num_rejected: int
    mean_probability: float


class FailedPhoto(NamedTuple):
    """A file that could not be classified."""

    key: str
    reason: str
    detail: str


@dataclass(kw_only=True, slots=True)
class PredictionReport:
    """Contents of the page."""

    title: str
    facts: list[tuple[str, str]]
    """(name, value) pairs for the head: run, photos, threshold."""
    threshold: float
    is_calibrated: bool
    """True if a temperature is applied."""
    report_link: str | None
    """Link to the run's report, in which a threshold can be chosen; None without a report."""
    classes: list[PredictedClass]
    """Most frequent first."""
    shown: list[ShownPhoto]
    """The least certain first; a part of the classified photos, if there are many."""
    others: str | None
    """Number and names of the files that are no photos; None without any."""
    reasons: dict[str, int]
    """Reason → photos that could not be classified."""
    failed: list[FailedPhoto]
    """The first of them."""


def render(report: PredictionReport) -> str:
    """Render the page as one HTML document with embedded photos."""
    num_predicted = sum(each.num_photos for each in report.classes)
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=report.title,
        facts=report.facts,
        report=report,
        num_predicted=num_predicted,
        num_rejected=sum(each.num_rejected for each in report.classes),
        num_failed=sum(report.reasons.values()),
        shown_classes=sorted({photo.top[0][0] for photo in report.shown}),
    )
