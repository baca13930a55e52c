"""Cutouts: fill colour outside the mask, unchanged pixels inside, and crops within the photo."""

import numpy as np
import pytest

from carclass.config.schema import CutoutSettings
from carclass.masking.cutout import crop_window, cut, paint_background

FILL = (10, 20, 30)


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    """A mask over rows 5 to 14 and columns 10 to 19, with a hole."""
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    mask[8:10, 12:14] = False
    return mask


BOX = np.array([10.0, 5.0, 20.0, 15.0])


def test_pixels_outside_the_mask_are_filled_and_inside_unchanged(photo: np.ndarray, mask: np.ndarray):
    painted = paint_background(photo, mask, FILL)
    np.testing.assert_array_equal(painted[mask], photo[mask])
    np.testing.assert_array_equal(painted[~mask], np.broadcast_to(FILL, (int((~mask).sum()), 3)))


def test_the_input_photo_is_not_modified(photo: np.ndarray, mask: np.ndarray):
    photo.flags.writeable = False  # like arrays from Ray's object store
    before = photo.copy()
    cut(photo, BOX, mask, CutoutSettings(mode="crop+mask"))
    np.testing.assert_array_equal(photo, before)


def test_mode_mask_keeps_the_size(photo: np.ndarray, mask: np.ndarray):
    result = cut(photo, BOX, mask, CutoutSettings(mode="mask", fill=FILL))
    np.testing.assert_array_equal(result, paint_background(photo, mask, FILL))


def test_mode_crop_keeps_the_background_within_the_box(photo: np.ndarray, mask: np.ndarray):
    result = cut(photo, BOX, mask, CutoutSettings(mode="crop", margin=0))
    np.testing.assert_array_equal(result, photo[5:15, 10:20])


def test_mode_crop_and_mask_applies_both(photo: np.ndarray, mask: np.ndarray):
    result = cut(photo, BOX, mask, CutoutSettings(mode="crop+mask", margin=0, fill=FILL))
    np.testing.assert_array_equal(result, paint_background(photo, mask, FILL)[5:15, 10:20])


@pytest.mark.parametrize("mode", ["crop", "mask", "crop+mask"])
def test_the_result_is_contiguous_rgb(photo: np.ndarray, mask: np.ndarray, mode: str):
    result = cut(photo, BOX, mask, CutoutSettings.model_validate({"mode": mode}))
    assert (result.dtype, result.ndim, result.shape[2], result.flags.c_contiguous) == (np.uint8, 3, 3, True)


def test_the_margin_is_a_share_of_the_boxs_width_and_height():
    assert crop_window(np.array([40.0, 40, 60, 50]), (100, 100), 0.1) == (38, 39, 62, 51)


def test_the_window_includes_partly_covered_pixels():
    assert crop_window(np.array([10.7, 5.2, 20.1, 15.0]), (100, 100), 0.0) == (10, 5, 21, 15)


def test_the_window_is_clipped_to_the_photo():
    assert crop_window(np.array([-3.0, 2, 29.9, 25]), (20, 30), 0.5) == (0, 0, 30, 20)


@pytest.mark.parametrize(
    "box", [[5, 5, 5, 5], [29.9, 19.9, 29.9, 19.9], [30, 20, 31, 21], [-5, -5, -1, -1], [1e6, 1e6, 1e6, 1e6]]
)
def test_an_empty_or_outside_box_gives_at_least_one_pixel_of_the_photo(box: list[float]):
    x1, y1, x2, y2 = crop_window(np.array(box, np.float32), (20, 30), 0.05)
    assert 0 <= x1 < x2 <= 30
    assert 0 <= y1 < y2 <= 20


def test_the_window_contains_the_box_and_lies_within_the_photo():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2)
        corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [width, height]
        x1, y1, x2, y2 = crop_window(corners.ravel(), (height, width, 3), rng.uniform(0, 1))
        assert 0 <= x1 <= corners[0, 0] <= corners[1, 0] <= x2 <= width
        assert 0 <= y1 <= corners[0, 1] <= corners[1, 1] <= y2 <= height
