"""Collection of a masked dataset's report and contact sheet."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from carclass import storage
from carclass.data import dataset, photo
from carclass.formatting import percent_text
from carclass.masking.contact_sheet import MaskedPhoto, draw_contact_sheet, shrink_photo
from carclass.masking.overview import DOUBT_COLUMNS, Overview
from carclass.masking.report import MaskingReport, histogram, render
from carclass.masking.rle import decode_mask

NUM_SHEET = 40
"""Photos on the contact sheet."""
PHOTO_COLUMNS = (
    "image", *DOUBT_COLUMNS, "num_vehicles", "vehicle_class", "box", "mask", "source_width", "source_height"
)  # fmt: skip


def write_report(masked: dataset.Dataset, overview: Overview, originals: Mapping[str, dataset.Place]) -> None:
    """Write report.html and contact_sheet.jpg of a masked dataset. originals: places of the chosen photos by key."""
    photos = _masked_photos(overview, originals)
    sheet = [photos[key] for key in overview.sampled]
    report = _report(masked, overview, doubtful=[photos[key] for key in overview.doubtful], sheet=sheet)
    storage.write_bytes(storage.join(masked.uri, "contact_sheet.jpg"), draw_contact_sheet(sheet, report.title))
    storage.write_bytes(storage.join(masked.uri, "report.html"), render(report).encode())


def _masked_photos(overview: Overview, originals: Mapping[str, dataset.Place]) -> dict[str, MaskedPhoto]:
    """Return the chosen photos by key, at the size of a panel."""
    images = dataset.rows_at(originals, ["image"])
    rows = dataset.rows_at(overview.places, PHOTO_COLUMNS)
    return {key: shrink_photo(_masked_photo(row, images[key]["image"], overview.ious)) for key, row in rows.items()}


def _masked_photo(row: dict[str, Any], original: bytes, ious: Mapping[str, float]) -> MaskedPhoto:
    mask = row["mask"]
    return MaskedPhoto(
        key=row["key"],
        photo=photo.decode_stored(original),
        box=None if row["box"] is None else np.array(row["box"]),
        mask=None if mask is None else decode_mask(mask, row["source_height"], row["source_width"]),
        result=photo.decode_stored(row["image"]),
        outcome=row["outcome"],
        vehicle_class=row["vehicle_class"],
        score=row["score"],
        notes=_notes(row, ious),
    )


def _notes(row: dict[str, Any], ious: Mapping[str, float]) -> list[str]:
    notes = [f"IoU {ious[row['key']]:.2f}"] if row["key"] in ious else []
    if row["outcome"] == "no_vehicle":
        return notes
    notes += [f"one of {row['num_vehicles']} vehicles"] if row["several_vehicles"] else []
    notes += ["touches the border"] if row["touches_border"] else []
    notes += [f"covers {percent_text(row['area_fraction'], 0)}"]
    return notes if row["stability"] is None else [*notes, f"stability {row['stability']:.2f}"]


def _report(masked: dataset.Dataset, overview: Overview, **pictures: list[MaskedPhoto]) -> MaskingReport:
    settings, manifest = masked.manifest["settings"], masked.manifest
    detector, cutout, ious = settings["detector"], settings["cutout"], list(overview.ious.values())
    return MaskingReport(
        title=f"Dataset {masked.name}: masks of {settings['source']}",
        facts=[
            ("Source", f"{settings['source']} (sha256 {masked.source_digest[:12]}…)"),
            ("Detector", f"{detector['model'].rsplit('/', 1)[-1]}, weights sha256 {detector['weights'][:12]}…"),
            ("Input", f"{detector['short_side']} px, {detector['num_proposals']} proposals ({detector['profile']})"),
            ("Selection", f"{settings['choice'].replace('_', ' ')} {' or '.join(detector['classes'].values())}"),
            ("Cutout", f"{cutout['mode']}, margin {cutout['margin']:g}"),
        ],
        outcomes=manifest["outcomes"],
        quarantined=manifest["reasons"],
        flags=dict(overview.flags),
        classes=dict(sorted(overview.classes.items(), key=lambda item: (-item[1], item[0]))),
        scores=overview.histograms["score"].tolist(),
        areas=overview.histograms["area_fraction"].tolist(),
        stabilities=overview.histograms["stability"].tolist(),
        mean_iou=float(np.mean(ious)) if ious else None,
        ious=histogram(np.array(ious)),
        **pictures,
    )
