"""One random change of each training photo's colours or sharpness, in batches on the device.

To the bit the same whatever a photo's company: all is computed pixel by pixel, or exactly.

TrivialAugment (Müller and Hutter 2021, the wide version) draws one of many changes and its strength. These are its
changes of appearance and their strengths; turns and zooms are drawn for every photo, in augment.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from carclass.augment import upload

GRAY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in brightness (ITU-R BT.601)."""
LARGEST = 0.99
"""Of the changes that go both ways: from none of it (a gray photo, say) to nearly twice as much."""


def change(photos: Tensor, draws: np.ndarray) -> Tensor:
    """A copy in which each photo is changed in one way, or in none.

    photos: float (N,3,S,S) RGB, 0..255; draws: (N,2) in [0,1), which change and how strong, see augment.uniforms.
    """
    photos = photos.clone()
    chosen = (draws[:, 0] * (len(CHANGES) + 1)).astype(np.int64)
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(CHANGES) + 1).tolist()
    places = upload(order, photos.device).split(counts)
    strengths = upload(draws[order, 1], photos.device).to(photos).view(-1, 1, 1, 1).split(counts)
    for make, where, strength in zip(CHANGES, places, strengths, strict=False):  # the last ones stay as they are
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
    return functional.equalize(photos.to(torch.uint8)).to(photos)


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
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
    red, green, blue = (share * channel for share, channel in zip(GRAY, photos.split(1, dim=1), strict=True))
    return red + green + blue


def _blend(photos: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """Towards the other picture where the strength is below a half, as far away from it above."""
    return torch.lerp(other.expand_as(photos), photos, 1 + LARGEST * (2 * strength - 1)).clamp(0, 255)
