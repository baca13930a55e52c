"""Augmentation of training photos in batches on the device, drawn from (seed, epoch, sample id)."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as pixel_ops

from carclass.config.schema import AugmentationSettings
from carclass.models.preprocessing import upload

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in brightness (ITU-R BT.601)."""
LARGEST_STRENGTH = 0.99
"""Of the changes that go both ways: from none of it (a gray photo, say) to nearly twice as much."""


def change_appearance(photos: Tensor, draws: np.ndarray) -> Tensor:
    """A copy in which each photo is changed in one way, or in none.

    photos: float (N,3,S,S) RGB, 0..255; draws: (N,2) in [0,1), which change and how strong, see augment.uniforms.
    """
    photos = photos.clone()
    chosen = (draws[:, 0] * (len(OPERATIONS) + 1)).astype(np.int64)
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(OPERATIONS) + 1).tolist()
    places = upload(order, photos.device).split(counts)
    strengths = upload(draws[order, 1], photos.device).to(photos).view(-1, 1, 1, 1).split(counts)
    for make, where, strength in zip(OPERATIONS, places, strengths, strict=False):  # the last ones stay as they are
        if len(where):
            photos[where] = make(photos[where], strength)
    return photos


def brightness(photos: Tensor, strength: Tensor) -> Tensor:
    """Darker or brighter. Here and below, strength is float (N,1,1,1) in [0,1), and a half changes nothing."""
    return _blend(photos, torch.zeros_like(photos), strength)


def color(photos: Tensor, strength: Tensor) -> Tensor:
    """Paler or more colourful."""
    return _blend(photos, _gray(photos), strength)


def contrast(photos: Tensor, strength: Tensor) -> Tensor:
    """Flatter or richer in contrast."""
    # In float64, where the order in which a batch is summed doesn't show.
    return _blend(photos, _gray(photos).double().mean((1, 2, 3), keepdim=True).to(photos), strength)


def sharpness(photos: Tensor, strength: Tensor) -> Tensor:
    """Softer or sharper; the outermost pixels stay."""
    rows = photos[:, :, :-2] + photos[:, :, 1:-1] + photos[:, :, 2:]
    soft = photos.clone()
    inside = soft[:, :, 1:-1, 1:-1]
    inside.mul_(4).add_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:]).div_(13)  # 5 in the middle, 1 around
    return _blend(photos, soft, strength)


def posterize(photos: Tensor, strength: Tensor) -> Tensor:
    """Fewer levels in each colour: 8 bits to 2. Here and below, a strength of zero changes nothing."""
    step = 2.0 ** (6 * strength).round()
    return (photos / step).floor() * step


def solarize(photos: Tensor, strength: Tensor) -> Tensor:
    """What is brighter than a limit, turned into its negative."""
    return torch.where(photos >= 256 * (1 - strength), 255 - photos, photos)


def autocontrast(photos: Tensor, strength: Tensor) -> Tensor:
    """Each colour stretched to the whole range, whatever the strength."""
    low, high = photos.amin((2, 3), keepdim=True), photos.amax((2, 3), keepdim=True)
    stretched = (photos - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched, photos)


def equalize(photos: Tensor, strength: Tensor) -> Tensor:
    """Each colour's levels made equally frequent, whatever the strength."""
    return pixel_ops.equalize(photos.to(torch.uint8)).to(photos)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    brightness,
    color,
    contrast,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
)


def _gray(photos: Tensor) -> Tensor:
    red, green, blue = (share * channel for share, channel in zip(GRAY_WEIGHTS, photos.split(1, dim=1), strict=True))
    return red + green + blue


def _blend(photos: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Towards the other picture where the strength is below a half, as far away from it above."""
    return torch.lerp(other.expand_as(photos), photos, 1 + LARGEST_STRENGTH * (2 * strength - 1)).clamp(0, 255)


def warp_photos(photos: Tensor, settings: AugmentationSettings, draws: np.ndarray) -> Tensor:
    """Flips, turns and zooms each photo in one resampling; what comes into view is mirrored, as in Keras.

    photos: float (N,3,S,S); draws: (N,5) in [0,1), see uniforms. Returns float (N,3,S,S).
    """
    matrices = upload(affine_matrices(settings, draws), photos.device).to(photos)
    grid = functional.affine_grid(matrices, list(photos.shape), align_corners=False)
    return functional.grid_sample(photos, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def affine_matrices(settings: AugmentationSettings, draws: np.ndarray) -> np.ndarray:
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
