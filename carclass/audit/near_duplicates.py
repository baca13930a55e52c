"""Near-duplicates: photos of the same picture that were re-encoded, resized, cropped or mirrored.

Photos with similar features are candidates; they are near-duplicates if a part of one photo matches the other one pixel
by pixel. Features alone don't separate copies from other photos of the same model in the same pose.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

NUM_NEIGHBOURS = 5
"""Candidates of a photo: the photos with the most similar features."""
MIN_COSINE = 0.75
"""Similarity of features below which photos are no candidates."""
SIDE, COARSE_SIDE = 64, 32
"""Sides in pixels of the grey thumbnails, and of their coarser copies that are compared first."""
CROPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Sides of the parts that are compared with the other photo, as shares of the photo's sides."""
MIN_MATCH, MIN_COARSE_MATCH = 0.92, 0.88
"""Correlations of a part with the other photo from which the two are near-duplicates, and from which coarser copies of
them may be some."""
MIN_SPREAD = 1.0
"""Standard deviation of a part, in grey levels of 255, below which it has no contrast that could match."""
CHUNK = 512
"""Pairs, or rows of features, that are compared at a time."""


class Pair(NamedTuple):
    """Two photos, by their indices, and the correlation of their matching parts."""

    first: int
    second: int
    match: float


class Neighbours(NamedTuple):
    """The most similar other photos of each photo, the most similar first."""

    photos: np.ndarray  # int64 (N,K), indices
    cosines: np.ndarray  # float32 (N,K), of the features


def find_neighbours(features: np.ndarray) -> Neighbours:
    """Return the photos whose features, float (N,D), have the smallest angle to those of each photo."""
    unit = functional.normalize(torch.from_numpy(np.asarray(features, np.float32)))
    photos, cosines = [], []
    for start in range(0, len(unit), CHUNK):
        similar = unit[start : start + CHUNK] @ unit.T
        similar[torch.arange(len(similar)), torch.arange(start, start + len(similar))] = -2  # the photo itself
        best = similar.topk(min(NUM_NEIGHBOURS, len(unit) - 1))
        photos.append(best.indices)
        cosines.append(best.values)
    return Neighbours(torch.cat(photos).numpy(), torch.cat(cosines).numpy())


def find_near_duplicates(neighbours: Neighbours, thumbnails: np.ndarray) -> list[Pair]:
    """Return the pairs of near-duplicates, best match first. thumbnails: uint8 (N,SIDE,SIDE), grey."""
    shrink = SIDE // COARSE_SIDE
    coarse = thumbnails.reshape(-1, COARSE_SIDE, shrink, COARSE_SIDE, shrink).mean((2, 4))
    pairs = candidate_pairs(neighbours)
    pairs = pairs[_match_pairs(pairs, coarse) >= MIN_COARSE_MATCH]
    matches = _match_pairs(pairs, thumbnails)
    is_near = matches >= MIN_MATCH
    rows = zip(pairs[is_near].tolist(), matches[is_near].tolist(), strict=True)
    return [Pair(first, second, match) for (first, second), match in sorted(rows, key=lambda row: (-row[1], row[0]))]


def _match_pairs(pairs: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Return the match of the thumbnails of each pair: float (M,). pairs: int (M,2)."""
    matches = [
        match_thumbnails(thumbnails[chunk[:, 0]], thumbnails[chunk[:, 1]])
        for chunk in (pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK))
    ]
    return np.concatenate([*matches, np.zeros(0, np.float32)])


def candidate_pairs(neighbours: Neighbours) -> np.ndarray:
    """Return the pairs of similar photos: int64 (M,2), the smaller index first, each pair once."""
    firsts = np.broadcast_to(np.arange(len(neighbours.photos))[:, None], neighbours.photos.shape)
    pairs = np.stack([firsts, neighbours.photos], axis=-1)[neighbours.cosines >= MIN_COSINE]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def match_thumbnails(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the largest correlation of a part of one thumbnail with the whole other one, mirrored or not: float (N,).

    first, second: (N,S,S), grey levels to 255.
    """
    one, two = (torch.from_numpy(np.asarray(part, np.float32))[:, None] for part in (first, second))
    one, two = (photo - photo.mean((2, 3), keepdim=True) for photo in (one, two))
    best = torch.full((len(one),), -1.0)
    for other in (two, two.flip(3)):
        for whole, part in ((one, other), (other, one)):
            for share in CROPS:
                best = torch.maximum(best, _correlate(whole, part, round(whole.shape[-1] * share)))
    return best.numpy()


def _correlate(whole: Tensor, part: Tensor, side: int) -> Tensor:
    """Return the largest correlation of the windows of a thumbnail with another one, shrunk to a window: float (N,)."""
    template = functional.interpolate(part, (side, side), mode="bilinear", antialias=True, align_corners=False)
    template = template - template.mean((2, 3), keepdim=True)
    template = template / template.norm(dim=(2, 3), keepdim=True).clamp_min(MIN_SPREAD * side)
    products = functional.conv2d(whole.transpose(0, 1), template, groups=len(whole))[0]
    mean, mean_square = (functional.avg_pool2d(values, side, stride=1)[:, 0] for values in (whole, whole**2))
    spread = (mean_square - mean**2).clamp_min(MIN_SPREAD**2).sqrt()
    return (products / (spread * side)).amax((1, 2))
