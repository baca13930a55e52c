"""Charts of a tree of experiments: where each starts from, how each learned, and how far apart they end."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from carclass.experiments.significance import Verdict
from carclass.formatting import percent_text
from carclass.reporting import svg
from carclass.reporting.axes import Frame, accuracy_ticks, fit_text, round_ticks

WIDE = 1000
ROW = 34  # of the tree
STEP, MIN_STEP = 58.0, 48.0  # from a parent to its child, room for `@123`
NAME_LENGTH, NOTE_LENGTH = 26, 40
NUM_LABELS = 18  # that fit beside the curves, one below the other
LABEL_HEIGHT = 17.0
DASH, MINUS = "\u2013", "\u2212"
RING = Markup('<circle class="ring" r="10"/>')
SHAPES = {
    "finished": Markup('<circle class="node" r="5.5"/>'),
    "stale": Markup('<path class="node hollow" d="M0-7 7 0 0 7-7 0z"/>'),
    "begun": Markup('<circle class="node hollow" r="5.5"/><path class="node" d="M0-5.5A5.5 5.5 0 0 0 0 5.5z"/>'),
    "missing": Markup('<circle class="node hollow missing" r="5.5"/>'),
    "failed": Markup('<path class="cross" d="M-5-5 5 5M5-5-5 5"/>'),
}
"""What marks a run's state."""

Point = tuple[float, float]


class ChartedRun(NamedTuple):
    """What the charts show of a run."""

    name: str
    parent: str | None
    """The run that it starts from, when that is in the tree."""
    start: str
    """Written on the edge from its parent: `@12`."""
    note: str
    """Written beside the name."""
    state: str
    val_accuracy: float | None
    baseline: float | None
    """Val accuracy of the same run elsewhere."""
    values: list[float]
    """Val accuracy, epoch by epoch over all of its stages; NaN leaves a gap."""
    is_best: bool


def points_text(fraction: float) -> str:
    """Write a difference of -0.042 in points, with one decimal and always with a sign."""
    return f"{fraction * 100:+.1f}".replace("-", MINUS)


def tree_order(runs: Sequence[ChartedRun]) -> list[tuple[ChartedRun, int]]:
    """The runs with their depths from 0, each below its parent and before the parent's next child."""
    names = {run.name for run in runs}
    open_ends = [(run, 0) for run in reversed(runs) if run.parent not in names]
    found = []
    while open_ends:
        run, depth = open_ends.pop()
        found.append((run, depth))
        open_ends += [(child, depth + 1) for child in reversed(runs) if child.parent == run.name]
    return found


def tree(runs: Sequence[ChartedRun]) -> Markup:
    """Draw the runs one below the other, each to the right of what it starts from, with val accuracy as a bar."""
    rows = tree_order(runs)
    step = min(STEP, max(MIN_STEP, 300 / max([1, *(depth for _, depth in rows)])))
    places = {run.name: (14 + depth * step, 42.0 + i * ROW) for i, (run, depth) in enumerate(rows)}
    bar = max([400.0, *(places[run.name][0] + _text_width(run) + 45 for run, _ in rows)])
    width = round(max(WIDE, bar + 350))
    parts = [
        svg.text("tick", 8, 14, "run, and what it starts from"),
        svg.text("tick", bar, 14, "val accuracy"),
        svg.text("tick", width - 108, 14, "state"),
    ]
    for run, _ in rows:
        if run.parent in places:
            parts.append(_edge(places[run.parent], places[run.name], run.start))
    parts += [_node(run, *places[run.name], bar, width) for run, _ in rows]
    return svg.drawing(f"the tree of {len(rows)} runs", parts, width, 30 + len(rows) * ROW)


def _text_width(run: ChartedRun) -> float:
    """About how wide a run's name and note are."""
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
    """Val accuracy from 0 to 1 as a bar with its number, a line across it at the baseline's."""
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


def overlaid(curves: Sequence[ChartedRun]) -> Markup:
    """Draw all curves in one frame, each named at its end where there is room, the best on top."""
    shown = sorted((one for one in curves if _reached(one) >= 0), key=lambda one: (one.is_best, _reached(one)))
    longest = max((len(one.values) for one in shown), default=1)
    ticks = accuracy_ticks(value for one in shown for value in one.values)
    frame = Frame(left=52, right=WIDE - 205, top=14, bottom=382, ticks=ticks)
    parts = [frame.grid(), *_epochs(frame, longest, 10)]
    ends = []
    for one in shown:
        points = _points(one, frame, longest)
        parts.append(_run(one, _pieces(points)))
        ends.append((one, next(p for p in reversed(points) if math.isfinite(p[1]))))
    parts += _labels(ends[-NUM_LABELS:], frame)
    return svg.drawing(f"val accuracy by epoch of {len(shown)} runs", parts, WIDE, 428)


def alone(one: ChartedRun, others: Sequence[ChartedRun]) -> Markup:
    """Draw a run's curve over those of the others, faint, with a line at the baseline's best; the frame is shared."""
    reached = [other for other in others if _reached(other) >= 0]
    baselines = [other.baseline for other in others if other.baseline is not None]
    ticks = accuracy_ticks([*(value for other in reached for value in other.values), *baselines])
    longest = max((len(other.values) for other in reached), default=1)
    frame = Frame(left=50, right=310, top=10, bottom=138, ticks=ticks)
    parts = [frame.grid(), *_epochs(frame, longest, 4)]
    for other in reached:
        path = _pieces(_points(other, frame, longest))
        parts.append(Markup('<g class="faint">{}</g>').format(path))
    if one.baseline is not None:
        parts.append(svg.line("baseline", frame.left, frame.y(one.baseline), frame.right, frame.y(one.baseline)))
    if _reached(one) >= 0:
        parts.append(_run(one, _pieces(_points(one, frame, longest))))
    else:
        parts.append(svg.text("tick middle", frame.x(0.5), frame.y((ticks[0] + ticks[-1]) / 2), "no epoch yet"))
    return svg.drawing(f"val accuracy by epoch of {one.name}", parts, 320, 164)


def _reached(one: ChartedRun) -> float:
    """The highest val accuracy, negative where there is none."""
    return max((value for value in one.values if math.isfinite(value)), default=-1.0)


def _points(one: ChartedRun, frame: Frame, longest: int) -> list[Point]:
    return [
        (frame.x(i / (longest - 1) if longest > 1 else 0.5), frame.y(value) if math.isfinite(value) else math.nan)
        for i, value in enumerate(one.values)
    ]


def _pieces(points: Sequence[Point]) -> Markup:
    """A line through the finite points, a dot where one has no neighbour."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        else:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) == 1:
            drawn.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*piece[0]))
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            drawn.append(Markup('<polyline class="curve" points="{}"/>').format(path))
    return Markup("").join(drawn)


def _run(one: ChartedRun, path: Markup) -> Markup:
    title = f"{one.name}, {one.state}: {len(one.values)} epochs, at best {percent_text(_reached(one))}"
    return Markup('<g class="run {}{}"><title>{}</title>{}</g>').format(
        one.state, " best" if one.is_best else "", title, path
    )


def _epochs(frame: Frame, longest: int, most: int) -> list[Markup]:
    """Epochs below the frame, the first, the last and some round ones between."""
    step = next(s for p in range(9) for s in (10**p, 2 * 10**p, 5 * 10**p) if s * most >= longest)
    between = [epoch for epoch in range(step, longest, step) if 1 + step / 2 < epoch < longest - step / 2]
    parts = []
    for epoch in dict.fromkeys([1, *between, longest]):
        x = frame.x((epoch - 1) / (longest - 1) if longest > 1 else 0.5)
        parts.append(svg.text("tick middle", x, frame.bottom + 18, str(epoch)))
    if most > 5:
        parts.append(svg.text("tick middle", frame.x(0.5), frame.bottom + 38, "epoch"))
    return parts


def _labels(ends: Sequence[tuple[ChartedRun, Point]], frame: Frame) -> list[Markup]:
    """Names right of the frame, in the order in which the curves end, with a line to each end."""
    ordered = sorted(ends, key=lambda end: end[1][1])
    ys = spread([point[1] for _, point in ordered], LABEL_HEIGHT, frame.top, frame.bottom)
    parts = []
    for (one, (x, y)), at in zip(ordered, ys, strict=True):
        css = "best" if one.is_best else ""
        path = f"M{x + 4:.1f} {y:.1f}L{frame.right + 24:.1f} {at:.1f}"
        parts.append(Markup('<path class="leader {}" d="{}"/>').format(css, path))
        text = f"{fit_text(one.name, 16)} {percent_text(_reached(one))}"
        parts.append(svg.text(f"label {css}", frame.right + 29, at + 4, text))
    return parts


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the same, rising order, at least `gap` apart, near the wanted ones and from low to high if they fit."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def differences(verdicts: Sequence[tuple[str, Verdict]]) -> Markup:
    """Draw differences of accuracy in points: a dot, its 95 % interval, and a line at zero."""
    values = [100 * value for _, one in verdicts for value in (one.low, one.high)]
    ticks = round_ticks(min(0.0, *values), max(0.0, *values))
    left, right, bottom = 330.0, WIDE - 250.0, 16.0 + 40 * len(verdicts)

    def x(points: float) -> float:
        return left + (right - left) * (points - ticks[0]) / (ticks[-1] - ticks[0])

    dot = Markup('<circle class="difference {}" cx="{:.1f}" cy="{:.1f}" r="5.5"/>')
    parts = []
    for tick in ticks:
        parts.append(svg.line("zero" if tick == 0 else "grid", x(tick), 8, x(tick), bottom))
        parts.append(svg.text("tick middle", x(tick), bottom + 18, f"{tick:+g}".replace("-", MINUS) if tick else "0"))
    parts.append(svg.text("tick middle", (left + right) / 2, bottom + 38, "difference in test accuracy, points"))
    for i, (name, one) in enumerate(verdicts):
        y = 32.0 + i * 40
        css = one.words.replace(" ", "-")
        low, middle, high = (100 * value for value in (one.low, one.difference, one.high))
        parts.append(svg.text("label end", left - 16, y + 4.5, fit_text(name, 42)))
        parts.append(svg.line(f"interval {css}", x(low), y, x(high), y))
        parts.append(dot.format(css, x(middle), y))
        parts.append(svg.text("label", right + 20, y + 4.5, f"{points_text(one.difference)} points: {one.words}"))
    return svg.drawing(f"{len(verdicts)} differences in test accuracy", parts, WIDE, round(bottom + 46))
