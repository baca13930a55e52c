"""True masks of COCO files: their encodings, the photos that they belong to, and checks before any photo is masked."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from carclass.config.schema import DetectorSettings, MaskSettings
from carclass.data import dataset, publishing
from carclass.errors import UserError
from carclass.masking import quality
from carclass.masking.mask import mask_dataset
from carclass.masking.rle import decode_rle, encode_mask, segmentation_rle
from carclass.masking.truth import load_truth, match_names
from tests.helpers import inventories

HEIGHT, WIDTH = 20, 30
CLASSES = ("car", "truck")
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[4:12, 6:24] = True
SMALL = np.zeros((HEIGHT, WIDTH), bool)
SMALL[14:18, 2:8] = True
RECTANGLE = [6.0, 4.0, 24.0, 4.0, 24.0, 12.0, 6.0, 12.0]
"""Polygon of MASK."""


def rle(mask: np.ndarray) -> dict[str, Any]:
    return {"size": [*mask.shape], "counts": encode_mask(mask)}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    return {"size": [*mask.shape], "counts": np.diff([0, *np.flatnonzero(np.diff(flat))]).tolist()}


def image(name: str, number: int = 1, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": height, "width": width}


def annotation(mask: np.ndarray, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"image_id": number, "segmentation": rle(mask), **fields}


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., dataset.Dataset]:
    """Return a function that publishes a dataset of photos of these keys, or a masked one where masks are given."""

    def publish(
        keys: Sequence[str], masks: Sequence[np.ndarray | None] | None = None, **fields: Any
    ) -> dataset.Dataset:
        name, schema = ("v1", dataset.ROW) if masks is None else ("v2", dataset.MASKED_ROW)
        photos = {"image_id": "00", "label": "A", "split": "test", "height": HEIGHT, "width": WIDTH, "image": b""}
        rows = [{"key": key, **photos, **fields} for key in keys]
        for row, mask in zip(rows, masks or [], strict=False):
            row |= {"source_height": HEIGHT, "source_width": WIDTH, "mask": None if mask is None else encode_mask(mask)}
        settings = {"dataset": name, "detector": {"classes": dict(enumerate(CLASSES))}}
        uri, facts = dataset.dataset_uri(str(tmp_path), name), {"kind": "photos" if masks is None else "masked"}
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, schema), settings)
        complete = inventories.complete_dataset(uri, keys, settings=settings, classes=["A"], facts=facts)
        return publishing.publish_manifest(complete)

    return publish


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that reads the masks of a dataset's photos in a COCO file of this content."""

    def load(photos: dataset.Dataset, images: list[Any], annotations: list[Any], **more: Any) -> dict[str, np.ndarray]:
        (tmp_path / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, **more}))
        masks = load_truth(f"{tmp_path}/truth.json", photos, CLASSES)
        return {key: decode_rle(one) for key, one in masks.items()}

    return load


# Encodings


@pytest.mark.parametrize(
    "segmentation",
    [rle(MASK), run_lengths(MASK), [RECTANGLE], RECTANGLE, [RECTANGLE[:6], [6, 4, 24, 12, 6, 12]]],
    ids=["compressed", "uncompressed", "polygon", "flat polygon", "two polygons"],
)
def test_every_encoding_of_a_mask_is_read(segmentation: Any):
    found = decode_rle(segmentation_rle(segmentation, HEIGHT, WIDTH))
    assert (found != MASK).mean() < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_survive_their_encoding(seed: int):
    mask = np.random.default_rng(seed).random((seed * 7 + 1, 40 - seed)) > 0.2 * seed
    np.testing.assert_array_equal(decode_rle(segmentation_rle(rle(mask), None, None)), mask)


@pytest.mark.parametrize(
    ("segmentation", "cause"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": rle(MASK)["counts"][:3]}, "don't add up to 20 x 30 pixels"),
        ({"size": [WIDTH, WIDTH], "counts": rle(MASK)["counts"]}, "don't add up to 30 x 30 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 7]}, "don't add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, -100]}, "don't add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "ö"}, "have the character"),
        ({"size": [HEIGHT, WIDTH], "counts": "P"}, "are cut"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "whole pixels up to 65536"),
        ({"size": [HEIGHT, WIDTH]}, "neither text nor a list"),
        ({"counts": "0"}, "no `size`"),
        ("0", "neither a list of polygons nor an RLE"),
        ([[1, 2, 3, 4]], "three points or more"),
        ([[1, 2, 3, 4, 5, None]], "three points or more"),
        ([[0, 0, 9, 0, 9, 1e9]], "outside of its image of 30 x 20 pixels"),
    ],
)
def test_a_damaged_mask_is_an_error_with_the_cause(segmentation: Any, cause: str):
    with pytest.raises(ValueError, match=cause):
        segmentation_rle(segmentation, HEIGHT, WIDTH)


def test_polygons_need_the_size_of_their_image():
    with pytest.raises(ValueError, match="no `height` and `width`"):
        segmentation_rle([RECTANGLE], None, WIDTH)


# The main vehicle


def test_without_main_the_largest_mask_is_the_true_one(publish, load):
    masks = load(publish(["1.jpg"]), [image("1.jpg")], [annotation(SMALL), annotation(MASK), annotation(SMALL)])
    np.testing.assert_array_equal(masks["1.jpg"], MASK)


@pytest.mark.parametrize("main", [True, 1])
def test_the_mask_with_main_is_preferred_to_a_larger_one(publish, load, main: Any):
    masks = load(publish(["1.jpg"]), [image("1.jpg")], [annotation(SMALL, main=main), annotation(MASK, main=False)])
    np.testing.assert_array_equal(masks["1.jpg"], SMALL)


@pytest.mark.parametrize("names", [["bicycle", "airplane"], ["person"]])
def test_a_file_without_a_category_of_the_detectors_classes_is_refused(
    publish: Callable[..., dataset.Dataset], load: Callable[..., dict[str, np.ndarray]], names: list[str]
):
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    with pytest.raises(UserError, match=rf"no category .*{names[0]}.* is one of the detector's classes \(car, truck\)"):
        load(publish(["1.jpg"]), [image("1.jpg")], [annotation(MASK, category_id=0)], categories=categories)


def test_categories_do_not_matter_where_main_vehicles_are_marked(
    publish: Callable[..., dataset.Dataset], load: Callable[..., dict[str, np.ndarray]]
):
    marked = [annotation(MASK, category_id=0, main=True)]
    masks = load(publish(["1.jpg"]), [image("1.jpg")], marked, categories=[{"id": 0, "name": "vehicle"}])
    assert list(masks) == ["1.jpg"]


def test_other_classes_than_the_detectors_are_no_vehicles(publish, load):
    categories = [{"id": 1, "name": "Person"}, {"id": 3, "name": "Car"}]
    annotations = [annotation(MASK, category_id=1), annotation(MASK, category_id=[]), annotation(SMALL, category_id=3)]
    masks = load(publish(["1.jpg"]), [image("1.jpg")], annotations, categories=categories)
    np.testing.assert_array_equal(masks["1.jpg"], SMALL)


def test_a_crowd_is_no_vehicle(publish, load):
    masks = load(publish(["1.jpg"]), [image("1.jpg")], [annotation(MASK, iscrowd=1), annotation(SMALL, iscrowd=0)])
    np.testing.assert_array_equal(masks["1.jpg"], SMALL)


# Photos and names


@pytest.mark.parametrize(
    ("names", "keys", "expected"),
    [
        (["1.jpg"], ["1.jpg", "2.jpg"], {"1.jpg": "1.jpg"}),
        (["1.jpg"], ["a/1.jpg"], {"1.jpg": "a/1.jpg"}),
        (["train/a/1.jpg"], ["a/1.jpg", "b/1.jpg"], {"train/a/1.jpg": "a/1.jpg"}),
        (["a\\1.jpg"], ["a/1.jpg", "b/1.jpg"], {"a\\1.jpg": "a/1.jpg"}),
        (["./1.jpg"], ["1.jpg"], {"./1.jpg": "1.jpg"}),
        (["/data/a/1.jpg"], ["a/1.jpg", "1.jpg"], {"/data/a/1.jpg": "a/1.jpg"}),
        (["1.jpg"], ["1.jpg", "a/1.jpg"], {"1.jpg": "1.jpg"}),
        (["val2017/1.jpg"], ["photos/1.jpg"], {"val2017/1.jpg": "photos/1.jpg"}),
        (["a/1.jpg", "a/2.jpg"], ["a/1.jpg", "b/2.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg"], {"a/1.jpg": "a/1.jpg"}),
        (["a/1.jpg", "b/1.jpg"], ["b/1.jpg", "a/1.jpg"], {"a/1.jpg": "a/1.jpg", "b/1.jpg": "b/1.jpg"}),
        (["3.jpg"], ["1.jpg"], {}),
    ],
)
def test_images_are_matched_by_key_and_then_by_file_name(names: list[str], keys: list[str], expected: dict[str, str]):
    assert match_names(names, keys, "truth.json") == expected


@pytest.mark.parametrize(
    ("names", "keys", "cause"),
    [
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"], "the image 1.jpg could be the photo a/1.jpg or b/1.jpg"),
        (["x/1.jpg"], ["a/1.jpg", "b/1.jpg"], "the image x/1.jpg could be the photo a/1.jpg or b/1.jpg"),
        (["x/1.jpg", "y/1.jpg"], ["1.jpg"], "the images x/1.jpg and y/1.jpg could both be the photo 1.jpg"),
    ],
)
def test_an_ambiguous_name_is_an_error(names: list[str], keys: list[str], cause: str):
    with pytest.raises(UserError, match=rf"`mask.truth`: in truth.json, {cause}. Give the whole key"):
        match_names(names, keys, "truth.json")


def test_a_file_of_other_photos_is_an_error_with_names_of_both(publish, load):
    with pytest.raises(UserError, match=r"none of the photos of dataset `v1`, whose first key is a/1.jpg; .* is 9.jpg"):
        load(publish(["a/1.jpg"]), [image("9.jpg")], [annotation(MASK)])


@pytest.mark.parametrize("annotations", [[], [{"image_id": 1, "segmentation": []}]], ids=["none", "boxes only"])
def test_a_file_without_masks_is_an_error(publish, load, annotations: list[Any]):
    with pytest.raises(UserError, match=r"no mask for any of the photos of dataset `v1`"):
        load(publish(["1.jpg"]), [image("1.jpg")], annotations)


# Damaged files


@pytest.mark.parametrize(
    ("images", "annotations", "cause"),
    [
        ([{"id": 1}], [], r"images\[0\] has no `file_name`"),
        ([{"id": [], "file_name": "1.jpg"}], [], r"`id` of images\[0\] is \[\]"),
        ([image("1.jpg"), {"id": 2, "file_name": 7}], [], r"`file_name` of images\[1\] is 7"),
        ([image("1.jpg")], [annotation(MASK, main="no")], r"`main` of annotations\[0\] is 'no'"),
        ([image("1.jpg")], [{"image_id": 1}], r"annotations\[0\] has no `segmentation`"),
        ([image("1.jpg")], [annotation(MASK, 2)], r"no image has the `image_id` of annotations\[0\]"),
        ([image("1.jpg")], [{"image_id": 1, "segmentation": [[1]]}], r"annotations\[0\] of 1.jpg: a polygon"),
        ([image("1.jpg")], [{"image_id": 1, "segmentation": [[0, 0, 0.1, 0, 0.1, 0.1]]}], "covers no pixel"),
    ],
)
def test_the_first_wrong_entry_is_named(publish, load, images: list[Any], annotations: list[Any], cause: str):
    with pytest.raises(UserError, match=rf"`mask.truth`: .*truth.json is not a COCO file with masks \(.*{cause}"):
        load(publish(["1.jpg"]), images, annotations)


# Sizes


def test_a_mask_of_another_shape_is_an_error(publish, load):
    with pytest.raises(UserError, match=r"the mask of 1.jpg in .* has 20 x 30 pixels, and the photo 30 x 20"):
        load(publish(["1.jpg"]), [image("1.jpg")], [annotation(MASK.T)])


@pytest.mark.parametrize("scale", [3, 1])
def test_masks_of_photos_that_were_shrunk_are_compared_at_their_size(publish, tmp_path: Path, scale: int):
    masked = publish(["a/1.jpg", "a/2.jpg"], [MASK, None])
    large = np.kron(MASK, np.ones((scale, scale), bool))
    content = {"images": [image("1.jpg"), image("2.jpg", 2)], "annotations": [annotation(large), annotation(large, 2)]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert quality.ious(masked, f"{tmp_path}/truth.json") == {"a/1.jpg": 1.0, "a/2.jpg": 0.0}


# Before masking


def write_truth(folder: Path, name: str) -> str:
    (folder / "truth.json").write_text(json.dumps({"images": [image(name)], "annotations": [annotation(MASK)]}))
    return f"{folder}/truth.json"


SAMPLE = DetectorSettings(model="sample", weights="sample", short_side=96)


def test_the_file_is_checked_before_masking_begins(publish, tmp_path: Path):
    publish(["1.jpg"])
    settings = MaskSettings(detector=SAMPLE, truth=write_truth(tmp_path, "2.jpg"))
    with pytest.raises(UserError, match=r"`mask.truth`: .* none of the photos of dataset `v1`"):
        mask_dataset(str(tmp_path), settings)
    assert not (tmp_path / "datasets" / "v2").exists()


@pytest.mark.parametrize(("split", "warned"), [("test", False), ("train", True)])
def test_true_masks_of_no_test_photo_are_a_warning(publish, tmp_path: Path, caplog, split: str, warned: bool):
    source = publish(["1.jpg"], split=split)
    quality.check_truth(str(tmp_path), MaskSettings(detector=SAMPLE, truth=write_truth(tmp_path, "1.jpg")), source)
    assert ("has a mask of no test photo" in caplog.text) is warned


def test_without_true_masks_of_test_photos_there_is_no_mean_iou(publish, tmp_path: Path):
    masked = publish(["1.jpg"], [MASK], split="train")
    settings = MaskSettings(detector=SAMPLE, truth=write_truth(tmp_path, "1.jpg"))
    assert quality.mean_test_iou(str(tmp_path), masked, settings) is None
