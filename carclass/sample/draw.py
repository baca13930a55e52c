"""Drawing of a photo from a key, a car model and a scene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from carclass.sample.background import paint_road, paint_scene
from carclass.sample.car import Pen, Pose, draw_car
from carclass.sample.models import PRETRAIN_MODELS, CarModel

SUPERSAMPLING = 3
"""Canvas pixels per photo pixel, along each axis."""
SECOND_VEHICLE_SHARE = 0.1
"""Share of photos with a second, smaller vehicle."""
PORTRAIT_SHARE, SQUARE_SHARE = 0.08, 0.08
"""The other photos are landscape."""


class Vehicle(NamedTuple):
    """Ground truth of a vehicle in a photo."""

    mask: np.ndarray
    """bool [height, width]: visible pixels of the vehicle, without its shadow."""
    category_id: int
    main: bool
    """True for the photo's labelled car."""


def mask_to_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box x1, y1, x2, y2 of a non-empty mask (bool [height, width]), x2 and y2 exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def draw_photo(key: tuple[int, ...], model: CarModel, scene: str) -> tuple[np.ndarray, list[Vehicle]]:
    """Draw a photo of `model` in `scene`, a name in SCENES, and return its pixels and vehicles.

    Pixels are RGB uint8 [height, width, 3]; the main vehicle comes first. key: non-negative integers that determine the
    photo. Paint, pose, light and noise depend on the key only, so that a car without its background does not reveal the
    scene.
    """
    car_rng, scene_rng, light_rng = (np.random.default_rng((*key, stream)) for stream in range(3))
    width, height = _photo_size(car_rng)
    has_second = bool(car_rng.random() < SECOND_VEHICLE_SHARE)
    pose = _main_pose(car_rng, model, width, height, has_second)
    canvas = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    _paint_background(canvas, scene, model, pose.scaled(SUPERSAMPLING), scene_rng)

    cars = [(model, pose)]
    if has_second:
        cars.insert(0, _second_vehicle(car_rng, model, pose, width))
    masks = [_draw_vehicle(canvas, car_model, car_pose.scaled(SUPERSAMPLING), car_rng) for car_model, car_pose in cars]
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    for mask, (car_model, car_pose) in zip(masks, cars, strict=True):
        pixels = _shaded(pixels, mask, car_model, car_pose)
    vehicles = [Vehicle(masks[-1], model.category_id, True)]
    if has_second:
        visible = masks[0] & ~masks[1]
        vehicles.append(Vehicle(visible, cars[0][0].category_id, False))
    foreground = np.logical_or.reduce(masks)
    return _lit(_textured(pixels, ~foreground, scene_rng), light_rng), vehicles


def _photo_size(rng: np.random.Generator) -> tuple[int, int]:
    longest, shape = int(rng.integers(200, 257)), rng.random()
    shorter = round(longest * rng.uniform(0.62, 0.78))
    if shape < PORTRAIT_SHARE:
        return shorter, longest
    if shape < PORTRAIT_SHARE + SQUARE_SHARE:
        return longest, longest
    return longest, shorter


def _main_pose(rng: np.random.Generator, model: CarModel, width: int, height: int, has_second: bool) -> Pose:
    """Sample a pose whose box covers 24 to 55 % of the frame, if the aspect ratio allows; 1 in 16 cars is cut off."""
    long, high = model.shape.length, model.shape.height
    widest = 0.66 if has_second else 0.95
    scale = np.sqrt(rng.uniform(0.24, 0.55) * width * height / (long * high))
    scale = min(scale, widest * width / long, 0.8 * height / high)
    free = width - scale * long
    share = rng.uniform(-0.12, 0.0) if rng.random() < 1 / 16 else rng.uniform(0.1, 0.9)
    if has_second:
        share = 0.1
    x = free * share + scale * long / 2
    if rng.random() < 0.5:
        x = width - x
    y = height - rng.uniform(0.12, 0.5) * (height - scale * high)
    return Pose(
        x=float(x),
        y=float(y),
        scale=float(scale),
        angle=float(np.deg2rad(rng.uniform(-8, 8))),
        mirrored=bool(rng.random() < 0.5),
    )


def _second_vehicle(rng: np.random.Generator, main: CarModel, pose: Pose, width: int) -> tuple[CarModel, Pose]:
    """Sample a more distant vehicle on the road, on the side with more space beside the main car."""
    model = PRETRAIN_MODELS[rng.integers(len(PRETRAIN_MODELS))]
    right = pose.x < width / 2
    edge = pose.x + main.shape.length * pose.scale / 2 if right else pose.x - main.shape.length * pose.scale / 2
    room = width - edge if right else edge
    scale = min(0.5 * pose.scale, 1.1 * room / model.shape.length)
    x = edge + room * 0.48 if right else edge - room * 0.48
    y = pose.y + (x - pose.x) * np.tan(pose.angle) - 0.3 * pose.scale
    mirrored = bool(rng.random() < 0.5)
    return model, Pose(x=float(x), y=float(y), scale=float(scale), angle=pose.angle, mirrored=mirrored)


def _paint_background(canvas: Image.Image, scene: str, model: CarModel, pose: Pose, rng: np.random.Generator) -> None:
    tall = model.shape.height * pose.scale
    horizon = int(np.clip(pose.y - rng.uniform(0.35, 0.6) * tall, 0.3 * canvas.height, 0.85 * canvas.height))
    paint_scene(canvas, scene, horizon, rng)
    slope = np.tan(pose.angle)
    far = pose.y - rng.uniform(0.4, 0.7) * pose.scale
    edge = (far - pose.x * slope, far + (canvas.width - pose.x) * slope)
    paint_road(canvas, scene, edge, lane=pose.scale * 1.1, rng=rng)


def _draw_vehicle(canvas: Image.Image, model: CarModel, pose: Pose, rng: np.random.Generator) -> np.ndarray:
    """Draw a car and its shadow, and return the car's mask (bool, in photo pixels)."""
    length = model.shape.length
    silhouette = Image.new("L", canvas.size)
    shadow = ImageDraw.Draw(canvas, "RGBA")
    lean = rng.uniform(-0.25, 0.25)
    t = np.linspace(0, 2 * np.pi, 40)
    for grow in np.linspace(1.05, 0.65, 7):
        ellipse = np.stack(
            [length / 2 + lean + grow * 0.54 * length * np.cos(t), grow * 0.2 * np.sin(t) - 0.03], axis=1
        )
        shadow.polygon(pose.to_pixels(ellipse, length).ravel().tolist(), fill=(0, 0, 0, 34))
    draw_car(Pen(canvas, silhouette, pose, length), model, rng)
    return np.asarray(silhouette.reduce(SUPERSAMPLING)) >= 128


def _shaded(pixels: np.ndarray, mask: np.ndarray, model: CarModel, pose: Pose) -> np.ndarray:
    """Apply light from above: a bright shoulder and a darker flank. pixels: float32 [height, width, 3], 0 to 255."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
    up = ((columns - pose.x) * np.sin(pose.angle) - (rows - pose.y) * np.cos(pose.angle)) / pose.scale
    belt, top = model.shape.belt, model.shape.height
    levels = (0.0, model.shape.sill, 0.6 * belt, 0.9 * belt, belt, top - 0.15, top)
    light = np.interp(up, levels, (0.8, 0.72, 0.9, 1.12, 1.0, 1.05, 1.25)).astype(np.float32)
    return pixels * np.where(mask, light, np.float32(1))[..., None]


def _textured(pixels: np.ndarray, background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add coarse and fine grain to the background. background: bool [height, width]."""
    height, width = background.shape
    grain = np.zeros((height, width), dtype=np.float32)
    for cell, strength in ((20, 7.0), (4, 6.0)):
        small = rng.standard_normal((height // cell + 2, width // cell + 2), dtype=np.float32)
        grain += strength * np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))
    return pixels + (grain * background)[..., None]


def _lit(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply gain, a gradient across the frame, a colour cast and sensor noise; return uint8."""
    height, width = pixels.shape[:2]
    across = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(rng.uniform(-0.18, 0.18))
    down = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(rng.uniform(-0.12, 0.12))
    gain = np.float32(rng.uniform(0.78, 1.18)) * (1 + across[None, :] + down[:, None])
    warmth = rng.uniform(-0.06, 0.06)
    cast = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1.5, 5))
    return np.clip(pixels * gain[..., None] * cast + noise, 0, 255).astype(np.uint8)
