"""Changes of appearance: torchvision's, the same for a photo whatever its company."""

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
    """uint8 (8,3,64,64), some of them flat and dark."""
    rng = np.random.default_rng(0)
    found = rng.integers(20, 200, (8, 3, 64, 64))
    found[1] //= 4
    found[2, 1] = 90
    return torch.from_numpy(found.astype(np.uint8))


def draws_of(name: str, count: int, strength: float = STRENGTH) -> np.ndarray:
    return np.tile([(NAMES.index(name) + 0.5) / (len(NAMES) + 1), strength], (count, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_torchvisions_but_for_its_rounding(photos: Tensor, name: str):
    found = augmentation.change_appearance(photos.float(), draws_of(name, len(photos)))
    expected = torch.stack([LIBRARY[name](photo) for photo in photos])
    assert not torch.equal(expected, photos)
    torch.testing.assert_close(found, expected.float(), atol=2.0, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "color", "contrast", "sharpness"])
def test_a_change_that_goes_both_ways_changes_nothing_in_the_middle(photos: Tensor, name: str):
    found = augmentation.change_appearance(photos.float(), draws_of(name, len(photos), 0.5))
    torch.testing.assert_close(found, photos.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["posterize", "solarize"])
def test_a_change_of_no_strength_changes_nothing(photos: Tensor, name: str):
    assert torch.equal(augmentation.change_appearance(photos.float(), draws_of(name, len(photos), 0.0)), photos.float())


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("name", NAMES)
def test_colours_stay_in_their_range(photos: Tensor, name: str, strength: float):
    found = augmentation.change_appearance(photos.float(), draws_of(name, len(photos), strength))
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 255


@pytest.mark.parametrize("name", NAMES)
def test_a_photo_is_changed_the_same_whatever_its_company(photos: Tensor, name: str):
    whole = augmentation.change_appearance(photos.float(), draws_of(name, len(photos)))
    for i in range(len(photos)):
        assert torch.equal(augmentation.change_appearance(photos[i : i + 1].float(), draws_of(name, 1))[0], whole[i])


def test_every_change_comes_and_one_in_nine_photos_stays_as_it_is(photos: Tensor):
    draws = np.stack([(np.arange(9) + 0.5) / 9, np.full(9, STRENGTH)], 1)
    found = augmentation.change_appearance(photos[:1].expand(9, -1, -1, -1).float(), draws)
    assert len({tuple(photo.flatten().tolist()) for photo in found}) == 9
    assert torch.equal(found[8], photos[0].float())


def test_the_photos_given_are_not_changed(photos: Tensor):
    given = photos.float()
    augmentation.change_appearance(given, draws_of("solarize", len(photos)))
    assert torch.equal(given, photos.float())
