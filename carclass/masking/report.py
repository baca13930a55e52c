"""Report of a masking job as one HTML file: detections, their confidence, and doubtful photos."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from carclass.data import photo
from carclass.formatting import count_text
from carclass.masking.contact_sheet import MaskedPhoto, draw_panel
from carclass.reporting import page, svg
from carclass.reporting.svg import BOTTOM, LEFT, RIGHT, TOP

NUM_BINS = 20
SMALL_AREA = 0.1
"""Share of the photo below which a vehicle counts as too small."""
JPEG_QUALITY = 75  # about 25 KB per panel, so that 90 of them stay below 5 MB

FLAGS = {
    "several_vehicles": ("Another vehicle is at least half as large", "mask.exclude.several_vehicles"),
    "touches_border": ("The vehicle touches the photo's edge", "mask.exclude.touches_border"),
}
"""Flag → its description and the setting that excludes such photos."""


@dataclass(kw_only=True, slots=True)
class MaskingReport:
    """Contents of the page. Histograms are counts from `histogram`, over the photos with a vehicle."""

    title: str
    facts: list[tuple[str, str]]
    """(name, value) pairs for the head: source, detector, settings."""
    outcomes: dict[str, int]
    """`vehicle` and `no_vehicle` → photos of the dataset."""
    quarantined: dict[str, int]
    """Reason → quarantined photos. May be empty."""
    flags: dict[str, int]
    """Flag (`several_vehicles`, `touches_border`) → photos with it."""
    classes: dict[str, int]
    """Vehicle class → photos."""
    scores: list[int]
    areas: list[int]
    """Share of the photo covered by the vehicle."""
    stabilities: list[int]
    """All zero for a detector without masks."""
    mean_iou: float | None
    """Mean intersection over union with the true masks; None without true masks."""
    ious: list[int]
    """All zero without true masks."""
    doubtful: list[MaskedPhoto]
    """Worst first: by IoU if true masks are known, else by overview.doubt_scores; at most 50. May be empty."""
    sheet: list[MaskedPhoto]
    """Random sample of all photos; at most 40. May be empty."""

    def __post_init__(self) -> None:
        for counts in (self.scores, self.areas, self.stabilities, self.ious):
            assert len(counts) == NUM_BINS, counts


def histogram(values: np.ndarray) -> list[int]:
    """Count float (N,) values in NUM_BINS equal bins from 0 to 1, ignoring NaN. Counts of parts can be added."""
    known = np.clip(values[~np.isnan(values)], 0, 1)
    return np.histogram(known, NUM_BINS, (0, 1))[0].tolist()


def render(report: MaskingReport) -> str:
    """Render the page as one HTML document with embedded photos."""
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=report.title,
        facts=report.facts,
        report=report,
        num_photos=sum(report.outcomes.values()),
        num_vehicles=report.outcomes.get("vehicle", 0),
        flags=[(*FLAGS.get(flag, (flag.replace("_", " "), "")), count) for flag, count in report.flags.items()],
        limits=_exclusion_counts(report),
        chart=histogram_chart,
        median=_median,
        picture=lambda masked: photo.encode(draw_panel(masked), quality=JPEG_QUALITY),
    )


def histogram_chart(counts: list[int], name: str) -> Markup:
    """Draw counts in equal bins from 0 to 1, with cumulative counts as tooltips.

    Columns of non-empty bins are at least 2 pixels high, so that a single photo of many is visible.
    """
    total, width = sum(counts), (RIGHT - LEFT) / len(counts)
    ticks = svg.nice_ticks(max(counts) / total)
    column = Markup(
        '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
        "<title>{:.2f} to {:.2f}: {:,} of {}; {:,} below {:.2f}</title></rect>"
    )
    parts = [svg.horizontal_grid(ticks, True)]
    for i, count in enumerate(counts):
        if count:
            height = max(2.0, (BOTTOM - TOP) * count / total / ticks[-1])
            lower, upper = i / len(counts), (i + 1) / len(counts)
            box = (LEFT + i * width + 1, BOTTOM - height, width - 2, height)
            parts.append(
                column.format(*box, lower, upper, count, count_text(total, "photo"), sum(counts[: i + 1]), upper)
            )
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(svg.text("tick middle", LEFT + (RIGHT - LEFT) * tick, BOTTOM + 17, f"{tick:g}"))
    parts.append(svg.axis_name(name))
    return svg.drawing(f"share of {count_text(total, 'photo')} by {name}", parts)


def _median(counts: list[int]) -> float:
    """Return the lower edge of the median's bin: at least half of the photos have this value or more."""
    return int(np.searchsorted(np.cumsum(counts), sum(counts) / 2, side="right")) / len(counts)


def _exclusion_counts(report: MaskingReport) -> list[tuple[float, list[int]]]:
    """Return (limit, photos below it by area, stability and score) for each bin's upper edge with any such photo."""
    measures = (report.areas, report.stabilities, report.scores)
    rows = [((i + 1) / NUM_BINS, [sum(counts[: i + 1]) for counts in measures]) for i in range(NUM_BINS - 1)]
    return [(limit, below) for limit, below in rows if any(below)]
