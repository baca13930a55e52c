"""SVG charts of an evaluation report."""

import base64
import io
import math
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from carclass.evaluation.metrics import NUM_CALIBRATION_BINS
from carclass.formatting import count_text, percent_text
from carclass.reporting import svg
from carclass.reporting.axes import Frame, accuracy_ticks, fit_text
from carclass.reporting.svg import BOTTOM, LEFT, RIGHT, TOP

HEAT_MAP_CELL = 4  # image pixels per class: sharp on dense screens, and 196 classes stay near 20 KB
HEAT_MAP_RIGHT = (61, 123, 240)  # mid-tones, readable on the light and on the dark page
HEAT_MAP_WRONG = (238, 108, 31)
MAX_HEAT_MAP_NAMES = 14
MIN_SPAN = 0.1  # of an axis of accuracies

History = dict[str, list[dict[str, Any]]]


def find_epoch(history: History, stage: str, epoch: int) -> tuple[int, dict[str, Any]] | None:
    """Return (position, row) of an epoch of a stage; None if it is missing or its `val_accuracy` is not finite.

    The position counts from 0 over all stages in order.
    """
    rows = [(name, row) for name, epochs in history.items() for row in epochs]
    for position, (name, row) in enumerate(rows):
        if (name, row["epoch"]) == (stage, epoch) and math.isfinite(row["val_accuracy"]):
            return position, row
    return None


def curve_chart(history: History, metric: str, ringed: tuple[int, dict[str, Any]] | None, *, percent: bool) -> Markup:
    """Draw `train_<metric>` and `val_<metric>` over the epochs of all stages in order.

    A NaN or infinite value leaves a gap in its line. The axis starts at zero; with `percent` fractions are shown as
    percentages. ringed: the epoch to mark, see find_epoch.
    """
    rows = [row for epochs in history.values() for row in epochs]
    values = [row[f"{split}_{metric}"] for split in ("train", "val") for row in rows]
    ticks = svg.nice_ticks(max((v for v in values if math.isfinite(v)), default=1.0))
    x = [LEFT + 10 + (RIGHT - LEFT - 20) * (i / (len(rows) - 1) if len(rows) > 1 else 0.5) for i in range(len(rows))]

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / ticks[-1]

    parts = [svg.horizontal_grid(ticks, percent), _stages(history, x)]
    for split in ("train", "val"):
        points = [(px, y(row[f"{split}_{metric}"])) for px, row in zip(x, rows, strict=True)]
        parts.append(svg.curve(points, f"curve {split}", f"dot {split}"))
    parts.append(svg.axis_name("epoch"))
    if ringed is not None:
        position, row = ringed
        value = row[f"val_{metric}"]
        if math.isfinite(value):
            parts.append(_ring(x[position], y(value), value, percent))
    return svg.drawing(f"{metric} per epoch, training and validation", parts)


def calibration_chart(bins: list[dict[str, Any]]) -> Markup:
    """Draw a reliability diagram: accuracy against confidence, one column per non-empty bin, and the identity line.

    `bins` is the result of `metrics.calibration_bins`. A column is darker the more photos its bin holds.
    """
    largest = max(b["count"] for b in bins)
    width = (RIGHT - LEFT) / NUM_CALIBRATION_BINS
    column = Markup(
        '<rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
        "<title>confidence {} to {}: {}, {} correct</title></rect>"
    )
    parts = [svg.horizontal_grid([0, 0.25, 0.5, 0.75, 1], True)]
    for i, b in enumerate(bins):
        if b["count"]:
            height = (BOTTOM - TOP) * b["accuracy"]
            strength = 0.25 + 0.75 * math.sqrt(b["count"] / largest)
            box = (LEFT + i * width + 1, BOTTOM - height, width - 2, height, strength)
            limits = percent_text(b["lower"], 0), percent_text(b["upper"], 0)
            parts.append(column.format(*box, *limits, count_text(b["count"], "photo"), percent_text(b["accuracy"])))
    parts.append(svg.line("ideal", LEFT, BOTTOM, RIGHT, TOP))
    parts += [_share_ticks(0, 0.25, 0.5, 0.75, 1), svg.axis_name("confidence")]
    return svg.drawing("accuracy against the confidence of the prediction", parts)


def coverage_chart(curves: dict[str, list[dict[str, Any]]]) -> Markup:
    """Draw the accuracy of accepted photos against their share, a line per split with a dot per threshold.

    curves: rows of `metrics.coverage_curve` by split; the first split is the one to choose on.
    """
    drawn = {split: [row for row in rows if row["count"]] for split, rows in curves.items()}
    accuracies = [row["accuracy"] for rows in drawn.values() for row in rows]
    ticks = accuracy_ticks(_widened(accuracies))
    frame = Frame(left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=ticks)
    parts = [frame.grid(), _share_ticks(0.25, 0.5, 0.75, 1)]  # 0 % would touch the lowest accuracy on narrow screens
    dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
    for css_class, (split, rows) in reversed([*zip(("val", "train"), drawn.items(), strict=False)]):
        points = [(frame.x(row["coverage"]), frame.y(row["accuracy"])) for row in rows]
        parts.append(svg.curve(points, f"curve {css_class}", None))
        for point, row in zip(points, rows, strict=True):
            figures = f"{percent_text(row['coverage'])} accepted, {percent_text(row['accuracy'])} of them correct"
            parts.append(dot.format(css_class, *point, f"{split}, threshold {row['threshold']:g}: {figures}"))
    parts.append(svg.axis_name("share of accepted photos"))
    return svg.drawing("accuracy of accepted photos against their share", parts)


def _widened(accuracies: list[float]) -> list[float]:
    """Return accuracies, and others around them if they differ so little that their axis would magnify nothing."""
    if not accuracies or max(accuracies) - min(accuracies) >= MIN_SPAN / 2:
        return accuracies
    return [*accuracies, max(0.0, min(accuracies) - MIN_SPAN / 2), min(1.0, max(accuracies) + MIN_SPAN / 2)]


def _share_ticks(*shares: float) -> Markup:
    """Draw the numbers of a horizontal axis from 0 to 100 %; the last one ends with the drawing."""
    parts = []
    for share in shares:
        css_class, shift = ("end", svg.WIDTH - RIGHT) if share == 1 else ("middle", 0)
        x = LEFT + (RIGHT - LEFT) * share + shift
        parts.append(svg.text(f"tick {css_class}", x, BOTTOM + 17, percent_text(share, 0)))
    return Markup("").join(parts)


def heat_map(confusion: np.ndarray, class_names: list[str]) -> Markup:
    """Draw a confusion matrix, int (C, C) counts, as an image: one dot per label (row) and prediction (column).

    A dot's opacity is its share of the label's photos; rows and columns are in class order.
    """
    num_classes = len(class_names)
    size, left = 720, 240
    step = max(1, math.ceil(num_classes / MAX_HEAT_MAP_NAMES))
    image = base64.b64encode(_heat_map_png(confusion)).decode()
    parts = [
        Markup('<image class="heat" x="{}" y="4" width="{}" height="{}" href="data:image/png;base64,{}"/>').format(
            left, size, size, image
        ),
        Markup('<rect class="frame" x="{}" y="4" width="{}" height="{}"/>').format(left, size, size),
    ]
    for i in range(0, num_classes, step):
        middle = (i + 0.5) * size / num_classes
        name = f"{i + 1}\u2002{class_names[i]}"
        parts.append(svg.text("tick end", left - 10, 9 + middle, fit_text(name, _name_length(name))))
        parts.append(svg.text("tick middle", left + middle, size + 24, str(i + 1)))
    parts.append(svg.text("tick middle", left + size / 2, size + 48, "number of the predicted class"))
    return svg.drawing(f"confusion matrix of {num_classes} classes", parts, width=left + size + 10, height=size + 56)


def _name_length(name: str) -> int:
    """Return the characters that fit beside a heat map: fewer of a name in capitals."""
    return 24 if sum(map(str.isupper, name)) > len(name) / 2 else 30


def _heat_map_png(confusion: np.ndarray) -> bytes:
    """Return the heat map as a PNG file, HEAT_MAP_CELL pixels per class."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = np.empty((*confusion.shape, 4), np.uint8)
    pixels[..., :3] = HEAT_MAP_WRONG
    pixels[np.eye(len(confusion), dtype=bool), :3] = HEAT_MAP_RIGHT
    # A single photo of many stays visible: every non-empty cell is at least half opaque.
    pixels[..., 3] = np.where(confusion > 0, 128 + 127 * share, 0).astype(np.uint8)
    pixels = pixels.repeat(HEAT_MAP_CELL, axis=0).repeat(HEAT_MAP_CELL, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def _stages(history: History, x: list[float]) -> Markup:
    """Draw stage names above their epochs, epoch numbers below, and a line between stages."""
    parts, start = [], 0
    for stage, epochs in history.items():
        if not epochs:
            continue
        middle = (x[start] + x[start + len(epochs) - 1]) / 2
        if start:
            between = (x[start - 1] + x[start]) / 2
            parts.append(svg.line("boundary", between, TOP - 7, between, BOTTOM))  # below the names
        parts.append(svg.text("stage middle", middle, TOP - 12, stage))
        step = max(1, math.ceil(len(x) / 10))
        for i in range(0, len(epochs), step):
            if i and start + len(epochs) < len(x) and len(epochs) - i < 0.6 * step:
                continue  # it would touch the first number of the next stage
            parts.append(svg.text("tick middle", x[start + i], BOTTOM + 17, str(epochs[i]["epoch"])))
        start += len(epochs)
    return Markup("").join(parts)


def _ring(x: float, y: float, value: float, percent: bool) -> Markup:
    """Draw a ring at an epoch with its value beside it."""
    label = percent_text(value) if percent else f"{value:.3f}"
    anchor, shift = ("end", 4) if x > (LEFT + RIGHT) / 2 else ("start", -4)
    below = y + 22 if y < TOP + 20 else y - 12
    ring = Markup('<circle class="best" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x, y)
    return ring + svg.text(f"mark {anchor}", x + shift, below, label)
