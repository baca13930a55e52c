"""Generator of the sample: a folder of synthetic car photos, their labels and ground truth.

Beside `train_per_class` and `test_per_class` good photos of each class, the folder contains the inputs in ODDITIES:
broken files, unusual encodings, duplicates and contradictions. With the default numbers there are 1,050 good photos and
17 oddities: 1,066 label rows (one photo has none) and 1,066 files (one row has none), of which 4 are unusable.

In train, 95 % of a class's photos show the class's own scene; in test, scenes are random. A classifier that relies on
the background therefore does well on train and badly on test. This follows the Waterbirds benchmark (Sagawa et al.
2020, "Distributionally Robust Neural Networks for Group Shifts").
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from carclass.sample.background import SCENES
from carclass.sample.draw import Vehicle, draw_photo, mask_to_box
from carclass.sample.models import CATEGORY_NAMES, MODELS

FAVOURITE_SHARE = 0.95
"""Share of a class's train photos that show its favourite scene."""
JPEG_QUALITY = 88
FIRST_ODDITY = 900_000
"""Number of the first oddity's file."""
MAX_PER_CLASS = FIRST_ODDITY // (2 * len(MODELS))

SUBSETS = ("train", "test")
_ODDITY_KEY = 2  # in place of the subset's index in the key of a photo

Kind = Literal[
    "truncated",
    "text",
    "empty",
    "one_pixel",
    "missing",
    "unlabelled",
    "cmyk",
    "exif_rotated",
    "grayscale",
    "png_16_bit",
    "png_transparent",
    "duplicate",
    "conflicting_labels",
    "train_in_test",
]
BROKEN_KINDS = frozenset({"truncated", "text", "empty", "one_pixel", "missing"})
"""Kinds without a usable photo. All others decode to a car that is in truth.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Oddity:
    """Unusual input. Inputs with the same `photo` have the same bytes."""

    kind: Kind
    photo: int
    label: int
    """Index into MODELS of the label, or of the car shown in an unlabelled photo."""
    subset: Literal["train", "test"] = "train"

    @property
    def broken(self) -> bool:
        """Return True if there is no usable photo."""
        return self.kind in BROKEN_KINDS

    @property
    def on_disk(self) -> bool:
        """Return True if there is a file."""
        return self.kind != "missing"

    @property
    def labelled(self) -> bool:
        """Return True if there is a label row."""
        return self.kind != "unlabelled"


ODDITIES: tuple[Oddity, ...] = (
    Oddity(kind="truncated", photo=0, label=0),
    Oddity(kind="text", photo=1, label=1),
    Oddity(kind="empty", photo=2, label=2),
    Oddity(kind="one_pixel", photo=3, label=3),
    Oddity(kind="missing", photo=4, label=4),
    Oddity(kind="unlabelled", photo=5, label=5),
    Oddity(kind="cmyk", photo=6, label=6),
    Oddity(kind="exif_rotated", photo=7, label=7),
    Oddity(kind="grayscale", photo=8, label=8),
    Oddity(kind="png_16_bit", photo=9, label=9),
    Oddity(kind="png_transparent", photo=10, label=0),
    Oddity(kind="duplicate", photo=11, label=2),
    Oddity(kind="duplicate", photo=11, label=2),
    Oddity(kind="conflicting_labels", photo=12, label=0),
    Oddity(kind="conflicting_labels", photo=12, label=1),
    Oddity(kind="train_in_test", photo=13, label=6),
    Oddity(kind="train_in_test", photo=13, label=6, subset="test"),
)
"""All oddities, in the order of their file numbers."""


class _Photo(NamedTuple):
    """Input with its file content (None: no file), label row and ground truth."""

    number: int
    content: bytes | None
    row: tuple[str, str, str] | None
    scene: str
    size: tuple[int, int]
    """Width and height as displayed."""
    vehicles: list[Vehicle]


def write_sample(folder: Path, *, seed: int = 7, train_per_class: int = 80, test_per_class: int = 25) -> None:
    """Write `photos/NNNNNN.jpg`, `labels.csv` (img_name,class,subset) and `truth.json` (COCO) to `folder`.

    The output is deterministic, and larger numbers only add photos. truth.json contains every photo that decodes to a
    car, upright, with compressed RLE masks; `main` marks the labelled car. Raise ValueError if a number is out of range
    or the photo folder contains other files.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; choose 0 or more")
    for name, number in (("train_per_class", train_per_class), ("test_per_class", test_per_class)):
        if not 1 <= number <= MAX_PER_CLASS:
            raise ValueError(f"{name} is {number}; choose 1 to {MAX_PER_CLASS}")
    counts = {"train": train_per_class, "test": test_per_class}
    photos_folder = folder / "photos"
    photos_folder.mkdir(parents=True, exist_ok=True)
    _check_other_files(photos_folder, counts)
    rows: list[tuple[str, str, str]] = []
    truth = _Truth()
    for photo in _photos(seed, counts):
        if photo.content is not None:
            (photos_folder / file_name(photo.number)).write_bytes(photo.content)
        if photo.row:
            rows.append(photo.row)
        if photo.vehicles:
            truth.add(photo)
    (folder / "truth.json").write_text(json.dumps(truth.as_coco(), allow_nan=False))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("img_name", "class", "subset"))
        writer.writerows(sorted(rows))


def file_name(number: int) -> str:
    """Return the file name of a photo."""
    return f"{number:06d}.jpg"


def photo_number(class_index: int, subset: str, index: int) -> int:
    """Return the number of good photo `index` of a class in a subset, independent of the sample's size."""
    return (index * len(MODELS) + class_index) * len(SUBSETS) + SUBSETS.index(subset)


def choose_scene(key: tuple[int, ...], class_index: int, subset: str) -> str:
    """Sample the scene of a photo: mostly the class's favourite scene in train, any scene in test."""
    rng, scenes = np.random.default_rng((*key, 3)), list(SCENES)
    favourite = scenes[class_index % len(scenes)]
    if subset == "test":
        return scenes[rng.integers(len(scenes))]
    if rng.random() < FAVOURITE_SHARE:
        return favourite
    scenes.remove(favourite)
    return scenes[rng.integers(len(scenes))]


def _check_other_files(photos_folder: Path, counts: dict[str, int]) -> None:
    """Raise ValueError if the folder contains files that are not part of the sample."""
    expected = {file_name(FIRST_ODDITY + k) for k in range(len(ODDITIES))}
    for subset, count in counts.items():
        expected.update(file_name(photo_number(c, subset, i)) for c in range(len(MODELS)) for i in range(count))
    others = sorted(path.name for path in photos_folder.iterdir() if path.name not in expected)
    if others:
        raise ValueError(
            f"{photos_folder} contains {len(others)} files that are not part of the sample, such as {others[0]}; "
            "choose an empty folder"
        )


def _photos(seed: int, counts: dict[str, int]) -> Iterator[_Photo]:
    for subset, count in counts.items():
        for index in range(count):
            for class_index in range(len(MODELS)):
                yield _good_photo(seed, class_index, subset, index)
    for position, oddity in enumerate(ODDITIES):
        yield _odd_photo(seed, FIRST_ODDITY + position, oddity)


def _good_photo(seed: int, class_index: int, subset: str, index: int) -> _Photo:
    number = photo_number(class_index, subset, index)
    key = (seed, class_index, SUBSETS.index(subset), index)
    scene = choose_scene(key, class_index, subset)
    pixels, vehicles = draw_photo(key, MODELS[class_index], scene)
    row = (file_name(number), MODELS[class_index].name, subset)
    size = (pixels.shape[1], pixels.shape[0])
    return _Photo(number, _jpeg(Image.fromarray(pixels)), row, scene, size, vehicles)


def _odd_photo(seed: int, number: int, oddity: Oddity) -> _Photo:
    shown = next(other.label for other in ODDITIES if other.photo == oddity.photo)
    key = (seed, shown, _ODDITY_KEY, oddity.photo)
    scene = choose_scene(key, shown, "train")
    pixels, vehicles = draw_photo(key, MODELS[shown], scene)
    row = (file_name(number), MODELS[oddity.label].name, oddity.subset) if oddity.labelled else None
    content = _odd_content(oddity.kind, pixels, vehicles[0].mask) if oddity.on_disk else None
    size = (pixels.shape[1], pixels.shape[0])
    return _Photo(number, content, row, scene, size, [] if oddity.broken else vehicles)


def _odd_content(kind: Kind, pixels: np.ndarray, mask: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    match kind:
        case "truncated":
            complete = _jpeg(image)
            return complete[: len(complete) * 2 // 3]
        case "text":
            return b"This page has moved. Please ask the archive for the photo.\n"
        case "empty":
            return b""
        case "one_pixel":
            return _jpeg(image.resize((1, 1)))
        case "cmyk":
            return _jpeg(image.convert("CMYK"))
        case "exif_rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise to display
            return _jpeg(Image.fromarray(np.rot90(pixels)), exif=exif.tobytes())
        case "grayscale":
            return _jpeg(image.convert("L"))
        case "png_16_bit":
            return _png(Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257))
        case "png_transparent":
            return _png(Image.fromarray(np.dstack([pixels, np.uint8(255) * mask])))
        case _:
            return _jpeg(image)


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, **options)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class _Truth:
    """Collector of images and annotations in COCO format."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, photo: _Photo) -> None:
        """Add a photo and its vehicles; the scene is an additional field of the image."""
        width, height = photo.size
        name = file_name(photo.number)
        self._images.append(
            {"id": photo.number, "file_name": name, "width": width, "height": height, "scene": photo.scene}
        )
        for vehicle in photo.vehicles:
            x1, y1, x2, y2 = mask_to_box(vehicle.mask)
            encoded = coco_mask.encode(np.asfortranarray(vehicle.mask, dtype=np.uint8))
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": photo.number,
                    "category_id": vehicle.category_id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(vehicle.mask.sum()),
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                    "iscrowd": 0,
                    "main": vehicle.main,
                }
            )

    def as_coco(self) -> dict[str, Any]:
        """Return the content of a COCO file."""
        categories = [{"id": id_, "name": name, "supercategory": "vehicle"} for id_, name in CATEGORY_NAMES.items()]
        return {"images": self._images, "annotations": self._annotations, "categories": categories}
