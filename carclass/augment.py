"""Random changes of training photos, in batches on the device.

Every draw comes from (seed, epoch, photo), so neither the number of workers nor a restart changes it.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from carclass import config


def uniforms(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """(N,count) float64 in [0,1), a function of seed, epoch and each id alone. ids: uint64 (N,)."""
    return (bits(seed, epoch, ids, count) >> np.uint64(11)) * 2.0**-53


def bits(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """(N,count) uint64, each bit random, a function of seed, epoch and each id alone. ids: uint64 (N,).

    The mixing is SplitMix64's (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        state = _mix(
            np.asarray(ids, np.uint64) ^ _mix(np.array(seed, np.uint64) + _mix(np.array(epoch + 1, np.uint64)))
        )
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(state[:, None] + steps)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device. To a GPU it goes from pinned memory, for which nobody waits until the GPU gets to it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def augment(photos: Tensor, settings: config.Augmentation, draws: np.ndarray) -> Tensor:
    """Flips, turns and zooms each photo in one resampling; what comes into view is mirrored, as in Keras.

    photos: float (N,3,S,S); draws: (N,5) in [0,1), see uniforms. Returns float (N,3,S,S).
    """
    matrices = upload(affine_matrices(settings, draws), photos.device).to(photos)
    grid = functional.affine_grid(matrices, list(photos.shape), align_corners=False)
    return functional.grid_sample(photos, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def affine_matrices(settings: config.Augmentation, draws: np.ndarray) -> np.ndarray:
    """(N,2,3) float64: where each output pixel looks, in coordinates of -1..1."""
    mirror_x, mirror_y, turn, tall, wide = draws.T
    flip_x = np.where((mirror_x < 0.5) & (settings.flip != "none"), -1.0, 1.0)
    flip_y = np.where((mirror_y < 0.5) & (settings.flip == "horizontal+vertical"), -1.0, 1.0)
    angle = 2 * math.pi * settings.rotation * (2 * turn - 1)
    zoom_x = 1 + settings.zoom_width * (2 * wide - 1)
    zoom_y = 1 + settings.zoom_height * (2 * tall - 1)
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(len(draws))
    rows = [flip_x * zoom_x * cos, -flip_x * zoom_x * sin, zero, flip_y * zoom_y * sin, flip_y * zoom_y * cos, zero]
    return np.stack(rows, axis=1).reshape(-1, 2, 3)
