"""SVG elements of charts, inlined in a page's HTML.

Colours and fonts come from the page's style sheet by class name, so that charts follow light, dark and print. Text is
escaped by `Markup.format`.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from carclass.formatting import percent_text

WIDTH, HEIGHT = 480, 302
LEFT, RIGHT, TOP, BOTTOM = 48, 468, 30, 258  # the plotting area inside it
Point = tuple[float, float]


def nice_ticks(highest: float) -> list[float]:
    """Return four to six round ticks from 0 to at least `highest`, spaced 1, 2, 2.5 or 5 times a power of ten."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 5 >= highest * (1 - 1e-9))
    count = math.ceil(highest / step - 1e-9)
    return [round(step * i, 10) for i in range(count + 1)]


def horizontal_grid(ticks: list[float], percent: bool) -> Markup:
    """Draw labelled lines across the plotting area, the last tick at its top; with `percent` ticks are fractions."""
    parts = []
    for tick in ticks:
        y = BOTTOM - (BOTTOM - TOP) * tick / ticks[-1]
        parts.append(line("grid", LEFT, y, RIGHT, y))
        parts.append(text("tick end", LEFT - 8, y + 4, percent_text(tick, 0) if percent else f"{tick:g}"))
    return Markup("").join(parts)


def axis_name(name: str) -> Markup:
    """Draw the name of the horizontal axis."""
    return text("tick middle", (LEFT + RIGHT) / 2, BOTTOM + 38, name)


def line(css_class: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    """Draw a straight line."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        css_class, x1, y1, x2, y2
    )


def polyline(css_class: str, points: Sequence[Point]) -> Markup:
    """Draw a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(css_class, path)


def curve(points: Sequence[Point], css_class: str = "curve", dot_class: str | None = "dot") -> Markup:
    """Draw a line through points, with a gap at each that is not finite.

    A point without a finite neighbour is drawn as a dot; with dot_class None it is left out.
    """
    segments: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            segments[-1].append(point)
        else:
            segments.append([])
    drawn = []
    for segment in segments:
        if len(segment) > 1:
            drawn.append(polyline(css_class, segment))
        elif segment and dot_class is not None:
            drawn.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(dot_class, *segment[0]))
    return Markup("").join(drawn)


def text(css_class: str, x: float, y: float, content: str) -> Markup:
    """Draw a line of text on its baseline; the classes `end` and `middle` set its anchor."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css_class, x, y, content)


def drawing(label: str, parts: list[Markup], width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """Return the SVG document; `label` is its accessible name."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )
