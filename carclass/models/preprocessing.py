"""The one way from encoded photos to a network's input."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from carclass.data import photo


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device. To a GPU it goes from pinned memory, for which nobody waits until the GPU gets to it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's channel statistics, RGB in 0..1: the input scale of all weights used here."""


def normalise(photos: Tensor) -> Tensor:
    """(N,3,H,W) uint8 or float 0..255 RGB → float, ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(MEAN, device=photos.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=photos.device).view(3, 1, 1) * 255
    return (photos.float() - mean) / std


def decode_photos(images: Sequence[bytes], size: int) -> np.ndarray:
    """Encoded photos as the classifier sees them, in training and in evaluation alike: uint8 (N,size,size,3)."""
    return np.stack([photo.resize(photo.decode(data, min_side=1), size, size) for data in images])


def to_network_input(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N,S,S,3) → normalised float (N,3,S,S) in channels_last on the device."""
    return normalise(upload_photos(pixels, device))


def upload_photos(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N,S,S,3) → uint8 (N,3,S,S): a quarter of the bytes that floats would take travel."""
    return upload(pixels, device).permute(0, 3, 1, 2)
