"""Findings of an audit: photos that may be wrong, and the correction that each suggests."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from carclass.audit.collect import AuditedPhotos
from carclass.audit.label_suspects import NUM_FOLDS, Suspect, find_suspects, out_of_fold_probabilities
from carclass.audit.near_duplicates import Neighbours, Pair, find_near_duplicates, find_neighbours
from carclass.audit.photo_measures import PhotoMeasures
from carclass.data.dataset import SPLITS

log = logging.getLogger(__name__)
Kind = Literal["near_duplicate", "doubtful_label", "outlier", "dark", "blurred", "low_contrast", "small"]
MIN_SIDE, MIN_BRIGHTNESS, MIN_CONTRAST, MIN_SHARPNESS = 64, 0.12, 0.05, 0.01
"""Measures of a photo below which it is reported."""
OUTLIER_SPREADS = 6
"""Median absolute deviations below the usual similarity from which a photo is an outlier."""
LIMITS: dict[Kind, tuple[str, float]] = {
    "small": ("shorter_side", MIN_SIDE),
    "dark": ("brightness", MIN_BRIGHTNESS),
    "low_contrast": ("contrast", MIN_CONTRAST),
    "blurred": ("sharpness", MIN_SHARPNESS),
}
"""Kind → the measure that it is about, and its limit."""


class Finding(NamedTuple):
    """A photo that may be wrong."""

    kind: Kind
    photo: int  # index
    detail: str
    suggestion: str  # keep, drop, relabel:CLASS or group:NAME
    other: int | None = None  # index of the photo that it resembles
    is_leak: bool = False  # that photo is in another split


def find_all(photos: AuditedPhotos) -> list[Finding]:
    """Return the findings: near-duplicates across splits first, then those within, labels, and poor photos."""
    log.info("audit: comparing %s photos", f"{len(photos.keys):,}")
    neighbours = find_neighbours(photos.features)
    pairs = find_near_duplicates(neighbours, photos.thumbnails)
    groups = group_photos(pairs, len(photos.keys))
    log.info("audit: examining labels by classifiers of %d folds", NUM_FOLDS)
    probabilities = out_of_fold_probabilities(photos.features.astype(np.float32), photos.labels, groups)
    suspects = find_suspects(probabilities, photos.labels)
    return [
        *_near_duplicates(photos, pairs, groups),
        *(_doubtful_label(photos, suspect) for suspect in suspects),
        *_outliers(neighbours),
        *_poor_photos(photos.measures),
    ]


def group_photos(pairs: Sequence[Pair], number: int) -> np.ndarray:
    """Return the group of each photo: int (number,). Photos that a chain of pairs connects have the same."""
    firsts, seconds = ([pair[i] for pair in pairs] for i in (0, 1))
    graph = coo_matrix((np.ones(len(pairs)), (firsts, seconds)), shape=(number, number))
    return np.asarray(connected_components(graph, directed=False)[1])


def count_kinds(findings: Sequence[Finding]) -> dict[Kind, int]:
    """Return the number of photos with findings of each kind."""
    photos = {(finding.kind, finding.photo) for finding in findings}
    return dict(Counter(kind for kind, _ in photos))


def _near_duplicates(photos: AuditedPhotos, pairs: Sequence[Pair], groups: np.ndarray) -> Iterator[Finding]:
    """Yield both photos of each pair; the first key of a group is its name.

    Of photos in two splits, train before val and val before test is to be dropped.
    """
    first_keys = {int(group): photos.keys[i] for i, group in reversed(list(enumerate(groups)))}
    leaks = [photos.splits[pair.first] != photos.splits[pair.second] for pair in pairs]
    for is_leak, pair in sorted(zip(leaks, pairs, strict=True), key=lambda item: (not item[0], -item[1].match)):
        ranks = {i: SPLITS.index(photos.splits[i]) for i in pair[:2]}
        for photo, other in (pair[:2], pair[1::-1]):
            detail = f"matches {photos.keys[other]} of {photos.splits[other]} by {pair.match:.3f}"
            if photos.labels[photo] != photos.labels[other]:
                detail += f", which has the label {photos.classes[photos.labels[other]]}"
            suggestion = f"group:{first_keys[int(groups[photo])]}"
            if is_leak:
                suggestion = "drop" if ranks[photo] < ranks[other] else "keep"
            yield Finding("near_duplicate", photo, detail, suggestion, other, is_leak)


def _doubtful_label(photos: AuditedPhotos, suspect: Suspect) -> Finding:
    likely = photos.classes[suspect.likely]
    detail = f"{likely} by {suspect.likely_probability:.2f}, its label by {suspect.label_probability:.2f}"
    return Finding("doubtful_label", suspect.photo, detail, f"relabel:{likely}")


def _outliers(neighbours: Neighbours) -> Iterator[Finding]:
    """Yield the photos that resemble no others, the least similar first."""
    cosines = neighbours.cosines.mean(1)
    spread = np.median(np.abs(cosines - np.median(cosines)))
    limit = np.median(cosines) - OUTLIER_SPREADS * spread
    for i in sorted(np.flatnonzero(cosines < limit), key=lambda i: (cosines[i], i)):
        detail = f"similarity {cosines[i]:.2f} to the nearest photos, {np.median(cosines):.2f} is usual"
        yield Finding("outlier", int(i), detail, "drop")


def _poor_photos(measures: np.ndarray) -> Iterator[Finding]:
    for kind, (name, limit) in LIMITS.items():
        values = measures[:, PhotoMeasures._fields.index(name)]
        for i in sorted(np.flatnonzero(values < limit), key=lambda i: (values[i], i)):
            yield Finding(kind, int(i), f"{name.replace('_', ' ')} {values[i]:.3g}, below {limit:g}", "drop")
