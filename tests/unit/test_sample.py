"""The generated sample: deterministic, with exact ground truth; backgrounds predict the class in train only."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.linear_model import LogisticRegression

from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo, mask_to_box
from carclass.sample.generate import (
    FIRST_ODDITY,
    ODDITIES,
    SUBSETS,
    choose_scene,
    file_name,
    photo_number,
    write_sample,
)
from carclass.sample.models import BUS, CAR, MODELS, PRETRAIN_MODELS, TRUCK

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")

TRAIN, TEST = 12, 8
SEED = 3


class Sample:
    """A small sample read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "labels.csv").open(newline="") as file:
            self.header, *rows = list(csv.reader(file))
        self.rows = [tuple(row) for row in rows]
        self.truth = json.loads((folder / "truth.json").read_text())
        self.images = {image["file_name"]: image for image in self.truth["images"]}

    def good_rows(self, subset: str) -> list[tuple[str, ...]]:
        return [row for row in self.rows if row[2] == subset and row[0] < file_name(FIRST_ODDITY)]

    def annotations(self, name: str) -> list[dict]:
        return [a for a in self.truth["annotations"] if a["image_id"] == self.images[name]["id"]]

    def main_mask(self, name: str) -> np.ndarray:
        (main,) = [a for a in self.annotations(name) if a["main"]]
        return coco_mask.decode(main["segmentation"]).astype(bool)

    def content(self, name: str) -> bytes:
        return (self.folder / "photos" / name).read_bytes()

    def odd_names(self, kind: str) -> list[str]:
        return [file_name(FIRST_ODDITY + k) for k, oddity in enumerate(ODDITIES) if oddity.kind == kind]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, seed=SEED, train_per_class=TRAIN, test_per_class=TEST)
    return Sample(folder)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_sample(tmp_path / name, seed=SEED, train_per_class=1, test_per_class=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_another_seed_gives_other_photos() -> None:
    pixels = draw_photo((SEED + 1, 0, 0, 0), MODELS[0], "city")[0]
    same = draw_photo((SEED, 0, 0, 0), MODELS[0], "city")[0]
    assert pixels.shape != same.shape or not np.array_equal(pixels, same)


@pytest.mark.slow  # 4 s
def test_adding_photos_changes_none(sample: Sample, tmp_path: Path) -> None:
    write_sample(tmp_path, seed=SEED, train_per_class=1, test_per_class=2)
    photos = sorted(path.name for path in (tmp_path / "photos").iterdir())
    assert all((tmp_path / "photos" / name).read_bytes() == sample.content(name) for name in photos)


def test_writing_again_over_the_same_sample_is_allowed(tmp_path: Path) -> None:
    write_sample(tmp_path, seed=SEED, train_per_class=1, test_per_class=1)
    before = digest(tmp_path)
    write_sample(tmp_path, seed=SEED, train_per_class=1, test_per_class=1)
    assert digest(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holiday\.jpg"):
        write_sample(tmp_path)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"train_per_class": 0}, {"test_per_class": 10**6}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        write_sample(tmp_path, **arguments)


def test_every_class_has_its_exact_number_of_good_photos(sample: Sample) -> None:
    for subset, count in zip(SUBSETS, (TRAIN, TEST), strict=True):
        assert Counter(row[1] for row in sample.good_rows(subset)) == {model.name: count for model in MODELS}


def test_labels_have_the_agreed_header_and_no_name_twice(sample: Sample) -> None:
    assert sample.header == ["img_name", "class", "subset"]
    assert len({name for name, _, _ in sample.rows}) == len(sample.rows)


def test_files_and_label_rows_are_the_good_photos_and_the_oddities(sample: Sample) -> None:
    good = len(MODELS) * (TRAIN + TEST)
    assert len(sample.rows) == good + sum(oddity.labelled for oddity in ODDITIES)
    assert len(list((sample.folder / "photos").iterdir())) == good + sum(oddity.on_disk for oddity in ODDITIES)


def test_truth_covers_every_photo_that_is_not_broken(sample: Sample) -> None:
    odd = {file_name(FIRST_ODDITY + k) for k, oddity in enumerate(ODDITIES) if not oddity.broken}
    good = {row[0] for subset in SUBSETS for row in sample.good_rows(subset)}
    assert set(sample.images) == good | odd


def test_photo_numbers_are_unique() -> None:
    numbers = [photo_number(c, s, i) for c in range(len(MODELS)) for s in SUBSETS for i in range(50)]
    assert len(set(numbers)) == len(numbers)


def test_every_photo_has_one_main_car_of_its_class(sample: Sample) -> None:
    category = {model.name: model.category_id for model in MODELS}
    for name, label, _ in sample.good_rows("train"):
        assert [a["category_id"] for a in sample.annotations(name) if a["main"]] == [category[label]]


def test_boxes_and_areas_match_the_masks(sample: Sample) -> None:
    for annotation in sample.truth["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        x1, y1, x2, y2 = mask_to_box(mask)
        assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert annotation["area"] == mask.sum()


def test_masks_have_the_size_of_the_photo(sample: Sample) -> None:
    for row in sample.good_rows("test"):
        with Image.open(io.BytesIO(sample.content(row[0]))) as image:
            assert sample.main_mask(row[0]).shape == (image.height, image.width)


def test_the_box_of_a_single_pixel_has_one_pixel() -> None:
    mask = np.zeros((5, 7), dtype=bool)
    mask[2, 3] = True
    assert mask_to_box(mask) == (3, 2, 4, 3)


def test_masks_do_not_depend_on_the_scene() -> None:
    """Pixels that change with the scene are outside the mask, except for its blended edge."""
    (city, in_city), (snow, in_snow) = (draw_photo((5, 0, 0, 1), MODELS[4], scene) for scene in ("city", "snow"))
    np.testing.assert_array_equal(in_city[0].mask, in_snow[0].mask)
    changed = (np.abs(city.astype(int) - snow.astype(int)) > 2).any(axis=2)
    assert changed[in_city[0].mask].mean() < 0.08
    assert changed[~in_city[0].mask].mean() > 0.9


def test_the_main_car_covers_a_reasonable_part_of_the_frame(sample: Sample) -> None:
    shares = []
    for row in sample.good_rows("train"):
        x1, y1, x2, y2 = mask_to_box(sample.main_mask(row[0]))
        shares.append((x2 - x1) * (y2 - y1) / sample.main_mask(row[0]).size)
    assert np.percentile(shares, 5) > 0.18
    assert np.percentile(shares, 95) < 0.62


@pytest.mark.slow
def test_a_second_vehicle_is_rare_smaller_and_apart() -> None:
    seconds = 0
    for index in range(60):
        vehicles = draw_photo((1, 2, 0, index), MODELS[index % 10], "field")[1]
        seconds += len(vehicles) - 1
        for second in vehicles[1:]:
            assert not second.main
            assert 0 < second.mask.sum() < 0.6 * vehicles[0].mask.sum()
            assert not (second.mask & vehicles[0].mask).any()
    assert 1 <= seconds <= 15


def test_train_photos_are_mostly_in_the_favourite_scene_of_their_class() -> None:
    for class_index in range(len(MODELS)):
        scenes = Counter(choose_scene((1, class_index, 0, i), class_index, "train") for i in range(300))
        assert 0.9 < scenes.most_common(1)[0][1] / 300 < 0.99


def test_no_two_classes_share_a_favourite_scene() -> None:
    favourites = {
        Counter(choose_scene((1, c, 0, i), c, "train") for i in range(30)).most_common(1)[0][0]
        for c in range(len(MODELS))
    }
    assert len(favourites) == len(MODELS)


def test_test_photos_are_in_random_scenes() -> None:
    for class_index in range(len(MODELS)):
        scenes = Counter(choose_scene((1, class_index, 1, i), class_index, "test") for i in range(400))
        assert set(scenes) == set(SCENES)
        assert max(scenes.values()) < 0.2 * 400


def test_the_background_predicts_the_class_in_train_only(sample: Sample) -> None:
    def thumbnails(subset: str) -> tuple[np.ndarray, list[str]]:
        pixels, labels = [], []
        for name, label, _ in sample.good_rows(subset):
            image = Image.open(io.BytesIO(sample.content(name)))
            background = np.where(sample.main_mask(name)[..., None], 128, np.asarray(image)).astype(np.uint8)
            pixels.append(np.asarray(Image.fromarray(background).resize((6, 6), Image.Resampling.BOX)).ravel() / 255)
            labels.append(label)
        return np.array(pixels), labels

    (pixels, labels), (test_pixels, test_labels) = thumbnails("train"), thumbnails("test")
    half = len(labels) // 2
    probe = LogisticRegression(max_iter=500).fit(pixels[:half], labels[:half])
    assert probe.score(pixels[half:], labels[half:]) > 0.7
    assert probe.score(test_pixels, test_labels) < 0.35


@pytest.mark.slow
def test_paint_does_not_predict_the_class(sample: Sample) -> None:
    def colours(subset: str) -> tuple[np.ndarray, list[str]]:
        rows = sample.good_rows(subset)
        pixels = [np.asarray(Image.open(io.BytesIO(sample.content(row[0]))))[sample.main_mask(row[0])] for row in rows]
        return np.array([np.median(p, axis=0) / 255 for p in pixels]), [row[1] for row in rows]

    probe = LogisticRegression(max_iter=500).fit(*colours("train"))
    assert probe.score(*colours("test")) < 0.3


def test_there_are_ten_classes_and_all_vehicle_categories() -> None:
    assert len({model.name for model in MODELS}) == 10
    assert {model.category_id for model in MODELS} == {CAR, BUS, TRUCK}
    assert any("/" in model.name for model in MODELS)


def test_two_silhouettes_are_shared_by_two_classes() -> None:
    counts = Counter(id(model.shape) for model in MODELS)
    assert sorted(counts.values())[-2:] == [2, 2]


def test_pretraining_models_are_other_models() -> None:
    assert len({model.name for model in PRETRAIN_MODELS}) == len(PRETRAIN_MODELS)
    assert not {model.shape for model in PRETRAIN_MODELS} & {model.shape for model in MODELS}


@pytest.mark.parametrize("model", PRETRAIN_MODELS, ids=lambda model: model.name)
def test_every_pretraining_model_can_be_drawn(model) -> None:
    pixels, vehicles = draw_photo((1, 0, 0, 0), model, "garage")
    assert pixels.dtype == np.uint8
    assert vehicles[0].mask.mean() > 0.05


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_broken_files_do_not_decode(sample: Sample, kind: str) -> None:
    (name,) = sample.odd_names(kind)
    with pytest.raises(OSError, match=r"truncated|cannot identify"):
        Image.open(io.BytesIO(sample.content(name))).load()


@pytest.mark.parametrize(
    ("kind", "form", "mode"),
    [
        ("one_pixel", "JPEG", "RGB"),
        ("cmyk", "JPEG", "CMYK"),
        ("exif_rotated", "JPEG", "RGB"),
        ("grayscale", "JPEG", "L"),
        ("png_16_bit", "PNG", "I;16"),
        ("png_transparent", "PNG", "RGBA"),
        ("unlabelled", "JPEG", "RGB"),
    ],
)
def test_unusual_files_have_their_encoding(sample: Sample, kind: str, form: str, mode: str) -> None:
    (name,) = sample.odd_names(kind)
    with Image.open(io.BytesIO(sample.content(name))) as image:
        assert (image.format, image.mode) == (form, mode)


def test_the_rotated_photo_is_upright_in_truth(sample: Sample) -> None:
    (name,) = sample.odd_names("exif_rotated")
    image = Image.open(io.BytesIO(sample.content(name)))
    truth = sample.images[name]
    assert image.getexif()[0x0112] == 6
    assert (image.height, image.width) == (truth["width"], truth["height"])


def test_the_transparent_photo_is_opaque_on_the_car_alone(sample: Sample) -> None:
    (name,) = sample.odd_names("png_transparent")
    alpha = np.asarray(Image.open(io.BytesIO(sample.content(name))))[..., 3]
    np.testing.assert_array_equal(alpha == 255, sample.main_mask(name))


@pytest.mark.parametrize("kind", ["duplicate", "conflicting_labels", "train_in_test"])
def test_copies_have_the_same_bytes(sample: Sample, kind: str) -> None:
    first, second = sample.odd_names(kind)
    assert sample.content(first) == sample.content(second)


def test_only_the_missing_file_is_missing(sample: Sample) -> None:
    (name,) = sample.odd_names("missing")
    on_disk = {path.name for path in (sample.folder / "photos").iterdir()}
    assert {row[0] for row in sample.rows} - on_disk == {name}


def test_only_the_unlabelled_photo_has_no_row(sample: Sample) -> None:
    on_disk = {path.name for path in (sample.folder / "photos").iterdir()}
    assert on_disk - {row[0] for row in sample.rows} == set(sample.odd_names("unlabelled"))
