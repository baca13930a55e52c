"""Pictures for the report of an evaluation, drawn with `svg`."""

import base64
import io
import math
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from carclass.evaluation.metrics import NUM_CALIBRATION_BINS
from carclass.formatting import percent_text
from carclass.reporting import svg
from carclass.reporting.svg import BOTTOM, LEFT, RIGHT, TOP

HEAT_MAP_CELL = 4  # picture pixels per class: sharp on dense screens, and 196 classes stay near 20 KB
HEAT_MAP_RIGHT = (61, 123, 240)  # mid-tones: the page behind them may be white or nearly black
HEAT_MAP_WRONG = (238, 108, 31)
HEAT_MAP_NAMES = 14

History = dict[str, list[dict[str, Any]]]


def best_epoch(history: History) -> tuple[int, str, dict[str, Any]] | None:
    """The epoch with the highest finite `val_accuracy`, the earlier of equals: (position, stage, epoch row).

    Position counts from 0 over all stages in order. None when no epoch has such a figure.
    """
    rows = [(stage, row) for stage, epochs in history.items() for row in epochs]
    finite = [i for i, (_, row) in enumerate(rows) if math.isfinite(row["val_accuracy"])]
    if not finite:
        return None
    position = max(finite, key=lambda i: rows[i][1]["val_accuracy"])
    return position, *rows[position]


def curve_chart(history: History, figure: str, percent: bool) -> Markup:
    """Draw `train_<figure>` and `val_<figure>` over the epochs of all stages, one after the other.

    A NaN or infinite value leaves a gap in its line. The axis starts at zero; with `percent` it shows
    fractions as percentages.
    """
    rows = [row for epochs in history.values() for row in epochs]
    values = [row[f"{part}_{figure}"] for part in ("train", "val") for row in rows]
    ticks = svg.nice_ticks(max((v for v in values if math.isfinite(v)), default=1.0))
    x = [LEFT + 10 + (RIGHT - LEFT - 20) * (i / (len(rows) - 1) if len(rows) > 1 else 0.5) for i in range(len(rows))]

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / ticks[-1]

    parts = [svg.horizontal_grid(ticks, percent), _stages(history, x)]
    for part in ("train", "val"):
        points = [(px, y(row[f"{part}_{figure}"])) for px, row in zip(x, rows, strict=True)]
        parts.append(svg.curve(points, f"curve {part}", f"dot {part}"))
    parts.append(svg.axis_name("epoch"))
    best = best_epoch(history)
    if best is not None and math.isfinite(best[2][f"val_{figure}"]):
        parts.append(_best_mark(x[best[0]], y(best[2][f"val_{figure}"]), best[2][f"val_{figure}"], percent))
    return svg.drawing(f"{figure} per epoch of training and validation", parts)


def calibration_chart(bins: list[dict[str, Any]]) -> Markup:
    """Draw accuracy against confidence, one column per filled bin, with the line of a calibrated model.

    `bins` as `metrics.calibration_bins` returns them. The darker a column, the more photos it stands for.
    """
    largest = max(b["count"] for b in bins)
    width = (RIGHT - LEFT) / NUM_CALIBRATION_BINS
    column = Markup(
        '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
        "<title>confidence {:.0%} to {:.0%}: {} photos, {:.1%} right</title></rect>"
    )
    parts = [svg.horizontal_grid([0, 0.25, 0.5, 0.75, 1], True)]
    for i, b in enumerate(bins):
        if b["count"]:
            height = (BOTTOM - TOP) * b["accuracy"]
            strength = 0.25 + 0.75 * math.sqrt(b["count"] / largest)
            box = (LEFT + i * width + 1, BOTTOM - height, width - 2, height, strength)
            parts.append(column.format(*box, b["lower"], b["upper"], b["count"], b["accuracy"]))
    parts.append(svg.line("ideal", LEFT, BOTTOM, RIGHT, TOP))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(svg.text("tick middle", LEFT + (RIGHT - LEFT) * tick, BOTTOM + 17, percent_text(tick, 0)))
    parts.append(svg.axis_name("confidence"))
    return svg.drawing("share of photos named correctly against the confidence of the prediction", parts)


def heat_map(confusion: np.ndarray, class_names: list[str]) -> Markup:
    """Draw int (C, C) counts as a picture: one dot per label (row) and prediction (column).

    A dot's strength is its share of the label's photos; rows and columns are in class order.
    """
    num_classes = len(class_names)
    size, left = 720, 240
    step = max(1, math.ceil(num_classes / HEAT_MAP_NAMES))
    picture = base64.b64encode(_heat_map_png(confusion)).decode()
    parts = [
        Markup('<image class="heat" x="{}" y="4" width="{}" height="{}" href="data:image/png;base64,{}"/>').format(
            left, size, size, picture
        ),
        Markup('<rect class="frame" x="{}" y="4" width="{}" height="{}"/>').format(left, size, size),
    ]
    for i in range(0, num_classes, step):
        middle = (i + 0.5) * size / num_classes
        name = f"{i + 1}\u2002{class_names[i]}"
        name = name if len(name) <= 30 else name[:29] + "…"
        parts.append(svg.text("tick end", left - 10, 9 + middle, name))
        parts.append(svg.text("tick middle", left + middle, size + 24, str(i + 1)))
    parts.append(svg.text("tick middle", left + size / 2, size + 48, "predicted class, by number"))
    return svg.drawing(f"confusion of {num_classes} classes", parts, width=left + size + 10, height=size + 56)


def _heat_map_png(confusion: np.ndarray) -> bytes:
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = np.empty((*confusion.shape, 4), np.uint8)
    pixels[..., :3] = HEAT_MAP_WRONG
    pixels[np.eye(len(confusion), dtype=bool), :3] = HEAT_MAP_RIGHT
    # A single photo of many must still be seen: whatever is not empty starts at half strength.
    pixels[..., 3] = np.where(confusion > 0, 128 + 127 * share, 0).astype(np.uint8)
    pixels = pixels.repeat(HEAT_MAP_CELL, axis=0).repeat(HEAT_MAP_CELL, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def _stages(history: History, x: list[float]) -> Markup:
    """Name each stage above its epochs, number the epochs below, and draw a line between two stages."""
    parts, start = [], 0
    for stage, epochs in history.items():
        if not epochs:
            continue
        middle = (x[start] + x[start + len(epochs) - 1]) / 2
        if start:
            between = (x[start - 1] + x[start]) / 2
            parts.append(svg.line("boundary", between, TOP - 18, between, BOTTOM))
        parts.append(svg.text("stage middle", middle, TOP - 12, stage))
        step = max(1, math.ceil(len(x) / 10))
        for i in range(0, len(epochs), step):
            parts.append(svg.text("tick middle", x[start + i], BOTTOM + 17, str(epochs[i]["epoch"])))
        start += len(epochs)
    return Markup("").join(parts)


def _best_mark(x: float, y: float, value: float, percent: bool) -> Markup:
    label = percent_text(value) if percent else f"{value:.3f}"
    anchor, shift = ("end", 4) if x > (LEFT + RIGHT) / 2 else ("start", -4)
    below = y + 22 if y < TOP + 20 else y - 12
    ring = Markup('<circle class="best" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x, y)
    return ring + svg.text(f"mark {anchor}", x + shift, below, label)
