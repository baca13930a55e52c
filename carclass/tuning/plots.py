"""Charts of what a sweep's trials did: how they learned, what they cost, and what pruning saved."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from carclass import svg
from carclass.svg import BOTTOM, LEFT, RIGHT, TOP, percent_text
from carclass.tuning.axes import (
    CROSS,
    SQUARE,
    Frame,
    accuracy_ticks,
    mark,
    measured,
    role,
    round_ticks,
    time_text,
    told,
    unit_of,
)
from carclass.tuning.outcome import Outcome, Sweep

WIDE, TALL = 1000, 400
LABEL_HEIGHT = 17
BAR = 20
ENDS = {"pruned": CROSS, "failed": SQUARE}
"""What marks the end of a curve that ends early."""

Point = tuple[float, float]


def learning_curves(sweep: Sweep) -> Markup:
    """Draw val accuracy by epoch, a line for each trial searched, with a cross where pruning ended it.

    A NaN leaves a gap in its line.
    """
    shown = measured(sweep)
    rows = [row for one in shown for row in one.epochs]
    frame = Frame(left=52, right=WIDE - 84, top=16, bottom=TALL - 48, ticks=accuracy_ticks(_accuracies(rows)))
    first = min((row["epoch"] for row in rows), default=1)
    last = max([*(row["epoch"] for row in rows), *(first + one.max_epochs - 1 for one in shown), first])

    def x(epoch: float) -> float:
        return frame.x((epoch - first) / (last - first) if last > first else 0.5)

    parts = [frame.grid()]
    for epoch in _whole(first, last):
        parts.append(svg.text("tick middle", x(epoch), frame.bottom + 19, str(epoch)))
    parts.append(svg.text("tick middle", frame.x(0.5), frame.bottom + 40, "epoch"))
    ends: dict[str, Point] = {}
    for one in shown:
        points = [(x(row["epoch"]), frame.y(row["val_accuracy"])) for row in one.epochs]
        parts.append(_curve(sweep, one, points))
        if {"best", "baseline"} & {*role(sweep, one).split()}:
            ends[f"trial {one.trial.number}"] = next(p for p in reversed(points) if math.isfinite(p[1]))
    parts += [svg.text("mark", px + 9, py + 5, name) for name, (px, py) in _apart(ends).items()]
    return svg.drawing(f"val accuracy by epoch of {len(shown)} trials", parts, WIDE, TALL)


def _accuracies(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["val_accuracy"] for row in rows]


def _whole(first: int, last: int) -> list[int]:
    """Some ten epochs, the first and the last among them unless another would touch it."""
    step = max(1, math.ceil((last - first) / 10))
    found = [epoch for epoch in range(first, last + 1) if epoch == first or epoch % step == 0]
    kept = [epoch for epoch in found if last - epoch >= 0.6 * step and (epoch == first or epoch - first >= 0.6 * step)]
    return [*kept, last]


def _curve(sweep: Sweep, one: Outcome, points: Sequence[Point]) -> Markup:
    """A trial's line through its finite points, in pieces where one is missing, and a mark at an early end."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in piece)
            drawn.append(
                Markup('<polyline class="near" points="{0}"/><polyline class="curve" points="{0}"/>').format(path)
            )
        elif one.trial.state not in ENDS:
            drawn.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(*piece[0]))
    finite = [point for piece in pieces for point in piece]
    if finite and one.trial.state in ENDS:
        shape = ENDS[one.trial.state]
        drawn.append(Markup('<g transform="translate({:.1f} {:.1f})">{}</g>').format(*finite[-1], shape))
    return Markup('<g class="trial {}"><title>{}</title>{}</g>').format(
        role(sweep, one), told(one), Markup("").join(drawn)
    )


def _apart(ends: dict[str, Point]) -> dict[str, Point]:
    """Labels' places, moved from each other up and down where two would touch."""
    if len(ends) < 2:
        return ends
    (lower, (x1, y1)), (upper, (x2, y2)) = sorted(ends.items(), key=lambda end: -end[1][1])
    lacking = LABEL_HEIGHT - (y1 - y2)
    if abs(x1 - x2) > 60 or lacking <= 0:
        return ends
    return {lower: (x1, y1 + lacking / 2), upper: (x2, y2 - lacking / 2)}


def cost(sweep: Sweep) -> Markup:
    """Draw val accuracy against the time of its devices that each trial took."""
    shown = measured(sweep)
    frame = Frame(left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=accuracy_ticks(one.accuracy for one in shown))
    longest = max((one.device_seconds for one in shown), default=0.0)
    ticks, parts = _time_axis(longest, sweep.device)
    parts.insert(0, frame.grid())
    for one in shown:
        parts.append(mark(sweep, one, frame.x(one.device_seconds / ticks), frame.y(one.accuracy)))
    return svg.drawing(f"val accuracy against {sweep.device} time of {len(shown)} trials", parts)


def best_so_far(sweep: Sweep) -> Markup:
    """Draw the best val accuracy among complete trials over the time that all trials together had taken by then.

    Trials are in the order in which they finished; those that ended early add to the time alone.
    """
    over = sorted((one for one in sweep.searched if one.finished is not None), key=lambda one: one.finished or 0.0)
    spent = 0.0
    steps: list[tuple[float, Outcome]] = []
    for one in over:
        spent += one.device_seconds
        better = not steps or one.accuracy > steps[-1][1].accuracy
        if one.trial.state == "complete" and math.isfinite(one.accuracy) and better:
            steps.append((spent, one))
    frame = Frame(
        left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=accuracy_ticks(one.accuracy for _, one in steps)
    )
    end, parts = _time_axis(spent, sweep.device)
    parts.insert(0, frame.grid())
    corners: list[Point] = []
    for at, one in steps:
        x, y = frame.x(at / end), frame.y(one.accuracy)
        corners += [(x, corners[-1][1] if corners else y), (x, y)]
    if corners:
        corners.append((frame.x(spent / end), corners[-1][1]))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(Markup('<polyline class="steps" points="{}"/>').format(path))
    parts += [mark(sweep, one, frame.x(at / end), frame.y(one.accuracy)) for at, one in steps]
    if steps:
        parts.append(_last_label(frame, frame.x(steps[-1][0] / end), steps[-1][1]))
    return svg.drawing(f"best val accuracy so far over {sweep.device} time", parts)


def _last_label(frame: Frame, x: float, one: Outcome) -> Markup:
    """What was reached, below the line's last step, on the side where there is room."""
    y, name = frame.y(one.accuracy), f"trial {one.trial.number}: {percent_text(one.accuracy)}"
    if x > frame.x(0.6):
        return svg.text("mark end", x - 14, y - 8, name) if y > TOP + 24 else svg.text("mark end", x - 14, y + 5, name)
    return svg.text("mark", x + 14, y + 22, name)


def _time_axis(longest: float, device: str) -> tuple[float, list[Markup]]:
    """Its last tick in seconds, and the ticks drawn."""
    size, unit = unit_of(longest)
    ticks = round_ticks(0.0, max(longest, 1e-3) / size)
    parts = [
        svg.text("tick middle", LEFT + (RIGHT - LEFT) * tick / ticks[-1], BOTTOM + 17, f"{tick:g}") for tick in ticks
    ]
    return ticks[-1] * size, [*parts, svg.axis_name(f"{device} {unit}")]


def pruning(sweep: Sweep) -> Markup:
    """Draw the time of devices that the searched trials took against that of all of them in full."""
    early = [one for one in sweep.searched if one.trial.state == "pruned"]
    cut = sum(one.device_seconds for one in early)
    spent = sum(one.device_seconds for one in sweep.searched)
    saved = sum(one.saved_device_seconds for one in early)
    full = max(spent + saved, 1e-9)
    bars = [
        ("spent", spent, [("rest", spent - cut), ("cut", cut)]),
        ("all trials in full", spent + saved, [("rest", spent - cut), ("cut", cut), ("saved", saved)]),
    ]
    meanings = {"rest": "trials not pruned", "cut": "pruned trials, until then", "saved": "what pruning left out"}
    left, right, y = 2.0, svg.WIDTH - 2.0, 18.0
    parts = []
    for name, total, pieces in bars:
        parts.append(svg.text("mark", left, y, name))
        parts.append(svg.text("mark end", right, y, time_text(total, sweep.device)))
        x = left
        for kind, seconds in pieces:
            width = (right - left) * seconds / full
            tip = f"{meanings[kind]}: {time_text(seconds, sweep.device)}"
            if width > 0:
                parts.append(_bar(kind, x, y + 10, width, tip))
            x += width
        y += 74
    label = f"{time_text(spent, sweep.device)} spent, {time_text(spent + saved, sweep.device)} without pruning"
    return svg.drawing(label, parts, height=round(y - 32))


def _bar(kind: str, x: float, y: float, width: float, tip: str) -> Markup:
    return Markup(
        '<rect class="bar-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>'
    ).format(kind, x, y, width, BAR, tip)
