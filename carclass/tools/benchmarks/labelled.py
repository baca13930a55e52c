"""The labelled photos and the weights that both sides of a training benchmark are given."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from carclass.errors import UserError
from carclass.ingestion import labels
from carclass.models.preprocessing import decode_photos
from carclass.training.dataloader import PhotoBlock

BACKBONE = "resnet50-imagenet.safetensors"
BLOCK_ROWS = 128
"""Photos per block, as in training."""


class Photo(NamedTuple):
    """A photo with its class, counted from 0 in the order of the classes' names."""

    path: Path
    label: int


def choose(folder: Path | None, counts: dict[str, int]) -> dict[str, list[Photo]]:
    """As many photos of the train subset for each split, taken by their names' hashes; test photos are left alone.

    folder: photos/ and labels.csv (img_name,class,subset). UserError when it isn't that, or holds too few.
    """
    if folder is None or not (folder / "labels.csv").exists():
        raise UserError(f"--photos: {folder} holds no labels.csv. Give a folder with photos/ and labels.csv.")
    with (folder / "labels.csv").open("rb") as stream:
        found = [row for _, row in labels.parse_csv(stream, source=str(folder / "labels.csv"))]
    rows = [row for row in found if row.subset == "train" and (folder / "photos" / row.key).exists()]
    wanted = sum(counts.values())
    if len(rows) < wanted:
        raise UserError(f"--photos: {folder} holds {len(rows)} photos of the train subset; {wanted} are needed.")
    index = {name: i for i, name in enumerate(sorted({row.label for row in rows}))}
    rows.sort(key=lambda row: hashlib.sha256(row.key.encode()).digest())
    photos = iter(Photo(folder / "photos" / row.key, index[row.label]) for row in rows)
    return {split: [next(photos) for _ in range(count)] for split, count in counts.items()}


def num_classes(chosen: dict[str, list[Photo]]) -> int:
    """One more than the highest class."""
    return 1 + max(photo.label for photos in chosen.values() for photo in photos)


def decode(photos: list[Photo], size: int) -> list[PhotoBlock]:
    """The photos as our feed takes them."""
    parts = [photos[start : start + BLOCK_ROWS] for start in range(0, len(photos), BLOCK_ROWS)]
    return [
        PhotoBlock(
            decode_photos([photo.path.read_bytes() for photo in part], size),
            np.array([photo.label for photo in part], np.int64),
            np.array([_identity(photo.path.name) for photo in part], np.uint64),
        )
        for part in parts
    ]


def lay_out(chosen: dict[str, list[Photo]], folder: Path) -> Path:
    """<folder>/<split>/<class>/<photo> as links, with a folder for every class in every split; returns the folder."""
    for split, photos in chosen.items():
        for label in range(num_classes(chosen)):
            (folder / split / f"{label:04d}").mkdir(parents=True, exist_ok=True)
        for photo in photos:
            (folder / split / f"{photo.label:04d}" / photo.path.name).symlink_to(photo.path.resolve())
    return folder


def backbone_file(folder: Path | None) -> Path:
    """ResNet50's weights in a folder; UserError when they aren't there."""
    if folder is None or not (folder / BACKBONE).exists():
        raise UserError(
            f"--weights: give a folder with {BACKBONE}, an ImageNet ResNet50 that strides in the 1x1 convolution, "
            "under torchvision's names."
        )
    return folder / BACKBONE


def _identity(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
