"""Augmentation: independent of the batch, and within the ranges of the settings."""

import math

import numpy as np
import pytest
import torch

from carclass.config.schema import AugmentationSettings
from carclass.models.sample_rng import uniforms
from carclass.training.augmentation import NUM_DRAWS, affine_matrices, warp_photos

NOTHING = AugmentationSettings(flip="none", rotation=0, zoom_height=0, zoom_width=0)
IDS = np.random.default_rng(0).integers(0, 2**64, 2000, np.uint64)


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.rand((8, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def draws(count: int = 8, **fixed: float) -> np.ndarray:
    """Return draws without an effect, except the given ones: mirror_x, …, and area, ratio, x and y of a crop."""
    neutral = {"mirror_x": 0.9, "mirror_y": 0.9, "turn": 0.5, "tall": 0.5, "wide": 0.5}
    neutral |= {"area": 1.0, "ratio": 0.5, "x": 0.5, "y": 0.5} | fixed
    return np.tile(list(neutral.values()), (count, 1))


# Draws


def test_draws_of_a_photo_do_not_depend_on_its_batch():
    whole = uniforms(1, 3, IDS[:100], 5)
    shuffled = np.random.default_rng(1).permutation(100)
    parts = [uniforms(1, 3, IDS[shuffled[start : start + 7]], 5) for start in range(0, 100, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[shuffled])


def test_a_draw_does_not_depend_on_the_number_of_draws():
    np.testing.assert_array_equal(uniforms(1, 3, IDS, 5)[:, :2], uniforms(1, 3, IDS, 2))


@pytest.mark.parametrize(("seed", "epoch"), [(1, 4), (2, 3), (3, 1)])
def test_draws_differ_between_seeds_and_epochs(seed: int, epoch: int):
    one, other = uniforms(1, 3, IDS, 1)[:, 0], uniforms(seed, epoch, IDS, 1)[:, 0]
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert not (one == other).any()


@pytest.mark.parametrize("ids", [IDS, np.arange(2000, dtype=np.uint64)], ids=["hashes", "counting"])
def test_draws_are_uniform_and_independent_of_each_other(ids: np.ndarray):
    sampled = uniforms(0, 0, ids, 5)
    assert sampled.shape == (2000, 5)
    assert sampled.min() >= 0
    assert sampled.max() < 1
    counts = [np.histogram(column, 10, (0, 1))[0] for column in sampled.T]
    assert np.abs(np.array(counts) - 200).max() < 60  # 4.5 standard deviations
    assert np.abs(np.corrcoef(sampled.T) - np.eye(5)).max() < 0.1


def test_draws_are_stable_across_versions():
    # A run that is resumed after an upgrade must train on the same photos.
    assert uniforms(123, 0, np.array([7], np.uint64), 2).tolist() == [[0.5936259519546295, 0.143569810370769]]


# Warps


def test_ranges_of_zero_leave_photos_unchanged(photos: torch.Tensor):
    random = uniforms(1, 1, IDS[:8], 5)
    torch.testing.assert_close(warp_photos(photos, NOTHING, random), photos, atol=1e-5, rtol=0)


def test_augmentation_of_a_photo_does_not_depend_on_its_batch(photos: torch.Tensor):
    random = uniforms(1, 1, IDS[:8], 5)
    whole = warp_photos(photos, AugmentationSettings(), random)
    alone = torch.cat([warp_photos(photos[i : i + 1], AugmentationSettings(), random[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, whole, atol=1e-6, rtol=0)


def test_a_horizontal_flip_mirrors_left_and_right(photos: torch.Tensor):
    flip = NOTHING.model_copy(update={"flip": "horizontal"})
    torch.testing.assert_close(warp_photos(photos, flip, draws(mirror_x=0.1)), photos.flip(3), atol=1e-5, rtol=0)


def test_a_vertical_flip_mirrors_top_and_bottom(photos: torch.Tensor):
    flip = NOTHING.model_copy(update={"flip": "horizontal+vertical"})
    torch.testing.assert_close(warp_photos(photos, flip, draws(mirror_y=0.1)), photos.flip(2), atol=1e-5, rtol=0)


def test_a_horizontal_flip_never_mirrors_top_and_bottom(photos: torch.Tensor):
    flip = NOTHING.model_copy(update={"flip": "horizontal"})
    torch.testing.assert_close(warp_photos(photos, flip, draws(mirror_y=0.1)), photos, atol=1e-5, rtol=0)


def test_half_of_the_photos_are_mirrored():
    flip = NOTHING.model_copy(update={"flip": "horizontal"})
    mirrored = affine_matrices(flip, uniforms(0, 0, IDS, 5))[:, 0, 0] < 0
    assert mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_a_quarter_turn_is_a_quarter_turn(photos: torch.Tensor):
    turn = NOTHING.model_copy(update={"rotation": 0.25})
    rotated = warp_photos(photos, turn, draws(turn=1.0))
    torch.testing.assert_close(rotated, photos.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_angles_stay_within_the_range_and_fill_it():
    matrices = affine_matrices(NOTHING.model_copy(update={"rotation": 0.05}), uniforms(0, 0, IDS, 5))
    degrees = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert np.abs(degrees).max() <= 18 + 1e-9
    assert (degrees.min(), degrees.max()) == pytest.approx((-18, 18), abs=0.5)


@pytest.mark.parametrize(("setting", "row"), [("zoom_width", 0), ("zoom_height", 1)])
def test_zoom_stays_within_the_range_and_fills_it_on_its_own_axis(setting: str, row: int):
    scales = affine_matrices(NOTHING.model_copy(update={setting: 0.2}), uniforms(0, 0, IDS, 5))[:, [0, 1], [0, 1]]
    assert (scales[:, row].min(), scales[:, row].max()) == pytest.approx((0.8, 1.2), abs=0.01)
    np.testing.assert_array_equal(scales[:, 1 - row], 1)


def test_a_rotation_keeps_shapes():
    settings = AugmentationSettings(rotation=0.05, zoom_height=0, zoom_width=0)
    linear = affine_matrices(settings, uniforms(0, 0, IDS, 5))[:, :, :2]
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.tile(np.eye(2), (2000, 1, 1)), atol=1e-12)


def test_zooming_in_enlarges_the_middle():
    photo = torch.zeros((1, 1, 32, 32))
    photo[..., 12:20, 12:20] = 1
    zoom = NOTHING.model_copy(update={"zoom_height": 0.5, "zoom_width": 0.5})
    area = warp_photos(photo, zoom, draws(1, tall=0.0, wide=0.0)).sum().item()
    assert area == pytest.approx(64 * 4, rel=0.05)


def test_a_crop_is_a_part_of_the_photo(photos: torch.Tensor):
    crop = NOTHING.model_copy(update={"crop": 0.25})
    corner = warp_photos(photos, crop, draws(area=0.0, x=0.0, y=1.0), 8)
    torch.testing.assert_close(corner, photos[:, :, 8:, :8], atol=1e-5, rtol=0)


def test_crops_stay_within_the_photo_and_their_areas_and_ratios_within_their_ranges():
    matrices = affine_matrices(NOTHING.model_copy(update={"crop": 0.3}), uniforms(0, 0, IDS, NUM_DRAWS))
    width, height, x, y = matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 0, 2], matrices[:, 1, 2]
    assert (np.abs(x) + width).max() <= 1 + 1e-9
    assert (np.abs(y) + height).max() <= 1 + 1e-9
    areas, ratios = width * height, width / height
    assert (areas.min(), areas.max()) == pytest.approx((0.3, 1.0), abs=0.02)
    assert (ratios.min(), ratios.max()) == pytest.approx((3 / 4, 4 / 3), rel=0.01)
    np.testing.assert_array_equal(matrices[:, [0, 1], [1, 0]], 0)


def test_a_crop_is_taken_of_the_turned_photo(photos: torch.Tensor):
    settings = NOTHING.model_copy(update={"crop": 0.25, "rotation": 0.25})
    corner = warp_photos(photos, settings, draws(turn=1.0, area=0.0, x=0.0, y=0.0), 8)
    torch.testing.assert_close(corner, photos.rot90(1, (2, 3))[:, :, :8, :8], atol=1e-4, rtol=0)


def test_without_crops_their_draws_change_nothing():
    random = uniforms(0, 0, IDS, NUM_DRAWS)
    settings = AugmentationSettings()
    np.testing.assert_array_equal(affine_matrices(settings, random), affine_matrices(settings, random[:, :5]))


def test_photos_are_trained_at_the_size_asked_for(photos: torch.Tensor):
    assert warp_photos(photos, NOTHING, draws(), 12).shape == (8, 3, 12, 12)


def test_padding_is_a_reflection():
    photo = torch.arange(8.0).reshape(1, 1, 1, 8).expand(1, 1, 8, 8)
    zoom = NOTHING.model_copy(update={"zoom_width": 1.0})
    row = warp_photos(photo, zoom, draws(1, wide=1.0))[0, 0, 0]
    # Half of each row is outside of the photo and mirrors pixels as far inside.
    torch.testing.assert_close(row, torch.tensor([2.5, 0.5, 0.5, 2.5, 4.5, 6.5, 6.5, 4.5]), atol=1e-4, rtol=0)


def test_shape_and_dtype_are_kept(photos: torch.Tensor):
    warped = warp_photos(
        photos.to(memory_format=torch.channels_last), AugmentationSettings(), uniforms(0, 0, IDS[:8], 5)
    )
    assert (warped.shape, warped.dtype) == (photos.shape, photos.dtype)
    assert math.isfinite(warped.sum().item())
