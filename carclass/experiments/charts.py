"""Charts of a tree of experiments, as SVG: the tree, learning curves, and differences in test accuracy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from carclass.experiments.results import DASH
from carclass.experiments.significance import AccuracyDifference
from carclass.formatting import percent_text
from carclass.reporting import svg
from carclass.reporting.axes import Frame, accuracy_ticks, fit_text, round_ticks
from carclass.reporting.svg import Point

WIDTH = 1000
TREE_ROW = 34
INDENT, MIN_INDENT = 58.0, 48.0  # horizontal distance of a child from its parent; the smallest one fits `@123`
NAME_LENGTH, NOTE_LENGTH = 26, 40
MAX_LABELS, LABEL_HEIGHT = 18, 17.0  # labels that fit beside the curves
MINUS = "\u2212"
RING = Markup('<circle class="ring" r="10"/>')
SHAPES = {
    "finished": Markup('<circle class="node" r="5.5"/>'),
    "stale": Markup('<path class="node hollow" d="M0-7 7 0 0 7-7 0z"/>'),
    "begun": Markup('<circle class="node hollow" r="5.5"/><path class="node" d="M0-5.5A5.5 5.5 0 0 0 0 5.5z"/>'),
    "missing": Markup('<circle class="node hollow missing" r="5.5"/>'),
    "diverged": Markup('<path class="cross" d="M-5-5 5 5M5-5-5 5"/>'),
    "unreadable": Markup('<path class="node hollow" d="M-5-5H5V5H-5z"/>'),
}
"""Marks of runs in the tree, by state."""


class ChartedRun(NamedTuple):
    """A run as the charts show it."""

    name: str
    parent: str | None
    """Name of the run it starts from, if that is in the tree."""
    start: str
    """Label of the edge from its parent: `@12`."""
    note: str
    """Text beside the name."""
    state: str
    val_accuracy: float | None
    baseline: float | None
    """Val accuracy of the baseline."""
    val_accuracies: list[float]
    """Val accuracy of each epoch of all stages; NaN leaves a gap."""
    is_best: bool

    @property
    def highest(self) -> float:
        """Return the highest finite val accuracy; -1 if there is none."""
        return max((value for value in self.val_accuracies if math.isfinite(value)), default=-1.0)


def points_text(fraction: float) -> str:
    """Return a difference in points with one decimal and a sign, "+4.2" for 0.042."""
    return f"{fraction * 100:+.1f}".replace("-", MINUS)


def tree_order(runs: Sequence[ChartedRun]) -> list[tuple[ChartedRun, int]]:
    """Return the runs with their depth in the tree, depth first."""
    names = {run.name for run in runs}
    stack = [(run, 0) for run in reversed(runs) if run.parent not in names]
    ordered = []
    while stack:
        run, depth = stack.pop()
        ordered.append((run, depth))
        stack += [(child, depth + 1) for child in reversed(runs) if child.parent == run.name]
    return ordered


def tree_chart(runs: Sequence[ChartedRun]) -> Markup:
    """Draw a row per run, indented below its parent, with val accuracy as a bar."""
    rows = tree_order(runs)
    indent = min(INDENT, max(MIN_INDENT, 300 / max([1, *(depth for _, depth in rows)])))
    places = {run.name: (14 + depth * indent, 42.0 + i * TREE_ROW) for i, (run, depth) in enumerate(rows)}
    bar = max([400.0, *(places[run.name][0] + _text_width(run) + 45 for run, _ in rows)])
    width = round(max(WIDTH, bar + 350))
    parts = [
        svg.text("tick", 8, 14, "run and its parent"),
        svg.text("tick", bar, 14, "val accuracy"),
        svg.text("tick", width - 108, 14, "state"),
    ]
    for run, _ in rows:
        if run.parent in places:
            parts.append(_edge(places[run.parent], places[run.name], run.start))
    parts += [_node(run, *places[run.name], bar, width) for run, _ in rows]
    return svg.drawing(f"tree of {len(rows)} runs", parts, width, 30 + len(rows) * TREE_ROW)


def _text_width(run: ChartedRun) -> float:
    """Estimate the width of a run's name and note."""
    return 8.5 * min(len(run.name), NAME_LENGTH) + 7 * min(len(run.note), NOTE_LENGTH)


def _edge(parent: Point, child: Point, label: str) -> Markup:
    path = f"M{parent[0]:.1f} {parent[1] + 11:.1f}V{child[1] - 6:.1f}q0 6 6 6H{child[0] - 11:.1f}"
    drawn = Markup('<path class="edge" d="{}"/>').format(path)
    return drawn + svg.text("epoch middle", (parent[0] + child[0]) / 2 - 1, child[1] - 5, fit_text(label, 6))


def _node(run: ChartedRun, x: float, y: float, bar: float, width: int) -> Markup:
    mark = Markup('<g transform="translate({:.1f} {:.1f})">{}{}</g>').format(
        x, y, RING if run.is_best else "", SHAPES[run.state]
    )
    title = f"{run.name}, {run.state}: {run.note}"
    name = Markup('<text x="{:.1f}" y="{:.1f}"><tspan class="name">{}</tspan><tspan dx="9">{}</tspan></text>').format(
        x + 16, y + 4.5, fit_text(run.name, NAME_LENGTH), fit_text(run.note, NOTE_LENGTH)
    )
    state = f"{run.state}, best" if run.is_best else run.state
    parts = [mark, name, _bar(run, bar, width - 194 - bar, y), svg.text("state", width - 108, y + 4.5, state)]
    return Markup('<g class="run {}{}"><title>{}</title>{}</g>').format(
        run.state, " best" if run.is_best else "", title, Markup("").join(parts)
    )


def _bar(run: ChartedRun, left: float, width: float, y: float) -> Markup:
    """Draw val accuracy from 0 to 1 as a bar with its number, and the baseline as a line across it."""
    box = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="10" rx="5"/>')
    parts = [box.format("track", left, y - 5, width)]
    if run.val_accuracy is not None and math.isfinite(run.val_accuracy):
        parts.append(box.format("value", left, y - 5, width * run.val_accuracy))
        parts.append(svg.text("number end", left + width + 62, y + 4.5, percent_text(run.val_accuracy)))
    else:
        parts.append(svg.text("number end", left + width + 62, y + 4.5, DASH))
    if run.baseline is not None:
        x = left + width * run.baseline
        parts.append(svg.line("baseline", x, y - 9, x, y + 9))
    return Markup("").join(parts)


def all_curves(runs: Sequence[ChartedRun]) -> Markup:
    """Draw the learning curves of all runs in one frame, labelled where they fit, the best on top."""
    shown = sorted((run for run in runs if run.highest >= 0), key=lambda run: (run.is_best, run.highest))
    longest = max((len(run.val_accuracies) for run in shown), default=1)
    ticks = accuracy_ticks(value for run in shown for value in run.val_accuracies)
    frame = Frame(left=52, right=WIDTH - 205, top=14, bottom=382, ticks=ticks)
    parts = [frame.grid(), *_epoch_axis(frame, longest, 10)]
    peaks = []
    for run in shown:
        points = _points(run, frame, longest)
        parts.append(_curve(run, points))
        peaks.append((run, points[run.val_accuracies.index(run.highest)]))
    parts += _curve_labels(peaks[-MAX_LABELS:], frame)
    return svg.drawing(f"val accuracy by epoch of {len(shown)} runs", parts, WIDTH, 428)


def single_curve(run: ChartedRun, runs: Sequence[ChartedRun]) -> Markup:
    """Draw a run's learning curve over the faint curves of all runs, with a line at the baseline's val accuracy."""
    others = [other for other in runs if other.highest >= 0]
    baselines = [other.baseline for other in runs if other.baseline is not None]
    ticks = accuracy_ticks([*(value for other in others for value in other.val_accuracies), *baselines])
    longest = max((len(other.val_accuracies) for other in others), default=1)
    frame = Frame(left=50, right=310, top=10, bottom=138, ticks=ticks)
    parts = [frame.grid(), *_epoch_axis(frame, longest, 4)]
    for other in others:
        parts.append(Markup('<g class="faint">{}</g>').format(svg.curve(_points(other, frame, longest))))
    if run.baseline is not None:
        parts.append(svg.line("baseline", frame.left, frame.y(run.baseline), frame.right, frame.y(run.baseline)))
    if run.highest >= 0:
        parts.append(_curve(run, _points(run, frame, longest)))
    else:
        parts.append(svg.text("tick middle", frame.x(0.5), frame.y((ticks[0] + ticks[-1]) / 2), "no epoch yet"))
    return svg.drawing(f"val accuracy by epoch of {run.name}", parts, 320, 164)


def _points(run: ChartedRun, frame: Frame, longest: int) -> list[Point]:
    return [
        (frame.x(i / (longest - 1) if longest > 1 else 0.5), frame.y(value) if math.isfinite(value) else math.nan)
        for i, value in enumerate(run.val_accuracies)
    ]


def _curve(run: ChartedRun, points: Sequence[Point]) -> Markup:
    num_epochs = len(run.val_accuracies)
    title = f"{run.name}, {run.state}: {num_epochs} epochs, highest val accuracy {percent_text(run.highest)}"
    return Markup('<g class="run {}{}"><title>{}</title>{}</g>').format(
        run.state, " best" if run.is_best else "", title, svg.curve(points)
    )


def _epoch_axis(frame: Frame, longest: int, max_ticks: int) -> list[Markup]:
    """Label the first, the last and some round epochs below the frame."""
    step = next(s for p in range(9) for s in (10**p, 2 * 10**p, 5 * 10**p) if s * max_ticks >= longest)
    between = [epoch for epoch in range(step, longest, step) if 1 + step / 2 < epoch < longest - step / 2]
    parts = []
    for epoch in dict.fromkeys([1, *between, longest]):
        x = frame.x((epoch - 1) / (longest - 1) if longest > 1 else 0.5)
        parts.append(svg.text("tick middle", x, frame.bottom + 18, str(epoch)))
    if max_ticks > 5:
        parts.append(svg.text("tick middle", frame.x(0.5), frame.bottom + 38, "epoch"))
    return parts


def _curve_labels(peaks: Sequence[tuple[ChartedRun, Point]], frame: Frame) -> list[Markup]:
    """Label curves to the right of the frame, in the order of their highest values, with a line to each of these."""
    ordered = sorted(peaks, key=lambda peak: peak[1][1])
    ys = spread_labels([point[1] for _, point in ordered], LABEL_HEIGHT, frame.top, frame.bottom)
    parts = []
    for (run, (x, y)), label_y in zip(ordered, ys, strict=True):
        css_class = "best" if run.is_best else ""
        path = f"M{x + 4:.1f} {y:.1f}L{frame.right + 24:.1f} {label_y:.1f}"
        parts.append(Markup('<path class="leader {}" d="{}"/>').format(css_class, path))
        text = f"{fit_text(run.name, 16)} {percent_text(run.highest)}"
        parts.append(svg.text(f"label {css_class}", frame.right + 29, label_y + 4, text))
    return parts


def spread_labels(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near the ascending targets, at least `gap` apart and, if they fit, within [low, high]."""
    places: list[float] = []
    for target in targets:
        places.append(max(target, places[-1] + gap if places else low))
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def differences_chart(results: Sequence[tuple[str, AccuracyDifference]]) -> Markup:
    """Draw differences in test accuracy in points: a dot with its 95 % interval each, and a line at zero."""
    ends = [100 * value for _, result in results for value in (result.low, result.high)]
    ticks = round_ticks(min(0.0, *ends), max(0.0, *ends))
    left, right, bottom = 330.0, WIDTH - 250.0, 16.0 + 40 * len(results)

    def x(points: float) -> float:
        return left + (right - left) * (points - ticks[0]) / (ticks[-1] - ticks[0])

    dot = Markup('<circle class="difference {}" cx="{:.1f}" cy="{:.1f}" r="5.5"/>')
    parts = []
    for tick in ticks:
        parts.append(svg.line("zero" if tick == 0 else "grid", x(tick), 8, x(tick), bottom))
        parts.append(svg.text("tick middle", x(tick), bottom + 18, f"{tick:+g}".replace("-", MINUS) if tick else "0"))
    parts.append(svg.text("tick middle", (left + right) / 2, bottom + 38, "difference in test accuracy, points"))
    for i, (name, result) in enumerate(results):
        y = 32.0 + i * 40
        css_class = result.verdict.replace(" ", "-")
        low, middle, high = (100 * value for value in (result.low, result.difference, result.high))
        parts.append(svg.text("label end", left - 16, y + 4.5, fit_text(name, 42)))
        parts.append(svg.line(f"interval {css_class}", x(low), y, x(high), y))
        parts.append(dot.format(css_class, x(middle), y))
        label = f"{points_text(result.difference)} points: {result.verdict}"
        parts.append(svg.text("label", right + 20, y + 4.5, label))
    return svg.drawing(f"{len(results)} differences in test accuracy", parts, WIDTH, round(bottom + 46))
