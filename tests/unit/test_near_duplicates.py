"""Near-duplicates among drawn cars: copies are found, other photos of the same model are not."""

import numpy as np
import pytest
from PIL import Image

from carclass.audit.findings import group_photos
from carclass.audit.near_duplicates import (
    MIN_MATCH,
    Neighbours,
    Pair,
    candidate_pairs,
    find_near_duplicates,
    find_neighbours,
    match_thumbnails,
)
from carclass.audit.photo_measures import measure_photo, thumbnail
from carclass.data import photo
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS


@pytest.fixture(scope="module")
def cars() -> list[np.ndarray]:
    """Return eight photos of one model in one scene: uint8 (H,W,3)."""
    return [draw_photo((7, i), MODELS[0], "city")[0] for i in range(8)]


def match(first: np.ndarray, second: np.ndarray) -> float:
    return float(match_thumbnails(thumbnail(first)[None], thumbnail(second)[None])[0])


def crop(pixels: np.ndarray, share: float) -> np.ndarray:
    """Return the right lower part of a photo, whose sides are a share of the photo's."""
    height, width = (round(side * (1 - share)) for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[height:, width:])


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: photo.decode_stored(photo.encode(pixels, quality=60)),
        lambda pixels: np.asarray(Image.fromarray(pixels).resize((150, 110))),
        lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
        lambda pixels: crop(pixels, 0.85),
        lambda pixels: np.ascontiguousarray(crop(pixels, 0.85)[:, ::-1]),
    ],
    ids=["re-encoded", "resized", "mirrored", "cropped", "cropped and mirrored"],
)
def test_a_copy_matches(cars: list[np.ndarray], change):
    assert min(match(car, change(car)) for car in cars) >= MIN_MATCH


def test_another_photo_of_the_model_in_the_same_scene_does_not_match(cars: list[np.ndarray]):
    assert max(match(cars[0], other) for other in cars[1:]) < MIN_MATCH


def test_photos_without_contrast_match_nothing():
    grey = np.full((1, 64, 64), 128, np.uint8)
    assert match_thumbnails(grey, grey)[0] == 0


def test_neighbours_are_the_photos_with_the_smallest_angle():
    features = np.array([[1, 0], [0, 1], [3, 0.1], [0.2, 1]])
    assert find_neighbours(features).photos[:, 0].tolist() == [2, 3, 0, 1]


def test_a_pair_is_a_candidate_once():
    neighbours = Neighbours(np.array([[1], [0], [0]]), np.array([[0.9], [0.9], [0.1]]))
    assert candidate_pairs(neighbours).tolist() == [[0, 1]]


def test_pairs_are_found_among_photos_with_similar_features(cars: list[np.ndarray]):
    thumbnails = np.stack([thumbnail(each) for each in [*cars[:3], crop(cars[1], 0.9)]])
    pairs = find_near_duplicates(find_neighbours(np.ones((4, 2))), thumbnails)
    assert [(pair.first, pair.second) for pair in pairs] == [(1, 3)]


def test_photos_that_a_chain_of_pairs_connects_are_a_group():
    groups = group_photos([Pair(0, 2, 1.0), Pair(2, 3, 1.0)], 5).tolist()
    assert groups == [groups[0], groups[1], groups[0], groups[0], groups[4]]
    assert len(set(groups)) == 3


def test_a_blurred_photo_is_less_sharp_and_a_dark_one_less_bright(cars: list[np.ndarray]):
    blurred = np.asarray(Image.fromarray(cars[0]).resize((24, 18)).resize(cars[0].shape[1::-1]))
    dark = (cars[0] // 8).astype(np.uint8)
    assert measure_photo(blurred).sharpness < measure_photo(cars[0]).sharpness / 4
    assert measure_photo(dark).brightness < measure_photo(cars[0]).brightness / 4
