"""Charts of a sweep, as SVG."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from carclass.formatting import device_time_text, percent_text, time_unit
from carclass.reporting import svg
from carclass.reporting.axes import Axis, Frame, Tick, accuracy_text, accuracy_ticks, fit_text, round_ticks
from carclass.reporting.svg import BOTTOM, LEFT, RIGHT, TOP, Point
from carclass.tuning.importance import Importance
from carclass.tuning.marks import CROSS, SQUARE, charted_trials, css_classes, is_best, mark, setting_axis, tooltip
from carclass.tuning.results import SweepResult, TrialResult
from carclass.tuning.search_space import short_names

WIDTH, CURVES_HEIGHT, PARALLEL_HEIGHT = 1000, 400, 380
SLICE_WIDTH, SLICE_HEIGHT = 340, 232
LABEL_HEIGHT, BAR_HEIGHT, IMPORTANCE_ROW = 17, 20, 48
CHARACTER = 7.2  # width of a character of a tick's label, with a margin
END_MARKS = {"pruned": CROSS, "failed": SQUARE}
"""Marks at the end of curves that end early, by state."""


def learning_curves(sweep: SweepResult) -> Markup:
    """Draw val accuracy by epoch, a line per searched trial, with a mark where pruning or a failure ended it.

    A NaN leaves a gap in its line.
    """
    charted = charted_trials(sweep)
    rows = [row for result in charted for row in result.epochs]
    ticks = accuracy_ticks([row["val_accuracy"] for row in rows])
    frame = Frame(left=52, right=WIDTH - 84, top=16, bottom=CURVES_HEIGHT - 48, ticks=ticks)
    first = min((row["epoch"] for row in rows), default=1)
    last = max([*(row["epoch"] for row in rows), *(first + result.max_epochs - 1 for result in charted), first])

    def x(epoch: float) -> float:
        return frame.x((epoch - first) / (last - first) if last > first else 0.5)

    parts = [frame.grid()]
    for epoch in _epoch_ticks(first, last):
        parts.append(svg.text("tick middle", x(epoch), frame.bottom + 19, str(epoch)))
    parts.append(svg.text("tick middle", frame.x(0.5), frame.bottom + 40, "epoch"))
    ends: dict[str, Point] = {}
    for result in charted:
        points = [(x(row["epoch"]), frame.y(row["val_accuracy"])) for row in result.epochs]
        parts.append(_learning_curve(sweep, result, points))
        if result.trial.number == 0 or is_best(sweep, result):
            ends[f"trial {result.trial.number}"] = next(p for p in reversed(points) if math.isfinite(p[1]))
    parts += [svg.text("mark", px + 9, py + 5, name) for name, (px, py) in _separate_labels(ends).items()]
    return svg.drawing(f"val accuracy by epoch of {len(charted)} trials", parts, WIDTH, CURVES_HEIGHT)


def _epoch_ticks(first: int, last: int) -> list[int]:
    """Return about ten epochs with the first and the last; others that would touch these are left out."""
    step = max(1, math.ceil((last - first) / 10))
    epochs = [epoch for epoch in range(first, last + 1) if epoch == first or epoch % step == 0]
    kept = [epoch for epoch in epochs if last - epoch >= 0.6 * step and (epoch == first or epoch - first >= 0.6 * step)]
    return [*kept, last]


def _learning_curve(sweep: SweepResult, result: TrialResult, points: Sequence[Point]) -> Markup:
    """Draw a trial's line, with an invisible wider one to hover over, and a mark at an early end."""
    end_mark = END_MARKS.get(result.trial.state)
    parts = [svg.curve(points, "near", None), svg.curve(points, "curve", None if end_mark else "dot")]
    finite = [point for point in points if math.isfinite(point[1])]
    if finite and end_mark:
        parts.append(Markup('<g transform="translate({:.1f} {:.1f})">{}</g>').format(*finite[-1], end_mark))
    return _trial_group(sweep, result, parts)


def _trial_group(sweep: SweepResult, result: TrialResult, parts: Sequence[Markup]) -> Markup:
    """Group the shapes of a trial under its CSS classes and tooltip."""
    return Markup('<g class="trial {}"><title>{}</title>{}</g>').format(
        css_classes(sweep, result), tooltip(result), Markup("").join(parts)
    )


def _separate_labels(ends: dict[str, Point]) -> dict[str, Point]:
    """Move the two labels at the ends of curves apart vertically if they would overlap."""
    if len(ends) < 2:
        return ends
    (lower, (x1, y1)), (upper, (x2, y2)) = sorted(ends.items(), key=lambda end: -end[1][1])
    overlap = LABEL_HEIGHT - (y1 - y2)
    if abs(x1 - x2) > 60 or overlap <= 0:
        return ends
    return {lower: (x1, y1 + overlap / 2), upper: (x2, y2 - overlap / 2)}


def accuracy_against_time(sweep: SweepResult) -> Markup:
    """Draw val accuracy against the device time of each trial."""
    charted = charted_trials(sweep)
    ticks = accuracy_ticks(result.accuracy for result in charted)
    frame = Frame(left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=ticks)
    longest = max((result.device_seconds for result in charted), default=0.0)
    end, axis = _time_axis(longest, sweep.device)
    parts = [frame.grid(), *axis]
    for result in charted:
        parts.append(mark(sweep, result, frame.x(result.device_seconds / end), frame.y(result.accuracy)))
    return svg.drawing(f"val accuracy against {sweep.device} time of {len(charted)} trials", parts)


def best_so_far(sweep: SweepResult) -> Markup:
    """Draw the best val accuracy of complete trials against the cumulative device time of all trials.

    Trials are in the order in which they ended; pruned and failed ones only add time.
    """
    spent, steps = 0.0, list[tuple[float, TrialResult]]()
    for result in sorted(sweep.searched, key=lambda result: result.end_time or 0.0):
        if result.end_time is None:
            continue
        spent += result.device_seconds
        if result.has_result and (not steps or result.accuracy > steps[-1][1].accuracy):
            steps.append((spent, result))
    ticks = accuracy_ticks(result.accuracy for _, result in steps)
    frame = Frame(left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, ticks=ticks)
    end, axis = _time_axis(spent, sweep.device)
    parts = [frame.grid(), *axis]
    corners: list[Point] = []
    for time, result in steps:
        x, y = frame.x(time / end), frame.y(result.accuracy)
        corners += [(x, corners[-1][1] if corners else y), (x, y)]
    if corners:
        parts.append(svg.polyline("steps", [*corners, (frame.x(spent / end), corners[-1][1])]))
    parts += [mark(sweep, result, frame.x(time / end), frame.y(result.accuracy)) for time, result in steps]
    if steps:
        parts.append(_last_step_label(frame, frame.x(steps[-1][0] / end), steps[-1][1]))
    return svg.drawing(f"best val accuracy so far over {sweep.device} time", parts)


def _last_step_label(frame: Frame, x: float, result: TrialResult) -> Markup:
    """Label the last step of the line on the side with more space."""
    y, label = frame.y(result.accuracy), f"trial {result.trial.number}: {percent_text(result.accuracy)}"
    if x > frame.x(0.6):
        return svg.text("mark end", x - 14, y - 8 if y > TOP + 24 else y + 5, label)
    return svg.text("mark", x + 14, y + 22, label)


def _time_axis(longest: float, device: str) -> tuple[float, list[Markup]]:
    """Draw a time axis from 0; return its end in seconds, and its parts."""
    size, unit = time_unit(longest)
    ticks = round_ticks(0.0, max(longest, 1e-3) / size)
    parts = [
        svg.text("tick middle", LEFT + (RIGHT - LEFT) * tick / ticks[-1], BOTTOM + 17, f"{tick:g}") for tick in ticks
    ]
    return ticks[-1] * size, [*parts, svg.axis_name(f"{device} {unit}")]


def pruning(sweep: SweepResult) -> Markup:
    """Draw the device time of the search beside that of the same trials without pruning."""
    pruned = sum(result.device_seconds for result in sweep.pruned)
    spent, saved = sweep.device_seconds, sweep.saved_device_seconds
    total = max(spent + saved, 1e-9)
    bars = [
        ("spent", spent, [("rest", spent - pruned), ("cut", pruned)]),
        ("without pruning", spent + saved, [("rest", spent - pruned), ("cut", pruned), ("saved", saved)]),
    ]
    names = {"rest": "trials not pruned", "cut": "pruned trials", "saved": "saved by pruning"}
    left, right, y = 2.0, svg.WIDTH - 2.0, 18.0
    parts = []
    for name, seconds_of_bar, segments in bars:
        parts.append(svg.text("mark", left, y, name))
        parts.append(svg.text("mark end", right, y, device_time_text(seconds_of_bar, sweep.device)))
        x = left
        for kind, seconds in segments:
            width = (right - left) * seconds / total
            title = f"{names[kind]}: {device_time_text(seconds, sweep.device)}"
            if width > 0:
                parts.append(_bar(kind, x, y + 10, width, title))
            x += width
        y += 74
    times = [device_time_text(seconds, sweep.device) for seconds in (spent, spent + saved)]
    return svg.drawing(f"{times[0]} spent, {times[1]} without pruning", parts, height=round(y - 32))


def _bar(kind: str, x: float, y: float, width: float, title: str) -> Markup:
    return Markup(
        '<rect class="bar-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"><title>{}</title></rect>'
    ).format(kind, x, y, width, BAR_HEIGHT, title)


def parallel_coordinates(sweep: SweepResult) -> Markup:
    """Draw a line per trial across one axis per setting, ending at its val accuracy, which also gives its colour."""
    charted = charted_trials(sweep)
    accuracies = [result.accuracy for result in charted]
    ticks = accuracy_ticks(accuracies)
    frame = Frame(left=96, right=WIDTH - 70, top=64, bottom=PARALLEL_HEIGHT - 14, ticks=ticks)
    axes = [setting_axis(one, [result.trial.values[one.key] for result in charted]) for one in sweep.dimensions]
    num_axes = len(axes)
    gap = (frame.right - frame.left) / num_axes
    names = short_names([dimension.key for dimension in sweep.dimensions])
    lines, labels = [], []
    for result in charted:
        places = [axis.place(result.trial.values[d.key]) for axis, d in zip(axes, sweep.dimensions, strict=True)]
        points = [(frame.x(i / num_axes), _height(frame, place)) for i, place in enumerate(places)]
        lines.append(_parallel_line(sweep, result, [*points, (frame.right, frame.y(result.accuracy))], accuracies))
    for i, (axis, dimension) in enumerate(zip(axes, sweep.dimensions, strict=True)):
        x = frame.x(i / num_axes)
        labels += [svg.line("axis", x, frame.top, x, frame.bottom), _axis_title(x, i, gap, names[dimension.key])]
        length = int(min(gap - 14, frame.left - 10) / CHARACTER)
        labels += [_label("tick halo end", x - 7, _height(frame, tick.place) + 4, tick, length) for tick in axis.ticks]
    labels.append(svg.line("axis", frame.right, frame.top, frame.right, frame.bottom))
    labels.append(_axis_title(frame.right, num_axes, gap, "val accuracy"))
    for tick in frame.ticks:
        labels.append(svg.text("tick halo", frame.right + 8, frame.y(tick) + 4, accuracy_text(tick, frame.ticks)))
    title = f"settings and val accuracy of {len(charted)} trials"
    return svg.drawing(title, [*lines, *labels], WIDTH, PARALLEL_HEIGHT)


def _height(frame: Frame, place: float) -> float:
    """Return the y coordinate of a place from 0, the frame's bottom, to 1, its top."""
    return frame.bottom - (frame.bottom - frame.top) * place


def _axis_title(x: float, position: int, gap: float, name: str) -> Markup:
    """Draw an axis's name; names of close axes alternate between two heights."""
    is_close = gap < 150
    y = 42 - (22 if is_close and position % 2 == 0 else 0)
    return _label("mark middle", x, y, Tick(0, name, name), int((2 * gap if is_close else gap) / 8.5))


def _label(css_class: str, x: float, y: float, tick: Tick, length: int) -> Markup:
    """Draw a tick's label in at most `length` characters, with the full name as tooltip if it is shortened."""
    short = fit_text(tick.text, max(4, length))
    drawn = svg.text(css_class, x, y, short)
    return drawn if short == tick.name else Markup("<g><title>{}</title>{}</g>").format(tick.name, drawn)


def _parallel_line(
    sweep: SweepResult, result: TrialResult, points: Sequence[Point], accuracies: Sequence[float]
) -> Markup:
    low, high = min(accuracies), max(accuracies)
    share = (result.accuracy - low) / (high - low) if high > low else 1.0
    return Markup('<g class="trial {}" style="--a:{:.3f}"><title>{}</title>{}{}</g>').format(
        css_classes(sweep, result),
        share,
        tooltip(result),
        svg.polyline("near", points),
        svg.polyline("crossing", points),
    )


def slice_plot(sweep: SweepResult, key: str) -> Markup:
    """Draw val accuracy against one setting's value, a mark per trial."""
    charted = charted_trials(sweep)
    dimension = next(dimension for dimension in sweep.dimensions if dimension.key == key)
    axis = setting_axis(dimension, [result.trial.values[key] for result in charted])
    ticks = accuracy_ticks(result.accuracy for result in charted)
    frame = Frame(left=50, right=SLICE_WIDTH - 16, top=12, bottom=SLICE_HEIGHT - 44, ticks=ticks)
    inner = Frame(left=frame.left + 12, right=frame.right - 10, top=frame.top, bottom=frame.bottom, ticks=ticks)
    num_rows = _num_label_rows(axis, inner)
    parts = [frame.grid(), *_labels_below(axis, inner, num_rows)]
    for result in charted:
        parts.append(mark(sweep, result, inner.x(axis.place(result.trial.values[key])), inner.y(result.accuracy)))
    height = SLICE_HEIGHT - LABEL_HEIGHT * (2 - num_rows)
    return svg.drawing(f"val accuracy against {key}", parts, SLICE_WIDTH, height)


def _num_label_rows(axis: Axis, frame: Frame) -> int:
    """Return 2 if the labels of an axis are too long for a single row, else 1."""
    width = (frame.right - frame.left) / len(axis.ticks)
    return 2 if len(axis.ticks) > 1 and any(len(tick.text) * CHARACTER > width for tick in axis.ticks) else 1


def _labels_below(axis: Axis, frame: Frame, num_rows: int) -> list[Markup]:
    """Draw the labels below an axis, alternating between rows."""
    width = (frame.right - frame.left) / len(axis.ticks)
    parts = []
    for i, tick in enumerate(axis.ticks):
        x, y = frame.x(tick.place), frame.bottom + 19 + LABEL_HEIGHT * (i % num_rows)
        parts.append(svg.line("grid", x, frame.bottom, x, frame.bottom + 5))
        parts.append(_label("tick middle", x, y, tick, int(num_rows * width / CHARACTER)))
    return parts


def importance_chart(ranked: Sequence[Importance]) -> Markup:
    """Draw a bar per setting, with an error bar of one standard deviation to each side."""
    names = short_names([importance.key for importance in ranked])
    left, right = 2.0, svg.WIDTH - 2.0
    longest = max(importance.mean + importance.std for importance in ranked)
    parts = []
    for i, one in enumerate(ranked):
        y = i * IMPORTANCE_ROW + 16.0
        values = (one.mean, max(0.0, one.mean - one.std), one.mean + one.std)
        mean, low, high = (left + (right - left) * value / longest for value in values)
        title = f"{one.key}: {percent_text(one.mean)} ± {percent_text(one.std)} of the variance of accuracy"
        parts.append(_label("mark", left, y, Tick(0, names[one.key], one.key), 32))
        parts.append(svg.text("tick end", right, y, f"{one.mean:.2f} ± {one.std:.2f}"))
        parts.append(
            Markup(
                '<g><title>{}</title><rect class="column" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12"/>'
            ).format(title, left, y + 9, max(1.0, mean - left))
        )
        parts += [svg.line("whisker", low, y + 15, high, y + 15), svg.line("whisker", low, y + 11, low, y + 19)]
        parts += [svg.line("whisker", high, y + 11, high, y + 19), Markup("</g>")]
    return svg.drawing("importance of each setting", parts, height=IMPORTANCE_ROW * len(ranked))
