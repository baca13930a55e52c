"""Prediction of photos that are named one by one: in this process, without a cluster; printed, not stored."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from carclass import storage
from carclass.config.schema import PredictSettings
from carclass.errors import UserError, suggest_beside
from carclass.formatting import terminal_text
from carclass.ingestion.archive import is_archive
from carclass.runs.calibration_record import Calibration
from carclass.runs.run import Run

log = logging.getLogger(__name__)
STORED_ONLY = ("name", "batch_size", "max_quarantined", "part_rows")
"""Settings of predictions that are stored."""
MAX_MISSING = 10
"""Missing photos that are named."""


def find_photos(places: Sequence[str]) -> list[str]:
    """Return the places if they are photos, and none if they are one folder, prefix or archive.

    Raise UserError for places that do not exist, and for several that are not all photos.
    """
    _check_missing(places)
    others = [place for place in places if not _is_photo(place)]
    if len(places) == 1 and others:
        return []
    if others:
        raise UserError(
            f"`predict.photos`: {others[0]} is not a photo, but a folder, a prefix or an archive. Give either photos, "
            "or one of these alone."
        )
    return list(places)


def _check_missing(places: Sequence[str]) -> None:
    """Raise UserError for local places that do not exist, with names like theirs. Archives are checked elsewhere."""
    paths = {place: storage.local_path(place) for place in places if not is_archive(place)}
    missing = {place: path for place, path in paths.items() if path is not None and not os.path.exists(path)}
    if not missing:
        return
    hints = {place: suggest_beside(path) for place, path in [*missing.items()][:MAX_MISSING]}
    if len(missing) == 1:
        ((place, hint),) = hints.items()
        end = f"; {hint}" if hint else ". Check the path."
        raise UserError(f"`predict.photos`: no photo, folder or archive {place}{end}")
    named = ", ".join(f"{place} ({hint})" if hint else place for place, hint in hints.items())
    more = f" and {len(missing) - MAX_MISSING:,} more" if len(missing) > MAX_MISSING else ""
    raise UserError(
        f"`predict.photos`: {len(missing):,} of {len(places):,} are missing. There is no photo, folder or archive "
        f"{named}{more}. Check the paths."
    )


def _is_photo(place: str) -> bool:
    """Return True for one file that is no archive."""
    if is_archive(place) or place.endswith("/"):
        return False
    if (path := storage.local_path(place)) is None:
        return "/" in place.removeprefix("s3://") and storage.exists(place)  # without one, it is a bucket
    return os.path.isfile(path)


def predict_named(
    run: Run, stage: str, settings: PredictSettings, photos: Sequence[str]
) -> tuple[list[dict[str, Any]], Calibration]:
    """Return rows of predictions.PREDICTION, in order, and the calibration of their probabilities.

    stage: of the run's model to use. Raise UserError as PhotoPredictor does.
    """
    log.info("predict: loading PyTorch")  # it takes seconds
    from carclass.prediction.photo_predictor import PhotoPredictor  # imported late: mistakes are found before

    predictor = PhotoPredictor(run, run.model_uri(stage), settings.detector_weights)
    rows: list[dict[str, Any]] = predictor(photos).to_pylist()
    for row in rows:
        row["rejected"] = None if row["label"] is None else row["probability"] < settings.threshold
    return rows, predictor.calibration


def describe_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (photo, result) for the table of a job: the five likeliest classes of one photo, the first of several."""
    described = []
    for row in rows:
        key = terminal_text(row["key"])
        if row["label"] is None:
            described.append((key, terminal_text(f"{row['reason']}: {row['detail']}")))
            continue
        top = zip(row["top5"], row["top5_probabilities"], strict=True)
        lines = [f"{probability:.3f}  {name}" for name, probability in top]
        lines[0] += "  (rejected: below the threshold)" if row["rejected"] else ""
        shown = lines if len(rows) == 1 else lines[:1]
        described += [(key if i == 0 else "", line) for i, line in enumerate(shown)]
    return described
