"""Augmentation of batches of photos on the device, by random numbers of (seed, epoch, sample id)."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as pixel_ops

from carclass.config.schema import AugmentationSettings
from carclass.models.preprocessing import to_device

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601)."""
NUM_DRAWS = 9
"""Random numbers of a photo for warp_photos: two flips, rotation, two zooms, and area, shape and place of the crop."""
LOG_RATIO = math.log(4 / 3)
"""Logarithm of the largest ratio of a crop's sides, relative to the photo's, as in torchvision's RandomResizedCrop."""
LARGEST_STRENGTH = 0.99
"""Largest relative change of brightness, color, contrast and sharpness, down or up."""


def change_appearance(photos: Tensor, draws: np.ndarray) -> Tensor:
    """Return a copy in which one random operation, or none, is applied to each photo.

    photos: float (N,3,S,S) RGB, 0..255. draws: (N,2) in [0,1), see sample_rng.uniforms: operation and strength.
    """
    photos = photos.clone()
    chosen = (draws[:, 0] * (len(OPERATIONS) + 1)).astype(np.int64)
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(OPERATIONS) + 1).tolist()
    groups = to_device(order, photos.device).split(counts)
    strengths = to_device(draws[order, 1], photos.device).to(photos).view(-1, 1, 1, 1).split(counts)
    for operation, indices, strength in zip(OPERATIONS, groups, strengths, strict=False):  # the last group: none
        if len(indices):
            photos[indices] = operation(photos[indices], strength)
    return photos


def brightness(photos: Tensor, strength: Tensor) -> Tensor:
    """Change the brightness. Here and below, strength is float (N,1,1,1) in [0,1): less, 0.5 unchanged, more."""
    return _blend(photos, torch.zeros_like(photos), strength)


def color(photos: Tensor, strength: Tensor) -> Tensor:
    """Change the saturation."""
    return _blend(photos, _gray(photos), strength)


def contrast(photos: Tensor, strength: Tensor) -> Tensor:
    """Change the contrast."""
    # In float64: the order of summation, which depends on the batch, would show in float32.
    return _blend(photos, _gray(photos).double().mean((1, 2, 3), keepdim=True).to(photos), strength)


def sharpness(photos: Tensor, strength: Tensor) -> Tensor:
    """Change the sharpness, except of the outermost pixels."""
    rows = photos[:, :, :-2] + photos[:, :, 1:-1] + photos[:, :, 2:]
    blurred = photos.clone()
    inside = blurred[:, :, 1:-1, 1:-1]
    inside.mul_(4).add_(rows[..., :-2]).add_(rows[..., 1:-1]).add_(rows[..., 2:]).div_(
        13
    )  # kernel: 5 in the middle, 1 around
    return _blend(photos, blurred, strength)


def posterize(photos: Tensor, strength: Tensor) -> Tensor:
    """Reduce each channel to 8 to 2 bits. Here and below, a strength of 0 changes nothing."""
    step = 2.0 ** (6 * strength).round()
    return (photos / step).floor() * step


def solarize(photos: Tensor, strength: Tensor) -> Tensor:
    """Invert values above a threshold."""
    return torch.where(photos >= 256 * (1 - strength), 255 - photos, photos)


def autocontrast(photos: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to the full range, whatever the strength."""
    low, high = photos.amin((2, 3), keepdim=True), photos.amax((2, 3), keepdim=True)
    stretched = (photos - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched, photos)


def equalize(photos: Tensor, strength: Tensor) -> Tensor:
    """Equalize the histogram of each channel, whatever the strength."""
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
    """Interpolate towards the other photo (strength below 0.5) or extrapolate away from it (above)."""
    return torch.lerp(other.expand_as(photos), photos, 1 + LARGEST_STRENGTH * (2 * strength - 1)).clamp(0, 255)


def warp_photos(photos: Tensor, settings: AugmentationSettings, draws: np.ndarray, size: int | None = None) -> Tensor:
    """Flip, zoom, rotate and crop each photo in one resampling, with reflection padding as in Keras.

    The photo's own height and width are zoomed, before it is turned; Keras' layers zoom those of the turned photo.

    photos: float (N,3,S,S). draws: (N,NUM_DRAWS) in [0,1), see sample_rng.uniforms. size: S of the result, by default
    that of the photos. Return float (N,3,size,size).
    """
    matrices = to_device(affine_matrices(settings, draws), photos.device).to(photos)
    side = photos.shape[-1] if size is None else size
    grid = functional.affine_grid(matrices, [len(photos), 3, side, side], align_corners=False)
    return functional.grid_sample(photos, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def affine_matrices(settings: AugmentationSettings, draws: np.ndarray) -> np.ndarray:
    """Return float64 (N,2,3) matrices from output to input coordinates, both in -1..1."""
    flips_x, flips_y, rotations, heights, widths = draws.T[:5]
    flip_x = np.where((flips_x < 0.5) & (settings.flip != "none"), -1.0, 1.0)
    flip_y = np.where((flips_y < 0.5) & (settings.flip == "horizontal+vertical"), -1.0, 1.0)
    angle = 2 * math.pi * settings.rotation * (2 * rotations - 1)
    zoom_x = 1 + settings.zoom_width * (2 * widths - 1)
    zoom_y = 1 + settings.zoom_height * (2 * heights - 1)
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(len(draws))
    rows = [flip_x * zoom_x * cos, -flip_x * zoom_x * sin, zero, flip_y * zoom_y * sin, flip_y * zoom_y * cos, zero]
    matrices = np.stack(rows, axis=1).reshape(-1, 2, 3)
    return matrices if settings.crop is None else _crop(matrices, settings.crop, draws[:, 5:])


def _crop(matrices: np.ndarray, smallest: float, draws: np.ndarray) -> np.ndarray:
    """Return the matrices of crops of turned and zoomed photos.

    smallest: area of the smallest crop, as a share. draws: (N,4): area, ratio of the sides, and place in x and y.
    """
    areas, ratios, places_x, places_y = draws.T
    area, stretch = smallest + (1 - smallest) * areas, np.exp(LOG_RATIO * (ratios - 0.5))
    width, height = np.minimum(1, np.sqrt(area) * stretch), np.minimum(1, np.sqrt(area) / stretch)
    x, y = (1 - width) * (2 * places_x - 1), (1 - height) * (2 * places_y - 1)
    across, down, shift = matrices.transpose(2, 0, 1)
    moved = shift + across * x[:, None] + down * y[:, None]
    return np.stack([across * width[:, None], down * height[:, None], moved], axis=2)
