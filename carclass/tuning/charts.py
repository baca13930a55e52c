"""Charts of a sweep, as SVG."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from carclass.formatting import device_time_text, percent_text, time_unit
from carclass.reporting import svg
from carclass.reporting.axes import Axis, Frame, Tick, accuracy_text, accuracy_ticks, fit_text, round_ticks
from carclass.reporting.svg import BOTTOM, LEFT, RIGHT, TOP
from carclass.tuning.importance import Importance
from carclass.tuning.marks import CROSS, SQUARE, axis_of, mark, measured, role, told
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import short_names

WIDTH, HEIGHT = 1000, 400
LABEL_HEIGHT = 17
BAR = 20
ENDS = {"pruned": CROSS, "failed": SQUARE}
"""What marks the end of a curve that ends early."""

Point = tuple[float, float]


def learning_curves(sweep: SweepResult) -> Markup:
    """Draw val accuracy by epoch, a line for each trial searched, with a cross where pruning ended it.

    A NaN leaves a gap in its line.
    """
    shown = measured(sweep)
    rows = [row for one in shown for row in one.epochs]
    frame = Frame(left=52, right=WIDTH - 84, top=16, bottom=HEIGHT - 48, ticks=accuracy_ticks(_accuracies(rows)))
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
    return svg.drawing(f"val accuracy by epoch of {len(shown)} trials", parts, WIDTH, HEIGHT)


def _accuracies(rows: Sequence[dict[str, float]]) -> list[float]:
    return [row["val_accuracy"] for row in rows]


def _whole(first: int, last: int) -> list[int]:
    """Some ten epochs, the first and the last among them unless another would touch it."""
    step = max(1, math.ceil((last - first) / 10))
    found = [epoch for epoch in range(first, last + 1) if epoch == first or epoch % step == 0]
    kept = [epoch for epoch in found if last - epoch >= 0.6 * step and (epoch == first or epoch - first >= 0.6 * step)]
    return [*kept, last]


def _curve(sweep: SweepResult, one: TrialResult, points: Sequence[Point]) -> Markup:
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


def accuracy_against_time(sweep: SweepResult) -> Markup:
    """Draw val accuracy against the time of its devices that each trial took."""
    shown = measured(sweep)
    frame = Frame(left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=accuracy_ticks(one.accuracy for one in shown))
    longest = max((one.device_seconds for one in shown), default=0.0)
    ticks, parts = _time_axis(longest, sweep.device)
    parts.insert(0, frame.grid())
    for one in shown:
        parts.append(mark(sweep, one, frame.x(one.device_seconds / ticks), frame.y(one.accuracy)))
    return svg.drawing(f"val accuracy against {sweep.device} time of {len(shown)} trials", parts)


def best_so_far(sweep: SweepResult) -> Markup:
    """Draw the best val accuracy among complete trials over the time that all trials together had taken by then.

    Trials are in the order in which they finished; those that ended early add to the time alone.
    """
    over = sorted((one for one in sweep.searched if one.finished is not None), key=lambda one: one.finished or 0.0)
    spent = 0.0
    steps: list[tuple[float, TrialResult]] = []
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


def _last_label(frame: Frame, x: float, one: TrialResult) -> Markup:
    """What was reached, below the line's last step, on the side where there is room."""
    y, name = frame.y(one.accuracy), f"trial {one.trial.number}: {percent_text(one.accuracy)}"
    if x > frame.x(0.6):
        return svg.text("mark end", x - 14, y - 8, name) if y > TOP + 24 else svg.text("mark end", x - 14, y + 5, name)
    return svg.text("mark", x + 14, y + 22, name)


def _time_axis(longest: float, device: str) -> tuple[float, list[Markup]]:
    """Its last tick in seconds, and the ticks drawn."""
    size, unit = time_unit(longest)
    ticks = round_ticks(0.0, max(longest, 1e-3) / size)
    parts = [
        svg.text("tick middle", LEFT + (RIGHT - LEFT) * tick / ticks[-1], BOTTOM + 17, f"{tick:g}") for tick in ticks
    ]
    return ticks[-1] * size, [*parts, svg.axis_name(f"{device} {unit}")]


def pruning(sweep: SweepResult) -> Markup:
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
        parts.append(svg.text("mark end", right, y, device_time_text(total, sweep.device)))
        x = left
        for kind, seconds in pieces:
            width = (right - left) * seconds / full
            tip = f"{meanings[kind]}: {device_time_text(seconds, sweep.device)}"
            if width > 0:
                parts.append(_bar(kind, x, y + 10, width, tip))
            x += width
        y += 74
    label = f"{device_time_text(spent, sweep.device)} spent, {device_time_text(spent + saved, sweep.device)} without pruning"
    return svg.drawing(label, parts, height=round(y - 32))


def _bar(kind: str, x: float, y: float, width: float, tip: str) -> Markup:
    return Markup(
        '<rect class="bar-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>'
    ).format(kind, x, y, width, BAR, tip)


CHARACTER = 7.2  # of a tick's text in the charts here, with some room
SETTINGS_WIDTH, SETTINGS_HEIGHT = 1000, 380
SLICE_WIDTH, SLICE_HEIGHT = 340, 232
ROW = 48


def parallel(sweep: SweepResult) -> Markup:
    """Draw a line for each trial across an axis per setting, to its val accuracy on the last, which colours it."""
    shown = measured(sweep)
    accuracies = [one.accuracy for one in shown]
    frame = Frame(
        left=96, right=SETTINGS_WIDTH - 70, top=64, bottom=SETTINGS_HEIGHT - 14, ticks=accuracy_ticks(accuracies)
    )
    axes = [axis_of(one, [found.trial.values[one.key] for found in shown]) for one in sweep.dimensions]
    gap = (frame.right - frame.left) / len(axes)
    names = short_names([one.key for one in sweep.dimensions])

    def height(place: float) -> float:
        return frame.bottom - (frame.bottom - frame.top) * place

    lines, labels = [], []
    for one in shown:
        places = [axis.place(one.trial.values[d.key]) for axis, d in zip(axes, sweep.dimensions, strict=True)]
        points = [(frame.x(i / len(axes)), height(place)) for i, place in enumerate(places)]
        lines.append(_crossing(sweep, one, [*points, (frame.right, frame.y(one.accuracy))], accuracies))
    for i, (axis, dimension) in enumerate(zip(axes, sweep.dimensions, strict=True)):
        x = frame.x(i / len(axes))
        labels += [svg.line("axis", x, frame.top, x, frame.bottom), _head(x, i, gap, names[dimension.key])]
        length = int(min(gap - 14, frame.left - 10) / CHARACTER)
        labels += [_tick("tick halo end", x - 7, height(tick.place) + 4, tick, length) for tick in axis.ticks]
    labels += [svg.line("axis", frame.right, frame.top, frame.right, frame.bottom)]
    labels.append(_head(frame.right, len(axes), gap, "val accuracy"))
    for tick in frame.ticks:
        labels.append(svg.text("tick halo", frame.right + 8, frame.y(tick) + 4, accuracy_text(tick, frame.ticks)))
    return svg.drawing(
        f"settings and val accuracy of {len(shown)} trials", [*lines, *labels], SETTINGS_WIDTH, SETTINGS_HEIGHT
    )


def _head(x: float, position: int, gap: float, name: str) -> Markup:
    """An axis's name, at two heights in turn where axes are close."""
    close = gap < 150
    y = 42 - (22 if close and position % 2 == 0 else 0)
    return _tick("mark middle", x, y, Tick(0, name, name), int((2 * gap if close else gap) / 8.5))


def _tick(css_class: str, x: float, y: float, tick: Tick, length: int) -> Markup:
    """A tick's text in at most so many characters, with all of its name as tooltip where that isn't all."""
    short = fit_text(tick.text, max(4, length))
    drawn = svg.text(css_class, x, y, short)
    return drawn if short == tick.name else Markup("<g><title>{}</title>{}</g>").format(tick.name, drawn)


def _crossing(
    sweep: SweepResult, one: TrialResult, points: Sequence[tuple[float, float]], accuracies: Sequence[float]
) -> Markup:
    low, high = min(accuracies), max(accuracies)
    share = (one.accuracy - low) / (high - low) if high > low else 1.0
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup(
        '<g class="trial {}" style="--a:{:.3f}"><title>{}</title><polyline class="near" points="{}"/>'
        '<polyline class="crossing" points="{}"/></g>'
    ).format(role(sweep, one), share, told(one), path, path)


def slices(sweep: SweepResult, key: str) -> Markup:
    """Draw val accuracy against one setting's value, a mark for each trial."""
    shown = measured(sweep)
    dimension = next(one for one in sweep.dimensions if one.key == key)
    axis = axis_of(dimension, [one.trial.values[key] for one in shown])
    ticks = accuracy_ticks(one.accuracy for one in shown)
    frame = Frame(left=50, right=SLICE_WIDTH - 16, top=12, bottom=SLICE_HEIGHT - 44, ticks=ticks)
    inner = Frame(left=frame.left + 12, right=frame.right - 10, top=frame.top, bottom=frame.bottom, ticks=ticks)
    rows = _rows(axis, inner)
    parts = [frame.grid(), *_under(axis, inner, rows)]
    for one in shown:
        parts.append(mark(sweep, one, inner.x(axis.place(one.trial.values[key])), inner.y(one.accuracy)))
    height = SLICE_HEIGHT - 17 * (2 - rows)
    return svg.drawing(f"val accuracy against {key}", parts, SLICE_WIDTH, height)


def _rows(axis: Axis, frame: Frame) -> int:
    """In how many rows the ticks' texts have room."""
    room = (frame.right - frame.left) / len(axis.ticks)
    return 2 if len(axis.ticks) > 1 and any(len(tick.text) * CHARACTER > room for tick in axis.ticks) else 1


def _under(axis: Axis, frame: Frame, rows: int) -> list[Markup]:
    """The ticks below a slice, in rows by turns."""
    room = (frame.right - frame.left) / len(axis.ticks)
    parts = []
    for i, tick in enumerate(axis.ticks):
        x = frame.x(tick.place)
        parts.append(svg.line("grid", x, frame.bottom, x, frame.bottom + 5))
        parts.append(_tick("tick middle", x, frame.bottom + 19 + 17 * (i % rows), tick, int(rows * room / CHARACTER)))
    return parts


def importance_chart(ranked: Sequence[Importance]) -> Markup:
    """Draw a bar per setting, with a line from one standard deviation below to one above."""
    names = short_names([one.key for one in ranked])
    left, right = 2.0, svg.WIDTH - 2.0
    longest = max(one.mean + one.spread for one in ranked)
    parts = []
    for i, one in enumerate(ranked):
        y = i * ROW + 16.0
        mean, low, high = (
            left + (right - left) * value / longest
            for value in (one.mean, max(0.0, one.mean - one.spread), one.mean + one.spread)
        )
        tip = (
            f"{one.key}: {percent_text(one.mean)} of how accuracy varies, standard deviation {percent_text(one.spread)}"
        )
        parts.append(_tick("mark", left, y, Tick(0, names[one.key], one.key), 32))
        parts.append(svg.text("tick end", right, y, f"{one.mean:.2f} ± {one.spread:.2f}"))
        parts.append(
            Markup(
                '<g><title>{}</title><rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12"/>'
            ).format(tip, left, y + 9, max(1.0, mean - left))
        )
        parts += [svg.line("whisker", low, y + 15, high, y + 15), svg.line("whisker", low, y + 11, low, y + 19)]
        parts += [svg.line("whisker", high, y + 11, high, y + 19), Markup("</g>")]
    return svg.drawing("importance of each setting", parts, height=ROW * len(ranked))
