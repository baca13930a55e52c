"""Changes of appearance: equal to torchvision's and independent of the batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from carclass.training import augmentation

STRENGTH = 0.8
FACTOR = 1 + 0.99 * 0.6
LIBRARY: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": lambda photo: functional.adjust_brightness(photo, FACTOR),
    "color": lambda photo: functional.adjust_saturation(photo, FACTOR),
    "contrast": lambda photo: functional.adjust_contrast(photo, FACTOR),
    "sharpness": lambda photo: functional.adjust_sharpness(photo, FACTOR),
    "posterize": lambda photo: functional.posterize(photo, 3),  # 8 bits less 0.8 of 6
    "solarize": lambda photo: functional.solarize(photo, 52),  # from a fifth of 256 on
    "autocontrast": functional.autocontrast,
    "equalize": functional.equalize,
}
NAMES = [change.__name__ for change in augmentation.OPERATIONS]


@pytest.fixture
def photos() -> Tensor:
    """Return photos, uint8 (8,3,64,64), some with little contrast."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 200, (8, 3, 64, 64))
    pixels[1] //= 4
    pixels[2, 1] = 90
    return torch.from_numpy(pixels.astype(np.uint8))


def draws_of(name: str, count: int, strength: float = STRENGTH) -> np.ndarray:
    return np.tile([(NAMES.index(name) + 0.5) / (len(NAMES) + 1), strength], (count, 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_equals_torchvisions_up_to_rounding(photos: Tensor, name: str):
    changed = augmentation.change_appearance(photos.float(), draws_of(name, len(photos)))
    expected = torch.stack([LIBRARY[name](photo) for photo in photos])
    assert not torch.equal(expected, photos)
    torch.testing.assert_close(changed, expected.float(), atol=2.0, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness"])
def test_a_strength_of_a_half_leaves_photos_unchanged(photos: Tensor, name: str):
    changed = augmentation.change_appearance(photos.float(), draws_of(name, len(photos), 0.5))
    torch.testing.assert_close(changed, photos.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["posterize", "solarize"])
def test_a_strength_of_zero_leaves_photos_unchanged(photos: Tensor, name: str):
    assert torch.equal(augmentation.change_appearance(photos.float(), draws_of(name, len(photos), 0.0)), photos.float())


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", NAMES)
def test_values_stay_in_their_range(photos: Tensor, name: str, strength: float):
    changed = augmentation.change_appearance(photos.float(), draws_of(name, len(photos), strength))
    assert changed.isfinite().all()
    assert changed.min() >= 0
    assert changed.max() <= 255


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_does_not_depend_on_the_batch(photos: Tensor, name: str):
    whole = augmentation.change_appearance(photos.float(), draws_of(name, len(photos)))
    for i in range(len(photos)):
        assert torch.equal(augmentation.change_appearance(photos[i : i + 1].float(), draws_of(name, 1))[0], whole[i])


def test_every_operation_occurs_and_one_in_nine_photos_is_unchanged(photos: Tensor):
    draws = np.stack([(np.arange(9) + 0.5) / 9, np.full(9, STRENGTH)], 1)
    changed = augmentation.change_appearance(photos[:1].expand(9, -1, -1, -1).float(), draws)
    assert len({tuple(photo.flatten().tolist()) for photo in changed}) == 9
    assert torch.equal(changed[8], photos[0].float())


def test_the_input_is_not_modified(photos: Tensor):
    original = photos.float()
    augmentation.change_appearance(original, draws_of("solarize", len(photos)))
    assert torch.equal(original, photos.float())
