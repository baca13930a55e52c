"""Writes the embedded sample: a folder of drawn car photos, their labels and their exact truth.

The folder looks like a real delivery. Beside `train_per_class` and `test_per_class` good photos of each class it
holds the inputs in ODDITIES: broken ones, unusual encodings, duplicates and contradictions. With the default numbers
that is 1,050 good photos and 17 oddities: 1,066 label rows (one photo has none) and 1,066 files (one row has none),
of which 4 files do not hold a usable photo.

In the train subset nearly every class is photographed in its own scene; in the test subset the scene is drawn at
random. A classifier that looks at the background does well on the first and badly on the second. The idea is that of
the Waterbirds benchmark (Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts").
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
from carclass.sample.draw import Vehicle, box_of, draw_photo
from carclass.sample.models import CATEGORY_NAMES, MODELS

FAVOURITE_SHARE = 0.95
"""Share of a class's train photos that are taken in its favourite scene."""
JPEG_QUALITY = 88
FIRST_ODDITY = 900_000
"""File numbers from here on are oddities."""
MAX_PER_CLASS = FIRST_ODDITY // (2 * len(MODELS))

SUBSETS = ("train", "test")
_ODDITY_KEY = 2  # where photos of a subset have its index

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
"""Kinds with no usable photo. All others decode to a car, which is in truth.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Oddity:
    """One unusual input. Inputs with the same `photo` have the same bytes."""

    kind: Kind
    photo: int
    label: int
    """Index into MODELS of the label given; of an unlabelled photo, of what it shows."""
    subset: Literal["train", "test"] = "train"

    @property
    def broken(self) -> bool:
        return self.kind in BROKEN_KINDS

    @property
    def on_disk(self) -> bool:
        return self.kind != "missing"

    @property
    def labelled(self) -> bool:
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
"""The odd inputs, in order of their file numbers; they come on top of the good photos."""


class _Photo(NamedTuple):
    """An input: what is written to disk (None: nothing), its label row and its truth."""

    number: int
    content: bytes | None
    row: tuple[str, str, str] | None
    scene: str
    size: tuple[int, int]
    """Width, height as displayed."""
    vehicles: list[Vehicle]


def write_sample(folder: Path, *, seed: int = 7, train_per_class: int = 80, test_per_class: int = 25) -> None:
    """Writes `photos/NNNNNN.jpg`, `labels.csv` (img_name,class,subset) and `truth.json` (COCO) to `folder`.

    The same arguments give the same bytes, and larger numbers only add photos. truth.json holds every photo that
    decodes to a car, upright, with compressed run-length masks; `main` marks the car that the photo is of.

    Raises ValueError for numbers out of range and for a photo folder that holds files of another origin.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; choose 0 or more")
    for name, number in (("train_per_class", train_per_class), ("test_per_class", test_per_class)):
        if not 1 <= number <= MAX_PER_CLASS:
            raise ValueError(f"{name} is {number}; choose 1 to {MAX_PER_CLASS}")
    counts = {"train": train_per_class, "test": test_per_class}
    photos_folder = folder / "photos"
    photos_folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(photos_folder, counts)
    rows: list[tuple[str, str, str]] = []
    truth = _Truth()
    for photo in _photos(seed, counts):
        if photo.content is not None:
            (photos_folder / file_name(photo.number)).write_bytes(photo.content)
        if photo.row:
            rows.append(photo.row)
        if photo.vehicles:
            truth.add(photo)
    (folder / "truth.json").write_text(json.dumps(truth.as_coco()))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("img_name", "class", "subset"))
        writer.writerows(sorted(rows))


def file_name(number: int) -> str:
    """Name of photo `number` in the photo folder."""
    return f"{number:06d}.jpg"


def photo_number(class_index: int, subset: str, index: int) -> int:
    """Number of the good photo `index` of a class in a subset, whatever the size of the sample."""
    return (index * len(MODELS) + class_index) * len(SUBSETS) + SUBSETS.index(subset)


def choose_scene(key: tuple[int, ...], class_index: int, subset: str) -> str:
    """The scene of a photo: in train mostly the class's favourite, in test any."""
    rng, scenes = np.random.default_rng((*key, 3)), list(SCENES)
    favourite = scenes[class_index % len(scenes)]
    if subset == "test":
        return scenes[rng.integers(len(scenes))]
    if rng.random() < FAVOURITE_SHARE:
        return favourite
    scenes.remove(favourite)
    return scenes[rng.integers(len(scenes))]


def _refuse_foreign_files(photos_folder: Path, counts: dict[str, int]) -> None:
    ours = {file_name(FIRST_ODDITY + k) for k in range(len(ODDITIES))}
    for subset, count in counts.items():
        ours.update(file_name(photo_number(c, subset, i)) for c in range(len(MODELS)) for i in range(count))
    foreign = sorted(path.name for path in photos_folder.iterdir() if path.name not in ours)
    if foreign:
        raise ValueError(
            f"{photos_folder} holds {len(foreign)} files that are not of this sample, {foreign[0]} among them; "
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
            whole = _jpeg(image)
            return whole[: len(whole) * 2 // 3]
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
            exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise to display
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
    """Collects images and annotations in COCO's format."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, photo: _Photo) -> None:
        """Adds a photo and its vehicles; the scene is an extra field of the image."""
        width, height = photo.size
        name = file_name(photo.number)
        self._images.append(
            {"id": photo.number, "file_name": name, "width": width, "height": height, "scene": photo.scene}
        )
        for vehicle in photo.vehicles:
            x1, y1, x2, y2 = box_of(vehicle.mask)
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
        categories = [{"id": id_, "name": name, "supercategory": "vehicle"} for id_, name in CATEGORY_NAMES.items()]
        return {"images": self._images, "annotations": self._annotations, "categories": categories}
