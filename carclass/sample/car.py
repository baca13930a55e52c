"""Drawing of a car, seen from the side, on a supersampled canvas, and of its silhouette on a second one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, ImageDraw

from carclass.sample.models import CarModel
from carclass.sample.shapes import Point, Shape

Colour = tuple[int, ...]

TYRE: Colour = (24, 24, 27)
PLASTIC: Colour = (44, 45, 49)
CHROME: Colour = (206, 210, 214)
LAMP: Colour = (252, 244, 205)
TAIL_LAMP: Colour = (206, 24, 28)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Position, scale and orientation of a car on a canvas."""

    x: float
    y: float
    """Centre of the car's length, on the ground, in canvas pixels."""
    scale: float
    """Canvas pixels per metre."""
    angle: float
    """Radians; positive lowers the right-hand side."""
    mirrored: bool
    """Facing right instead of left."""

    def to_pixels(self, points: np.ndarray, length: float) -> np.ndarray:
        """Transform points from metres (float [n, 2], y up) to canvas pixels (float [n, 2], y down).

        length: of the car, in metres.
        """
        along = (points[:, 0] - length / 2) * (-self.scale if self.mirrored else self.scale)
        up = points[:, 1] * self.scale
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return np.stack([self.x + along * cos + up * sin, self.y + along * sin - up * cos], axis=1)

    def scaled(self, factor: float) -> Self:
        """Return the pose for a canvas enlarged by `factor`."""
        return type(self)(
            x=self.x * factor,
            y=self.y * factor,
            scale=self.scale * factor,
            angle=self.angle,
            mirrored=self.mirrored,
        )


class Pen:
    """Drawing in a car's coordinates (metres) on a picture and, for opaque colours, on a silhouette."""

    def __init__(self, picture: Image.Image, silhouette: Image.Image, pose: Pose, length: float) -> None:
        self._picture = ImageDraw.Draw(picture, "RGBA")
        self._silhouette = ImageDraw.Draw(silhouette)
        self._pose = pose
        self._length = length

    def polygon(self, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon. A colour with a fourth channel is translucent and leaves the silhouette unchanged."""
        flat = self._pose.to_pixels(np.array(list(points), dtype=np.float64), self._length).ravel().tolist()
        self._picture.polygon(flat, fill=colour)
        if len(colour) == 3:
            self._silhouette.polygon(flat, fill=255)

    def box(self, x1: float, y1: float, x2: float, y2: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.polygon(((x1, y1), (x2, y1), (x2, y2), (x1, y2)), colour)

    def disc(self, centre: Point, radius: float, colour: Colour, turn: float = 1.0) -> None:
        """Fill a disc, or its upper half with `turn` 0.5."""
        t = np.linspace(0.0, 2 * np.pi * turn, 33)
        self.polygon(zip(centre[0] + radius * np.cos(t), centre[1] + radius * np.sin(t), strict=True), colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line on the picture only. width: metres."""
        flat = self._pose.to_pixels(np.array(points), self._length).ravel().tolist()
        self._picture.line(flat, fill=colour, width=max(1, round(width * self._pose.scale)))


def rounded(outline: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Replace each corner (x, y, radius) of a polygon by a quadratic Bezier curve."""
    corners = np.array([(x, y) for x, y, _ in outline])
    points: list[Point] = []
    t = np.linspace(0.0, 1.0, 6)[:, None]
    for before, corner, after, (_, _, radius) in zip(
        np.roll(corners, 1, axis=0), corners, np.roll(corners, -1, axis=0), outline, strict=True
    ):
        start, end = (
            corner + (other - corner) * min(0.5, radius / float(np.hypot(*(other - corner))))
            for other in (before, after)
        )
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * end
        points.extend((float(x), float(y)) for x, y in curve)
    return points


def slab(polygon: Sequence[Point], x1: float, x2: float) -> list[Point]:
    """Clip a convex polygon to x1 <= x <= x2 (Sutherland-Hodgman)."""
    for edge, sign in ((x1, 1.0), (x2, -1.0)):
        kept: list[Point] = []
        for (ax, ay), (bx, by) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
            inside_a, inside_b = sign * (ax - edge) >= 0, sign * (bx - edge) >= 0
            if inside_a:
                kept.append((ax, ay))
            if inside_a != inside_b:
                kept.append((edge, ay + (by - ay) * (edge - ax) / (bx - ax)))
        polygon = kept
    return list(polygon)


def shade(colour: Colour, factor: float) -> Colour:
    """Scale a colour's brightness."""
    red, green, blue = (min(255, max(0, round(channel * factor))) for channel in colour[:3])
    return red, green, blue


def random_paint(rng: np.random.Generator) -> Colour:
    """Sample a car's colour, from the same distribution for all models; 35 % are greys."""
    value = rng.uniform(0.3, 0.97)
    if rng.random() < 0.35:
        return shade((250, 251, 255), value)
    hue, saturation = rng.uniform(0, 6), rng.uniform(0.45, 0.9)
    channels = [value * (1 - saturation * np.clip(abs((hue - k) % 6 - 3) - 1, 0, 1)) for k in (3, 5, 1)]
    red, green, blue = (round(255 * float(c)) for c in channels)
    return red, green, blue


def draw_car(pen: Pen, model: CarModel, rng: np.random.Generator) -> None:
    """Draw a car with random paint and glass tint."""
    shape, paint = model.shape, random_paint(rng)
    glass = shade((96, 116, 134), rng.uniform(0.45, 0.95))
    _draw_body(pen, model, paint, random_paint(rng))
    _draw_windows(pen, model, glass)
    _draw_doors(pen, shape, paint)
    _draw_front(pen, model)
    _draw_rear(pen, model)
    for axle in shape.axles:
        _draw_wheel(pen, model, axle, rng.uniform(0, 2 * np.pi))
    if not shape.cargo:
        x = shape.glass[0][0] + 0.12
        pen.polygon(
            (
                (x, shape.belt),
                (x - 0.16, shape.belt + 0.03),
                (x - 0.13, shape.belt + 0.17),
                (x, shape.belt + 0.16),
            ),
            shade(paint, 0.8),
        )


def _draw_body(pen: Pen, model: CarModel, paint: Colour, cargo_paint: Colour) -> None:
    shape, length = model.shape, model.shape.length
    if model.rails:
        roof = [(x, y) for x, y in shape.glass if y > shape.belt + 0.25]
        top = shape.height
        pen.polygon(
            (
                (roof[0][0], top - 0.05),
                (roof[0][0] + 0.1, top + 0.08),
                (roof[-1][0] - 0.05, top + 0.07),
                (roof[-1][0], top - 0.07),
            ),
            PLASTIC,
        )
    if model.spoiler:
        x, y = shape.rear_lamp[0], max(y for px, y, _ in shape.outline if px > 0.9 * length)
        pen.polygon(
            ((x - 0.42, y), (x - 0.3, y + 0.2), (x + 0.05, y + 0.24), (x - 0.12, y - 0.02)),
            shade(paint, 0.75),
        )
    pen.polygon(rounded(shape.outline), paint)
    if shape.cargo:
        x1, y1, x2, y2 = shape.cargo
        pen.box(x1, y1, x2, y2, cargo_paint)
        pen.box(x1, y1, x2, y1 + 0.1, shade(cargo_paint, 0.6))
        for x in np.linspace(x1, x2, 7)[1:-1]:
            pen.line(((x, y1 + 0.1), (x, y2)), 0.03, shade(cargo_paint, 0.82))
    crease = shape.sill + 0.62 * (shape.belt - shape.sill)
    pen.line(((0.2, crease - 0.04), (length - 0.12, crease + 0.04)), 0.035, (255, 255, 255, 90))
    sill = PLASTIC if model.cladding else shade(paint, 0.55)
    pen.box(0.1, shape.sill, length - 0.1, shape.sill + 0.11, sill)
    for axle in shape.axles:
        if model.cladding:
            pen.disc((axle, shape.wheel), shape.wheel * 1.38, PLASTIC, turn=0.5)
        pen.disc((axle, shape.wheel), shape.wheel * 1.17, (14, 14, 16), turn=0.5)


def _draw_windows(pen: Pen, model: CarModel, glass: Colour) -> None:
    area = model.shape.glass
    left = min(x for x, _ in area)
    span = max(x for x, _ in area) - left
    for start, end in model.panes:
        x1, x2 = left + start * span, left + end * span
        pen.polygon(slab(area, x1, x2), glass)
        width = x2 - x1
        gleam = slab(area, x1 + 0.3 * width, x1 + 0.55 * width)
        middle = sum(y for _, y in gleam) / len(gleam)
        pen.polygon(((x + 0.25 * (y - middle), y) for x, y in gleam), (255, 255, 255, 50))


def _draw_doors(pen: Pen, shape: Shape, paint: Colour) -> None:
    for x in shape.doors:
        pen.line(((x, shape.belt), (x, shape.sill + 0.12)), 0.025, shade(paint, 0.5))
    handle = shape.belt - 0.13
    for x in shape.doors[1:]:
        pen.box(x - 0.3, handle, x - 0.1, handle + 0.045, shade(paint, 0.4))


def _draw_front(pen: Pen, model: CarModel) -> None:
    x, y = model.shape.front_lamp
    if model.grille != "none":
        pen.box(x - 0.02, y - 0.34, x + 0.17, y - 0.06, PLASTIC if model.grille == "dark" else CHROME)
    pen.box(-0.02, model.shape.sill + 0.02, 0.28, model.shape.sill + 0.14, PLASTIC)
    match model.front:
        case "round":
            pen.disc((x + 0.15, y), 0.155, PLASTIC)
            pen.disc((x + 0.15, y), 0.12, LAMP)
        case "slim":
            pen.polygon(((x, y - 0.05), (x + 0.5, y + 0.08), (x + 0.48, y - 0.01), (x + 0.02, y - 0.1)), LAMP)
        case "square":
            pen.box(x, y - 0.12, x + 0.3, y + 0.1, PLASTIC)
            pen.box(x + 0.02, y - 0.09, x + 0.26, y + 0.07, LAMP)
        case "tall":
            pen.polygon(((x, y - 0.2), (x + 0.15, y - 0.2), (x + 0.22, y + 0.22), (x + 0.05, y + 0.12)), LAMP)


def _draw_rear(pen: Pen, model: CarModel) -> None:
    x, y = model.shape.rear_lamp
    pen.box(x - 0.26, model.shape.sill + 0.02, x + 0.04, model.shape.sill + 0.14, PLASTIC)
    match model.rear:
        case "round":
            pen.disc((x - 0.13, y), 0.12, TAIL_LAMP)
            pen.disc((x - 0.13, y), 0.05, (255, 170, 90))
        case "slim":
            pen.box(x - 0.5, y - 0.04, x, y + 0.05, TAIL_LAMP)
        case "block":
            pen.box(x - 0.26, y - 0.13, x, y + 0.13, TAIL_LAMP)
            pen.box(x - 0.26, y - 0.04, x, y + 0.02, (255, 170, 90))
        case "strip":
            pen.box(x - 0.12, y - 0.26, x, y + 0.26, TAIL_LAMP)


def _draw_wheel(pen: Pen, model: CarModel, axle: float, phase: float) -> None:
    """Draw a tyre with a steel or spoked rim."""
    radius = model.shape.wheel
    centre, rim = (axle, radius), radius * model.rim
    metal, gap = ((78, 80, 86), (20, 20, 22)) if model.dark_rim else (CHROME, (70, 72, 76))
    pen.disc(centre, radius, TYRE)
    pen.disc(centre, rim, metal)
    if model.spokes == 0:
        pen.disc(centre, rim * 0.72, shade(metal, 0.72))
        pen.disc(centre, rim * 0.42, metal)
        return
    pen.disc(centre, rim * 0.86, gap)
    for angle in phase + np.arange(model.spokes) * 2 * np.pi / model.spokes:
        along = np.array((np.cos(angle), np.sin(angle)))
        across = np.array((-along[1], along[0])) * min(0.9 / model.spokes, 0.2)
        points = rim * np.array((across * 0.7, along * 0.9 + across, along * 0.9 - across, -across * 0.7)) + centre
        pen.polygon(((float(x), float(y)) for x, y in points), metal)
    pen.disc(centre, rim * 0.24, metal)
