"""Preprocessing from decoded photos to the network's input, the same in training, evaluation, prediction and export."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Normalisation(NamedTuple):
    """Scale of a network's input: the channels' mean and standard deviation, RGB in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's channel statistics: the scale of most weights."""


def to_network_input(pixels: np.ndarray, device: torch.device, scale: Normalisation = IMAGENET) -> Tensor:
    """Convert uint8 (N,S,S,3) to normalised float (N,3,S,S) in channels_last on the device."""
    return normalise(photos_to_device(pixels, device), scale)


def photos_to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Copy uint8 (N,S,S,3) to the device as uint8 (N,3,S,S): a quarter of the bytes of floats."""
    return to_device(pixels, device).permute(0, 3, 1, 2)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU asynchronously, from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def normalise(photos: Tensor, scale: Normalisation = IMAGENET) -> Tensor:
    """Normalise (N,3,H,W) RGB, uint8 or float 0..255, to float with mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(values, device=photos.device).view(3, 1, 1) * 255 for values in scale)
    return (photos.float() - mean) / std
