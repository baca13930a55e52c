"""Charts of a sweep's settings: which values went with which accuracy, and which settings matter."""

from collections.abc import Sequence

from markupsafe import Markup

from carclass import svg
from carclass.svg import percent_text
from carclass.tuning.axes import (
    Axis,
    Frame,
    Tick,
    accuracy_text,
    accuracy_ticks,
    axis_of,
    fitted,
    mark,
    measured,
    role,
    told,
)
from carclass.tuning.importance import Importance
from carclass.tuning.outcome import Outcome, Sweep
from carclass.tuning.space import short_names

CHARACTER = 7.2  # of a tick's text in the charts here, with some room
WIDE, TALL = 1000, 380
SLICE_WIDTH, SLICE_HEIGHT = 340, 232
ROW = 48


def parallel(sweep: Sweep) -> Markup:
    """Draw a line for each trial across an axis per setting, to its val accuracy on the last, which colours it."""
    shown = measured(sweep)
    accuracies = [one.accuracy for one in shown]
    frame = Frame(left=96, right=WIDE - 70, top=64, bottom=TALL - 14, ticks=accuracy_ticks(accuracies))
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
    return svg.drawing(f"settings and val accuracy of {len(shown)} trials", [*lines, *labels], WIDE, TALL)


def _head(x: float, position: int, gap: float, name: str) -> Markup:
    """An axis's name, at two heights in turn where axes are close."""
    close = gap < 150
    y = 42 - (22 if close and position % 2 == 0 else 0)
    return _tick("mark middle", x, y, Tick(0, name, name), int((2 * gap if close else gap) / 8.5))


def _tick(css_class: str, x: float, y: float, tick: Tick, length: int) -> Markup:
    """A tick's text in at most so many characters, with all of its name as tooltip where that isn't all."""
    short = fitted(tick.text, max(4, length))
    drawn = svg.text(css_class, x, y, short)
    return drawn if short == tick.name else Markup("<g><title>{}</title>{}</g>").format(tick.name, drawn)


def _crossing(sweep: Sweep, one: Outcome, points: Sequence[tuple[float, float]], accuracies: Sequence[float]) -> Markup:
    low, high = min(accuracies), max(accuracies)
    share = (one.accuracy - low) / (high - low) if high > low else 1.0
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup(
        '<g class="trial {}" style="--a:{:.3f}"><title>{}</title><polyline class="near" points="{}"/>'
        '<polyline class="crossing" points="{}"/></g>'
    ).format(role(sweep, one), share, told(one), path, path)


def slices(sweep: Sweep, key: str) -> Markup:
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


def importance(ranked: Sequence[Importance]) -> Markup:
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
