"""Training photos and storage of the sample's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from carclass.data import photo
from carclass.formatting import bytes_text
from carclass.sample.draw import Vehicle, draw_photo
from carclass.sample.generate import JPEG_QUALITY, choose_scene
from carclass.sample.models import CarModel

SEED = 1_000_003
"""First number of every photo's key. The sample's is 7, so that no training photo is in the sample."""


class Drawing(NamedTuple):
    """A drawn photo with its ground truth."""

    pixels: np.ndarray
    """uint8 (H,W,3) RGB, after JPEG compression as in the sample."""
    vehicles: list[Vehicle]
    """The main vehicle comes first."""
    label: int
    """Index of the main vehicle's model."""


def draw(models: Sequence[CarModel], count: int, seed: int = SEED) -> list[Drawing]:
    """Draw photos of the models in turn, each in a random scene, with two processes."""
    tasks = [((seed, index), models[index % len(models)], index % len(models)) for index in range(count)]
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(_draw_one, tasks, chunksize=50))


def _draw_one(task: tuple[tuple[int, int], CarModel, int]) -> Drawing:
    key, model, label = task
    pixels, vehicles = draw_photo(key, model, choose_scene(key, label, "test"))
    return Drawing(photo.decode(photo.encode(pixels, quality=JPEG_QUALITY)), vehicles, label)


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write float16 safetensors, and beside them the file's hash in the format of sha256sum."""
    data = save({name: value.half().contiguous() for name, value in state.items() if value.is_floating_point()})
    path.write_bytes(data)
    path.with_name(f"{path.name}.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    print(f"{path.name}: {bytes_text(len(data))}")
