"""Page of an audit as one HTML file: photos with findings beside those that they resemble."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from carclass.audit.collect import AuditedPhotos
from carclass.audit.findings import Finding, Kind, count_kinds
from carclass.data import photo
from carclass.data.dataset import Dataset
from carclass.reporting import page

MAX_SHOWN = 60
"""Findings of a kind whose photos are on the page."""
SHOWN_SIDE, JPEG_QUALITY = 220, 75
KINDS: dict[Kind, tuple[str, str]] = {
    "near_duplicate": (
        "Near-duplicates",
        "The same picture twice: re-encoded, resized, cropped or mirrored. Across splits it makes figures too good; "
        "under two labels, at least one is wrong.",
    ),
    "doubtful_label": (
        "Doubtful labels",
        "Photos that a classifier trained without them puts into another class. Some are wrong labels, others are "
        "merely difficult.",
    ),
    "outlier": ("Outliers", "Photos that resemble no others: often no vehicles, or unusual views of one."),
    "dark": ("Dark photos", "The least bright first."),
    "blurred": ("Blurred photos", "The least sharp first."),
    "low_contrast": ("Photos of little contrast", "The least contrast first."),
    "small": ("Small photos", "The smallest first."),
}
"""Kind → heading and explanation."""


class ShownFinding(NamedTuple):
    """A finding on the page."""

    names: list[str]  # key, split and label of the photo, and of the one that it resembles
    photos: list[bytes]  # JPEG files
    detail: str
    suggestion: str


def write_page(source: Dataset, photos: AuditedPhotos, findings: Sequence[Finding]) -> str:
    """Return the page as HTML."""
    counts, shown = count_kinds(findings), {kind: _choose(findings, kind) for kind in KINDS}
    indices = {i for chosen in shown.values() for each in chosen for i in (each.photo, each.other) if i is not None}
    jpegs = _read_jpegs(source, photos, indices)
    return page.render(
        Path(__file__).with_name("report.html.j2"),
        title=f"Audit of {source.name}",
        facts=[("Dataset", f"{source.name} (sha256 {source.digest[:12]}…)"), ("Photos", f"{len(photos.keys):,}")],
        kinds=KINDS,
        counts=counts,
        shown={kind: [_show(photos, each, jpegs) for each in chosen] for kind, chosen in shown.items()},
        num_photos=len(photos.keys),
        num_found=len({finding.photo for finding in findings}),
    )


def _choose(findings: Sequence[Finding], kind: Kind) -> list[Finding]:
    """Return the first findings of a kind; of a pair, the first photo only."""
    chosen, pairs = list[Finding](), set[tuple[int, int | None]]()
    for each in findings:
        if each.kind == kind and (each.other, each.photo) not in pairs:
            pairs.add((each.photo, each.other))
            chosen.append(each)
    return chosen[:MAX_SHOWN]


def _read_jpegs(source: Dataset, photos: AuditedPhotos, indices: Iterable[int]) -> dict[int, bytes]:
    """Return the photos that are shown, by their index."""
    wanted = sorted(set(indices))
    rows = source.rows([photos.keys[i] for i in wanted], ["image"])
    return {
        i: photo.encode(photo.shrink(photo.decode_stored(row["image"]), SHOWN_SIDE), quality=JPEG_QUALITY)
        for i, row in zip(wanted, rows, strict=True)
    }


def _show(photos: AuditedPhotos, finding: Finding, jpegs: dict[int, bytes]) -> ShownFinding:
    indices = [finding.photo] if finding.other is None else [finding.photo, finding.other]
    names = [f"{photos.keys[i]} ({photos.splits[i]}): {photos.classes[photos.labels[i]]}" for i in indices]
    return ShownFinding(names, [jpegs[i] for i in indices], finding.detail, finding.suggestion)
