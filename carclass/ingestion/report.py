"""Report of a dataset as one HTML file: its classes, splits and sizes, sample photos, and what was set aside."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from carclass.data.dataset import SPLITS
from carclass.reporting import page

FEW_VAL = 10
"""Val photos below which the accuracy of a class is coarse."""


class Sample(NamedTuple):
    """A photo to look at."""

    key: str
    jpeg: bytes


class Rejected(NamedTuple):
    """A quarantined input."""

    key: str
    reason: str
    detail: str
    jpeg: bytes | None  # None if the photo cannot be shown


@dataclass(kw_only=True, slots=True)
class DatasetReport:
    """Contents of the page."""

    title: str
    facts: list[tuple[str, str]]
    """(name, value) pairs for the head: source, settings."""
    classes: dict[str, dict[str, int]]
    """Class → split → photos."""
    sides: dict[str, int]
    """Range of the longer side in pixels → photos, in ascending order."""
    samples: dict[str, list[Sample]]
    """Class → photos; the first classes only, if there are many."""
    reasons: dict[str, int]
    """Reason → quarantined inputs. May be empty."""
    rejected: list[Rejected]
    """The first quarantined inputs, of every reason."""


def render(report: DatasetReport) -> str:
    """Render the page as one HTML document with embedded photos."""
    sizes = {name: sum(counts.values()) for name, counts in report.classes.items()}
    by_size = sorted(report.classes, key=lambda name: (sizes[name], name))
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=report.title,
        facts=report.facts,
        report=report,
        splits=SPLITS,
        totals={split: sum(counts.get(split, 0) for counts in report.classes.values()) for split in SPLITS},
        sizes=sizes,
        by_size=by_size,
        few_val=FEW_VAL,
        few=[name for name in by_size if report.classes[name].get("val", 0) < FEW_VAL],
    )
