"""Quarantine: reasons, errors and rows of photos that cannot be used."""

import logging
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from carclass.errors import UserError

log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Reasons for quarantine, a closed vocabulary."""

    EMPTY = "empty"  # no bytes
    NOT_AN_IMAGE = "not_an_image"  # the first bytes match no known image format
    UNSUPPORTED_FORMAT = "unsupported_format"  # a known image format that is not read
    TOO_SMALL = "too_small"  # a side below the minimum
    TOO_LARGE = "too_large"  # more pixels than the maximum, or a side longer than MAX_JPEG_SIDE
    TRUNCATED = "truncated"  # the end is missing
    CORRUPT = "corrupt"  # complete, but damaged
    MISSING_FILE = "missing_file"  # a label without a photo
    UNREADABLE = "unreadable"  # storage returned an error
    NO_LABEL = "no_label"  # a photo without a label
    JUNK = "junk"  # not a photo by its name, and no label names it
    BAD_NAME = "bad_name"  # the name is not UTF-8
    DROPPED = "dropped"  # by `ingest.corrections`
    LABEL_CONFLICT = "label_conflict"  # the same bytes under two labels
    LEAKAGE = "leakage"  # a train photo whose bytes are also in test
    CRASHED = "crashed"  # crashed every worker that processed it
    DOUBTFUL_MASK = "doubtful_mask"  # excluded by `mask.exclude`


LISTING_REASONS = (Reason.MISSING_FILE, Reason.NO_LABEL, Reason.JUNK, Reason.BAD_NAME, Reason.DROPPED)
"""Reasons that are known from the listing and the labels, without reading the photo."""


MACHINE_REASONS = (Reason.UNREADABLE, Reason.CRASHED)
"""Reasons that lie in storage or in the workers rather than in the photo, or that may."""


def log_counts(job: str, facts: Mapping[str, Any]) -> None:
    """Log the counts of a finished job, which are those of its table: labels without a photo are inputs too.

    facts: `inputs` and `reasons`, as in a manifest.
    """
    reasons = facts["reasons"]
    found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    by_reason = f" ({found})" if found else ""
    log.info("%s: %s inputs, %s quarantined%s", job, f"{facts['inputs']:,}", f"{sum(reasons.values()):,}", by_reason)


def check_quarantined(facts: Mapping[str, Any], limit: float, setting: str) -> None:
    """Raise UserError if more than a share of the inputs is in quarantine for MACHINE_REASONS.

    facts: `inputs` and `reasons`, as in a manifest. limit: value of the setting.
    """
    num_inputs, reasons = facts["inputs"], facts["reasons"]
    counts = {reason: reasons[reason] for reason in MACHINE_REASONS if reasons.get(reason)}
    if (failed := sum(counts.values())) > limit * num_inputs:
        found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        raise UserError(
            f"{failed:,} of {num_inputs:,} photos are in quarantine for reasons that may lie in storage or workers "
            f"({found}), more than `{setting}` ({limit:g}) allows, so nothing is published. Restore the photos and run "
            f"the same command again, which keeps finished work, or publish without them: set `{setting}` to "
            f"{_round_up(failed / num_inputs)} or more."
        )


def _round_up(share: float) -> float:
    return min(1.0, math.ceil(share * 100) / 100)


class PhotoError(ValueError):
    """Error of an unusable photo, with a `reason` from the vocabulary and a one-line `detail` for the user."""

    def __init__(self, reason: Reason, detail: str, attempts: int = 1):
        super().__init__(reason, detail, attempts)
        self.reason = reason
        self.detail = detail
        self.attempts = attempts

    def columns(self) -> dict[str, str | int]:
        """Return the columns `reason`, `detail` and `attempts` of a quarantine row."""
        return {"reason": str(self.reason), "detail": self.detail, "attempts": self.attempts}

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def quarantine_row(key: str, reason: str, detail: str, fingerprint: str | None = None) -> dict[str, Any]:
    """Return a row of QUARANTINE, and its fingerprint, for an input that is not read."""
    row = {"key": key, "image_id": None, "reason": str(reason), "detail": detail, "attempts": 0}
    return {**row, "fingerprint": fingerprint}
