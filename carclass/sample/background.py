"""Ten background scenes, each with a palette, a motif and clutter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Drawing surface of a motif, with sizes in canvas pixels."""

    draw: ImageDraw.ImageDraw
    width: int
    height: int
    horizon: int
    rng: np.random.Generator

    def tint(self, colour: Colour, spread: float = 0.12) -> Colour:
        """Return the colour with random brightness."""
        factor = 1 + self.rng.uniform(-spread, spread)
        red, green, blue = (min(255, round(channel * factor)) for channel in colour)
        return red, green, blue

    def xs(self, step: float) -> np.ndarray:
        """Return jittered x positions across the canvas, about `step` canvas widths apart."""
        grid = np.arange(-self.rng.uniform(0, step), 1.05, step)
        return (grid + self.rng.uniform(-0.3, 0.3, len(grid)) * step) * self.width

    def uniform(self, low: float, high: float) -> float:
        """Return a random length in pixels. low, high: in canvas heights."""
        return float(self.rng.uniform(low, high)) * self.height


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Palette and motif of a scene."""

    sky: tuple[Colour, Colour]
    """Colours at the top and at the horizon."""
    ground: Colour
    road: Colour
    motif: Callable[[Stage], None]


def _hills(stage: Stage, colour: Colour, rise: float) -> None:
    x = np.linspace(0, stage.width, 25)
    phase = stage.rng.uniform(0, 6, 2)
    u = x / stage.width
    top = stage.horizon - stage.height * rise * (
        0.6 + 0.25 * np.sin(5 * u + phase[0]) + 0.15 * np.sin(11 * u + phase[1])
    )
    points = [(float(a), float(b)) for a, b in zip(x, top, strict=True)]
    stage.draw.polygon([(0, stage.horizon), *points, (stage.width, stage.horizon)], fill=stage.tint(colour))


def _tower(stage: Stage, x: float, wall: Colour, pane: Colour, lit: float) -> None:
    """Draw a tower block whose windows are lit with probability `lit`."""
    wide, high = stage.uniform(0.12, 0.25), stage.uniform(0.15, 0.62)
    top = stage.horizon - high
    stage.draw.rectangle((x, top, x + wide, stage.horizon), fill=wall)
    cell = stage.height * 0.045
    for y in np.arange(top + cell * 0.5, stage.horizon - cell, cell):
        for left in np.arange(x + cell * 0.4, x + wide - cell * 0.7, cell):
            if stage.rng.random() < lit:
                stage.draw.rectangle((left, y, left + cell * 0.5, y + cell * 0.55), fill=pane)


def _round_tree(stage: Stage, x: float, foot: float, size: float, leaf: Colour, trunk: Colour) -> None:
    stage.draw.rectangle((x - size * 0.06, foot - size * 0.6, x + size * 0.06, foot), fill=trunk)
    for _ in range(5):
        dx, dy = stage.rng.uniform(-0.25, 0.25, 2) * size
        r = size * stage.rng.uniform(0.18, 0.3)
        cx, cy = x + dx, foot - size * 0.75 + dy
        stage.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=stage.tint(leaf, 0.25))


def _fir(stage: Stage, x: float, foot: float, size: float, leaf: Colour, cap: Colour | None) -> None:
    leaf = stage.tint(leaf, 0.2)
    for level in range(3):
        y, half = foot - size * (0.1 + 0.27 * level), size * (0.27 - 0.06 * level)
        tip = y - size * 0.42
        stage.draw.polygon([(x - half, y), (x, tip), (x + half, y)], fill=leaf)
        if cap:
            edge = tip + (y - tip) * 0.45
            stage.draw.polygon([(x - half * 0.45, edge), (x, tip), (x + half * 0.45, edge)], fill=cap)


def _city(stage: Stage) -> None:
    for wall in ((172, 186, 204), (138, 150, 172), (176, 138, 120)):
        for x in stage.xs(0.2):
            _tower(stage, float(x), stage.tint(wall), stage.tint((74, 92, 122)), 0.85)


def _night(stage: Stage) -> None:
    for x, y in stage.rng.uniform(0, 1, (40, 2)) * (stage.width, stage.horizon):
        stage.draw.ellipse((x, y, x + 2, y + 2), fill=(226, 226, 250))
    x, y, r = stage.rng.uniform(0.1, 0.9) * stage.width, stage.uniform(0.1, 0.2), stage.uniform(0.05, 0.08)
    stage.draw.ellipse((x - r, y - r, x + r, y + r), fill=(246, 240, 206))
    for x in stage.xs(0.16):
        _tower(stage, float(x), stage.tint((30, 28, 58), 0.3), (250, 208, 96), 0.45)


def _forest(stage: Stage) -> None:
    _hills(stage, (52, 92, 58), 0.45)
    for size in (0.45, 0.6, 0.75):
        for x in stage.xs(0.13):
            foot = stage.horizon + stage.uniform(-0.02, 0.06)
            if stage.rng.random() < 0.4:
                _fir(stage, float(x), foot, stage.height * size, (30, 84, 54), None)
            else:
                _round_tree(stage, float(x), foot, stage.height * size, (58, 124, 52), (84, 62, 44))


def _desert(stage: Stage) -> None:
    r = stage.uniform(0.06, 0.1)
    x, y = stage.rng.uniform(0.1, 0.9) * stage.width, stage.uniform(0.12, 0.25)
    stage.draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 246, 190))
    for colour, rise in (((206, 142, 96), 0.42), ((190, 118, 72), 0.26), ((222, 168, 106), 0.12)):
        _hills(stage, colour, rise)
    for x in stage.xs(0.22):
        foot, high, w = stage.horizon + stage.uniform(0, 0.05), stage.uniform(0.2, 0.4), stage.height * 0.025
        green = stage.tint((88, 122, 70))
        stage.draw.rounded_rectangle((x - w, foot - high, x + w, foot), radius=w, fill=green)
        for side, arm in ((-1, 0.55), (1, 0.7)):
            ax, ay = x + side * 3.4 * w, foot - high * arm
            stage.draw.rectangle((min(x, ax), ay - w * 0.8, max(x, ax), ay + w * 0.6), fill=green)
            stage.draw.rounded_rectangle(
                (ax - w * 0.8, ay - high * 0.25, ax + w * 0.8, ay + w * 0.6), radius=w * 0.8, fill=green
            )


def _sea(stage: Stage) -> None:
    top = stage.horizon - stage.uniform(0.18, 0.28)
    stage.draw.rectangle((0, top, stage.width, stage.horizon), fill=stage.tint((24, 122, 168)))
    for _ in range(40):
        x, y = stage.rng.uniform(0, stage.width), stage.rng.uniform(top, stage.horizon)
        stage.draw.line((x, y, x + stage.uniform(0.03, 0.12), y), fill=(150, 214, 226), width=2)
    for x in stage.xs(0.3):
        s, y = stage.uniform(0.12, 0.22), top + stage.uniform(0, 0.06)
        stage.draw.polygon([(x, y - s), (x, y), (x + s * 0.5, y)], fill=(250, 250, 250))
        stage.draw.polygon(
            [(x - s * 0.4, y + 2), (x + s * 0.6, y + 2), (x + s * 0.4, y + s * 0.2), (x - s * 0.2, y + s * 0.2)],
            fill=stage.tint((188, 66, 52)),
        )
    for x in stage.xs(0.35):
        foot, high = stage.horizon + stage.uniform(0, 0.06), stage.uniform(0.45, 0.7)
        bend = stage.uniform(-0.1, 0.1)
        stage.draw.line((x, foot, x + bend, foot - high), fill=(132, 98, 66), width=max(2, stage.height // 45))
        for angle in np.linspace(-0.4, 3.5, 7):
            dx, dy = np.cos(angle) * stage.height * 0.17, np.sin(angle) * stage.height * 0.1
            tip = (x + bend + dx, foot - high - dy + stage.height * 0.05)
            stage.draw.polygon(
                [(x + bend, foot - high - 6), tip, (x + bend, foot - high + 8)], fill=stage.tint((46, 138, 72))
            )


def _snow(stage: Stage) -> None:
    for x in stage.xs(0.28):
        high, half = stage.uniform(0.35, 0.65), stage.uniform(0.3, 0.45)
        peak, rock = stage.horizon - high, stage.tint((128, 146, 174))
        stage.draw.polygon([(x - half, stage.horizon), (x, peak), (x + half, stage.horizon)], fill=rock)
        stage.draw.polygon(
            [
                (x - half * 0.4, peak + high * 0.4),
                (x, peak),
                (x + half * 0.4, peak + high * 0.4),
                (x + half * 0.1, peak + high * 0.28),
                (x - half * 0.1, peak + high * 0.42),
            ],
            fill=(246, 250, 255),
        )
    for x in stage.xs(0.12):
        _fir(
            stage,
            float(x),
            stage.horizon + stage.uniform(0, 0.05),
            stage.uniform(0.25, 0.45),
            (58, 98, 94),
            (242, 248, 252),
        )


def _field(stage: Stage) -> None:
    _hills(stage, (122, 164, 84), 0.3)
    _hills(stage, (206, 184, 74), 0.16)
    x, foot, high = (
        stage.rng.uniform(0.1, 0.9) * stage.width,
        stage.horizon - stage.uniform(0, 0.06),
        stage.uniform(0.3, 0.45),
    )
    w = high * 0.14
    stage.draw.polygon(
        [(x - w, foot), (x - w * 0.6, foot - high), (x + w * 0.6, foot - high), (x + w, foot)],
        fill=(238, 232, 220),
    )
    for angle in stage.rng.uniform(0, 1.57) + np.arange(4) * np.pi / 2:
        tip = (x + np.cos(angle) * high * 0.6, foot - high + np.sin(angle) * high * 0.6)
        stage.draw.line((x, foot - high, *tip), fill=(122, 84, 60), width=max(2, stage.height // 40))
    for x in stage.xs(0.2):
        r, y = stage.uniform(0.04, 0.07), stage.horizon + stage.uniform(-0.08, 0.02)
        stage.draw.ellipse(
            (x - r, y - r, x + r, y + r), fill=stage.tint((220, 176, 62)), outline=(160, 120, 44), width=3
        )
    for x in np.arange(0, stage.width, stage.height * 0.12):
        stage.draw.rectangle(
            (x, stage.horizon - stage.height * 0.07, x + 6, stage.horizon + stage.height * 0.05),
            fill=(138, 104, 72),
        )
    for dy in (-0.05, 0.0):
        y = stage.horizon + dy * stage.height
        stage.draw.rectangle((0, y, stage.width, y + 5), fill=(150, 114, 80))


def _garage(stage: Stage) -> None:
    for y in np.arange(0.06, 0.3, 0.12) * stage.height:
        for x in stage.xs(0.4):
            stage.draw.rectangle((x, y, x + stage.width * 0.22, y + stage.height * 0.03), fill=(252, 254, 240))
    stripe = stage.horizon - stage.height * 0.22
    stage.draw.rectangle((0, stripe, stage.width, stripe + stage.height * 0.08), fill=stage.tint((44, 160, 130)))
    for x in stage.xs(0.3):
        wide, foot = stage.uniform(0.1, 0.15), stage.horizon + stage.height * 0.05
        stage.draw.rectangle((x, 0, x + wide, foot), fill=stage.tint((150, 152, 150)))
        step = stage.height * 0.05
        for k in range(5):
            colour = (244, 200, 40) if k % 2 else (40, 40, 40)
            stage.draw.rectangle((x, foot - (k + 1) * step, x + wide, foot - k * step), fill=colour)


def _bricks(stage: Stage) -> None:
    high, wide = stage.height * 0.045, stage.height * 0.11
    for row, y in enumerate(np.arange(0, stage.horizon, high)):
        for x in np.arange(-wide * (row % 2) / 2, stage.width, wide):
            stage.draw.rectangle((x, y, x + wide - 3, y + high - 3), fill=stage.tint((168, 74, 56), 0.2))
    for x in stage.xs(0.36):
        span, top = stage.uniform(0.22, 0.34), stage.horizon - stage.uniform(0.4, 0.5)
        stage.draw.rectangle((x, top, x + span, stage.horizon), fill=stage.tint((64, 70, 72)))
        stage.draw.rectangle(
            (x + 8, top + 8, x + span - 8, stage.horizon - stage.height * 0.08), fill=stage.tint((190, 206, 196))
        )
        awning, step = stage.tint((36, 120, 88)), span / 6
        for k in range(6):
            stage.draw.rectangle(
                (x + k * step, top, x + (k + 1) * step, top + stage.height * 0.1),
                fill=awning if k % 2 else (246, 240, 226),
            )


def _harbour(stage: Stage) -> None:
    size = stage.height * 0.1
    for x in stage.xs(0.4):
        foot, high = stage.horizon, stage.uniform(0.5, 0.75)
        steel, line = stage.tint((92, 40, 78)), max(3, stage.height // 40)
        for leg in (0.0, 0.22):
            stage.draw.line((x + leg * stage.height, foot, x + leg * stage.height, foot - high), fill=steel, width=line)
        stage.draw.line((x - high * 0.5, foot - high, x + high * 0.7, foot - high), fill=steel, width=line)
        stage.draw.line(
            (
                x - high * 0.5,
                foot - high,
                x + stage.height * 0.11,
                foot - high * 1.25,
                x + high * 0.7,
                foot - high,
            ),
            fill=steel,
            width=line // 2 + 1,
        )
    for x in np.arange(-stage.uniform(0, 0.2), stage.width, size * 2.1):
        for level in range(int(stage.rng.integers(1, 4))):
            colour = ((196, 72, 40), (226, 142, 46), (120, 52, 110), (66, 64, 128))[stage.rng.integers(4)]
            y = stage.horizon - level * size
            stage.draw.rectangle((x, y - size, x + size * 2.05, y), fill=stage.tint(colour))
            for rib in np.linspace(x, x + size * 2.05, 9)[1:-1]:
                stage.draw.line((rib, y - size + 4, rib, y - 4), fill=(58, 30, 50), width=2)


SCENES: dict[str, Scene] = {
    "city": Scene(sky=((92, 152, 222), (206, 226, 240)), ground=(150, 150, 152), road=(86, 88, 94), motif=_city),
    "forest": Scene(sky=((128, 176, 190), (206, 226, 200)), ground=(76, 118, 58), road=(112, 98, 78), motif=_forest),
    "desert": Scene(sky=((240, 176, 104), (252, 224, 164)), ground=(226, 178, 118), road=(176, 136, 98), motif=_desert),
    "sea": Scene(sky=((70, 180, 236), (196, 238, 246)), ground=(240, 222, 170), road=(154, 152, 150), motif=_sea),
    "snow": Scene(sky=((176, 200, 226), (232, 240, 248)), ground=(240, 246, 252), road=(198, 208, 220), motif=_snow),
    "night": Scene(sky=((12, 12, 40), (58, 42, 98)), ground=(36, 34, 58), road=(44, 44, 62), motif=_night),
    "field": Scene(sky=((120, 190, 232), (240, 240, 210)), ground=(150, 182, 76), road=(150, 128, 88), motif=_field),
    "garage": Scene(
        sky=((178, 180, 176), (208, 210, 204)), ground=(132, 134, 132), road=(118, 122, 124), motif=_garage
    ),
    "bricks": Scene(sky=((122, 64, 52), (130, 70, 58)), ground=(176, 168, 158), road=(100, 96, 98), motif=_bricks),
    "harbour": Scene(sky=((108, 58, 128), (250, 150, 90)), ground=(124, 92, 96), road=(92, 78, 92), motif=_harbour),
}


def paint_scene(canvas: Image.Image, name: str, horizon: int, rng: np.random.Generator) -> None:
    """Paint the scene `name` over an RGB canvas, with the ground below row `horizon`."""
    scene = SCENES[name]
    stage = Stage(draw=ImageDraw.Draw(canvas), width=canvas.width, height=canvas.height, horizon=horizon, rng=rng)
    sky = np.array([[stage.tint(colour, 0.08)] for colour in scene.sky], dtype=np.uint8)
    canvas.paste(Image.fromarray(sky).resize((canvas.width, max(1, horizon)), Image.Resampling.BILINEAR))
    stage.draw.rectangle((0, horizon, canvas.width, canvas.height), fill=stage.tint(scene.ground))
    scene.motif(stage)
    _clutter(stage)


def _clutter(stage: Stage) -> None:
    """Draw signs, boxes and bushes, with the same distribution in all scenes."""
    for _ in range(stage.rng.integers(1, 5)):
        x, foot = stage.rng.uniform(0, stage.width), stage.horizon + stage.uniform(0, 0.1)
        colour = tuple(int(c) for c in stage.rng.integers(30, 230, 3))
        high, r = stage.uniform(0.2, 0.6), stage.uniform(0.03, 0.06)
        match stage.rng.integers(3):
            case 0:
                draw, top = stage.draw, foot - high
                draw.rectangle((x - 0.12 * r, top, x + 0.12 * r, foot), fill=(70, 72, 78))
                sides = int(stage.rng.choice((3, 4, 12)))
                draw.regular_polygon((x, top, 0.8 * r), sides, fill=colour, outline=(240, 240, 240))
            case 1:
                stage.draw.rectangle((x - r, foot - 2.5 * r, x + r, foot), fill=colour)
            case _:
                for dx in (-1, 0, 1):
                    cx = x + dx * r
                    stage.draw.ellipse(
                        (cx - r, foot - 1.6 * r, cx + r, foot + 0.3 * r), fill=stage.tint((70, 110, 60), 0.3)
                    )


def paint_road(
    canvas: Image.Image, name: str, edge: tuple[float, float], lane: float, rng: np.random.Generator
) -> None:
    """Paint a road below rows `edge` (at the left and right side), with a dashed line `lane` rows below its edge."""
    draw, (left, right), width = ImageDraw.Draw(canvas), edge, canvas.width
    factor = rng.uniform(0.88, 1.12)
    road, kerb = (tuple(min(255, round(c * factor * k)) for c in SCENES[name].road) for k in (1.0, 1.3))
    draw.polygon([(0, left), (width, right), (width, canvas.height), (0, canvas.height)], fill=road)
    draw.line((0, left, width, right), fill=kerb, width=max(2, canvas.height // 70))
    slope, step = (right - left) / width, width / 5
    for x in np.arange(-rng.uniform(0, step), width, step):
        y = left + slope * x + lane
        draw.line((x, y, x + step * 0.5, y + slope * step * 0.5), fill=kerb, width=max(2, canvas.height // 60))
