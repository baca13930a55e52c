"""Labelled photos and weights for both sides of a training benchmark."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from carclass.data.photo import decode_photos
from carclass.errors import UserError
from carclass.ingestion.label_table import parse_table
from carclass.training.dataloader import PhotoBlock

BACKBONE = "resnet50-imagenet.safetensors"
BLOCK_ROWS = 128
"""Photos per block, as in training."""


class Photo(NamedTuple):
    """A photo with its class index, in alphabetical order of class names."""

    path: Path
    label: int


Splits = dict[str, list[Photo]]


def choose_photos(folder: Path | None, counts: dict[str, int]) -> Splits:
    """Choose `counts` photos per split from the train subset, ordered by the hash of their names.

    folder: photos/ and labels.csv (img_name,class,subset). Raise UserError if it has another layout or too few photos.
    """
    if folder is None or not (folder / "labels.csv").exists():
        problem = "is missing" if folder is None else f"{folder} holds no labels.csv"
        raise UserError(f"--photos {problem}; give a folder with photos/ and labels.csv.")
    with (folder / "labels.csv").open("rb") as stream:
        labelled = [row for _, row in parse_table(stream, source=str(folder / "labels.csv"))]
    rows = [row for row in labelled if row.subset == "train" and (folder / "photos" / row.key).exists()]
    required = sum(counts.values())
    if len(rows) < required:
        raise UserError(f"--photos: {folder} holds {len(rows)} photos of the train subset; {required} are needed.")
    index = {name: i for i, name in enumerate(sorted({row.label for row in rows}))}
    rows.sort(key=lambda row: hashlib.sha256(row.key.encode()).digest())
    photos = iter(Photo(folder / "photos" / row.key, index[row.label]) for row in rows)
    return {split: [next(photos) for _ in range(count)] for split, count in counts.items()}


def num_classes(splits: Splits) -> int:
    """Return the highest class index plus one."""
    return 1 + max(photo.label for photos in splits.values() for photo in photos)


def decode(photos: list[Photo], size: int) -> list[PhotoBlock]:
    """Decode photos to blocks as in training, size x size pixels."""
    parts = [photos[start : start + BLOCK_ROWS] for start in range(0, len(photos), BLOCK_ROWS)]
    return [
        PhotoBlock(
            decode_photos([photo.path.read_bytes() for photo in part], size),
            np.array([photo.label for photo in part], np.int64),
            np.array([_sample_id(photo.path.name) for photo in part], np.uint64),
        )
        for part in parts
    ]


def link_class_folders(splits: Splits, folder: Path) -> Path:
    """Link photos as <folder>/<split>/<class>/<photo>, with every class in every split; return the folder."""
    for split, photos in splits.items():
        for label in range(num_classes(splits)):
            (folder / split / f"{label:04d}").mkdir(parents=True, exist_ok=True)
        for photo in photos:
            (folder / split / f"{photo.label:04d}" / photo.path.name).symlink_to(photo.path.resolve())
    return folder


def backbone_file(folder: Path | None) -> Path:
    """Return the file of ResNet50's weights in a folder. Raise UserError if it is missing."""
    if folder is None or not (folder / BACKBONE).exists():
        raise UserError(
            f"--weights: give a folder with {BACKBONE}, an ImageNet ResNet50 with its stride in the 1x1 convolution, "
            "with torchvision's tensor names."
        )
    return folder / BACKBONE


def _sample_id(name: str) -> int:
    """Return a 64-bit hash of a photo's name."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
