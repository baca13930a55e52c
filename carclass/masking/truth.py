"""True masks of a COCO file, matched with the photos of a dataset and checked against their sizes."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from carclass import storage
from carclass.data import dataset
from carclass.errors import UserError
from carclass.masking.rle import Rle, rle_area, segmentation_rle

KEY = "mask.truth"
ADVICE = "Correct it, or leave `truth` out."
MAX_LISTED = 5
"""Categories named in an error."""


class CocoFile(NamedTuple):
    """Content of a COCO file."""

    uri: str
    images: dict[Any, dict[str, Any]]  # by id
    annotations: list[dict[str, Any]]
    vehicle_categories: list[Any]  # ids of the detector's classes; empty if the file has no categories


def load_truth(uri: str, photos: dataset.Dataset, classes: Collection[str]) -> dict[str, Rle]:
    """Return the true mask of each photo of a dataset that a COCO file has one for, by key.

    An image belongs to the photo of that key, or else of that file name. Its mask is the annotation with `main`, or
    else the largest one of the detector's classes. photos: unmasked, or masked already; classes: names of the
    detector's. Raise UserError if the file is damaged, is ambiguous, has no mask for any of the photos, or has masks of
    other shapes than theirs.
    """
    coco = _read_coco(uri, classes)
    names = {image["file_name"] for image in coco.images.values()}
    sizes, first_key = _read_sizes(photos, names)
    keys = match_names(names, sizes, uri)
    if not keys:
        raise UserError(
            f"`{KEY}`: {uri} has none of the photos of dataset `{photos.name}`, whose first key is {first_key}; the "
            f"first `file_name` is {min(names, default=None)}. Images are matched by key, then by file name. {ADVICE}"
        )
    masks = _choose_masks(coco, keys)
    if not masks:
        raise UserError(f"`{KEY}`: {uri} has no mask for any of the photos of dataset `{photos.name}`. {ADVICE}")
    _check_sizes(masks, sizes, uri)
    return masks


def _read_sizes(photos: dataset.Dataset, names: Iterable[str]) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return (height, width) of the photos with the file names of `names`, by key, and the first key of all photos."""
    columns = ["source_height", "source_width"] if photos.manifest["kind"] == "masked" else ["height", "width"]
    files = pa.array({_file_name(name) for name in names}, pa.string())
    sizes: dict[str, tuple[int, int]] = {}
    first_keys = []
    for rows in photos.read_parts(["key", *columns]):
        first_keys.append(pc.min(rows["key"]).as_py())
        has_name = pc.is_in(pc.replace_substring_regex(rows["key"], r"(?s)\A.*/", ""), files)
        keys, heights, widths = (column.to_pylist() for column in rows.filter(has_name).columns)
        sizes |= dict(zip(keys, zip(heights, widths, strict=True), strict=True))
    return sizes, min(first_keys, default=None)


def match_names(names: Iterable[str], keys: Collection[str], uri: str) -> dict[str, str]:
    """Return the key of each name that is one, or that ends as one does or is the end of one.

    If no name with a folder has such a key, file names alone are compared. Raise UserError if several photos, or
    several names, fit equally well. uri: of the file with the names.
    """
    by_file = defaultdict(list)
    for key in keys:
        by_file[key.rsplit("/", 1)[-1]].append(key)
    fits = [(name, key, _fit(name, key)) for name in sorted(names) for key in by_file.get(_file_name(name), ())]
    if any("/" in name.replace("\\", "/") and fit for name, _, fit in fits):
        fits = [item for item in fits if item[2]]
    best_of_name, best_of_key = Counter[str](), Counter[str]()
    for name, key, fit in fits:
        best_of_name[name], best_of_key[key] = max(best_of_name[name], fit), max(best_of_key[key], fit)
    matched: dict[str, str] = {}
    for name, key, fit in fits:
        if fit < best_of_name[name] or fit < best_of_key[key]:
            continue
        if name in matched:
            raise _ambiguous(uri, f"the image {name} could be the photo {matched[name]} or {key}")
        matched[name] = key
    twice = next((key for key, count in Counter(matched.values()).items() if count > 1), None)
    if twice is not None:
        first, second, *_ = (name for name, key in matched.items() if key == twice)
        raise _ambiguous(uri, f"the images {first} and {second} could both be the photo {twice}")
    return matched


def _ambiguous(uri: str, cause: str) -> UserError:
    return UserError(f"`{KEY}`: in {uri}, {cause}. Give the whole key of each photo as its `file_name`.")


def _file_name(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _fit(name: str, key: str) -> int:
    """Return the number of components that a name and a key share if one ends with the other, else 0."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    other = key.split("/")
    shared = min(len(parts), len(other))
    return (shared + (len(parts) == len(other))) if parts[-shared:] == other[-shared:] else 0


def _choose_masks(coco: CocoFile, keys: dict[str, str]) -> dict[str, Rle]:
    """Return the mask of each matched image's main vehicle, by the photo's key. keys: of the images' file names."""
    masks: dict[str, tuple[tuple[bool, int], Rle]] = {}
    for number, annotation in enumerate(coco.annotations):
        image = coco.images[annotation["image_id"]]
        key, is_main = keys.get(image["file_name"]), annotation.get("main")
        if is_main not in (None, True, False):  # 0 and 1 equal them
            raise _no_coco(coco.uri, f"`main` of annotations[{number}] is {is_main!r}")
        is_vehicle = not coco.vehicle_categories or annotation.get("category_id") in coco.vehicle_categories
        is_candidate = is_main or (is_main is None and is_vehicle and not annotation.get("iscrowd"))
        if key is None or not is_candidate or annotation["segmentation"] == []:  # a box without a mask
            continue
        try:
            rle = segmentation_rle(annotation["segmentation"], image.get("height"), image.get("width"))
        except ValueError as error:
            raise _no_coco(coco.uri, f"annotations[{number}] of {image['file_name']}: {error}") from error
        rank = (bool(is_main), rle_area(rle))
        if key not in masks or rank > masks[key][0]:
            masks[key] = rank, rle
    if empty := [key for key, ((_, area), _) in masks.items() if not area]:
        raise _no_coco(coco.uri, f"the mask of {empty[0]} covers no pixel; are its coordinates shares of the photo?")
    return {key: rle for key, (_, rle) in masks.items()}


def _check_sizes(masks: dict[str, Rle], sizes: dict[str, tuple[int, int]], uri: str) -> None:
    """Raise UserError if a mask's shape is not that of its photo, which may have been shrunk by ingestion."""
    for key, rle in masks.items():
        (height, width), (true_height, true_width) = sizes[key], rle["size"]
        scale = max(height, width) / max(true_height, true_width)
        if max(abs(true_height * scale - height), abs(true_width * scale - width)) > max(1.0, scale):
            raise UserError(
                f"`{KEY}`: the mask of {key} in {uri} has {true_width} x {true_height} pixels, and the photo {width} x "
                f"{height}: another shape. Masks have to be of the whole upright photo, as EXIF turns it. {ADVICE}"
            )


def _read_coco(uri: str, classes: Collection[str]) -> CocoFile:
    """Read a COCO file. Raise UserError if it is none."""
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise UserError(f"`{KEY}`: there is no file {uri}. Give a COCO file, or leave `truth` out.") from error
    except (ValueError, RecursionError) as error:
        raise _no_coco(uri, str(error)) from error
    lists = content if isinstance(content, dict) else {}
    images = _entries(uri, lists, "images", ("id", "file_name"))
    annotations = _entries(uri, lists, "annotations", ("image_id", "segmentation"))
    by_id = {image["id"]: image for image in images}
    for number, image in enumerate(images):
        if not isinstance(image["file_name"], str) or not _file_name(image["file_name"]):
            raise _no_coco(uri, f"the `file_name` of images[{number}] is {image['file_name']!r}")
    if unknown := [number for number, item in enumerate(annotations) if item["image_id"] not in by_id]:
        raise _no_coco(uri, f"no image has the `image_id` of annotations[{unknown[0]}]")
    categories = _entries(uri, {"categories": [], **lists}, "categories", ("id", "name"))
    names = [name.strip().lower() for name in classes]
    vehicles = [item["id"] for item in categories if str(item["name"]).strip().lower() in names]
    if categories and not vehicles and not any(annotation.get("main") for annotation in annotations):
        found = ", ".join(str(item["name"]) for item in categories[:MAX_LISTED])
        raise UserError(
            f"`{KEY}`: no category of {uri} ({found}) is one of the detector's classes ({', '.join(classes)}), and no "
            "annotation has `main`. Name the vehicles' categories as in `mask.detector.classes`, or set `main`."
        )
    return CocoFile(uri, by_id, annotations, vehicles)


def _entries(uri: str, content: dict[str, Any], name: str, required: Collection[str]) -> list[dict[str, Any]]:
    """Return a list of the file, whose entries have the required fields. Raise UserError if it is missing."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise _no_coco(uri, f"it has no list `{name}`")
    for number, entry in enumerate(entries):
        for field in required:
            if not isinstance(entry, dict) or field not in entry:
                raise _no_coco(uri, f"{name}[{number}] has no `{field}`")
            if field.endswith("id") and not isinstance(entry[field], int | float | str):
                raise _no_coco(uri, f"`{field}` of {name}[{number}] is {entry[field]!r}")
    return entries


def _no_coco(uri: str, cause: str) -> UserError:
    return UserError(f"`{KEY}`: {uri} is not a COCO file with masks ({cause}). {ADVICE}")
