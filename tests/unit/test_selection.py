"""The rule by which one vehicle of several is chosen, and the measures of its mask."""

import numpy as np
import pytest
import torch

from carclass.config.schema import ExcludeSettings
from carclass.masking.selection import select_vehicle, stability, touches_border
from carclass.masking.writer import exclusion_reasons

SIZE = (100, 200)  # height, width


def boxes(*given: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(given, dtype=torch.float32)


def full_masks(count: int, share: float = 1.0) -> torch.Tensor:
    """Masks that cover a share of their boxes."""
    masks = torch.zeros(count, 1, 10, 10)
    masks[:, :, : round(10 * share)] = 1
    return masks


CORNER, MIDDLE = (0.0, 0, 40, 40), (90.0, 40, 110, 60)


def test_no_detection_is_no_choice():
    assert select_vehicle(torch.zeros(0, 4), torch.zeros(0), None, SIZE, "largest") is None


@pytest.mark.parametrize(("rule", "expected"), [("largest", 0), ("central", 1), ("surest", 2)])
def test_each_rule_takes_its_own(rule: str, expected: int):
    found = boxes(CORNER, MIDDLE, (150, 0, 170, 20))
    chosen = select_vehicle(found, torch.tensor([0.6, 0.7, 0.9]), None, SIZE, rule)  # type: ignore[arg-type]
    assert chosen is not None
    assert chosen.position == expected


def test_the_area_is_the_masks_and_not_the_boxs():
    masks = torch.cat([full_masks(1, 0.2), full_masks(1)])
    chosen = select_vehicle(boxes((0, 0, 40, 40), (100, 50, 130, 80)), torch.tensor([0.9, 0.9]), masks, SIZE, "largest")
    assert chosen is not None
    assert chosen.position == 1


def test_of_two_nearly_as_large_the_more_central_is_taken():
    chosen = select_vehicle(boxes((0, 0, 42, 40), (80, 30, 120, 70)), torch.tensor([0.9, 0.6]), None, SIZE, "largest")
    assert chosen is not None
    assert chosen.position == 1


def test_clearly_larger_wins_over_central():
    chosen = select_vehicle(boxes((0, 0, 50, 40), (80, 30, 120, 70)), torch.tensor([0.6, 0.9]), None, SIZE, "largest")
    assert chosen is not None
    assert chosen.position == 0


def test_a_vehicle_found_twice_is_one_vehicle_under_its_surest_name():
    chosen = select_vehicle(boxes((0, 0, 100, 80), (2, 0, 100, 80)), torch.tensor([0.6, 0.8]), None, SIZE, "largest")
    assert chosen is not None
    assert (chosen.position, chosen.num_vehicles, chosen.several) == (1, 1, False)


@pytest.mark.parametrize(("width", "several"), [(24, True), (16, False)])
def test_several_vehicles_are_said_when_another_is_half_as_large(width: int, several: bool):
    found = boxes((0, 0, 40, 40), (100, 0, 100 + width, 40))
    chosen = select_vehicle(found, torch.tensor([0.9, 0.9]), full_masks(2), SIZE, "largest")
    assert chosen is not None
    assert (chosen.num_vehicles, chosen.several) == (2, several)


def test_forty_vehicles_are_counted():
    found = torch.tensor([[i % 8 * 25.0, i // 8 * 20.0, i % 8 * 25.0 + 20, i // 8 * 20.0 + 15] for i in range(40)])
    chosen = select_vehicle(found, torch.linspace(0.5, 0.9, 40), full_masks(40), SIZE, "largest")
    assert chosen is not None
    assert (chosen.num_vehicles, chosen.several) == (40, True)


def test_a_mask_without_doubt_is_stable_and_a_vague_one_is_not():
    vague = torch.linspace(0, 1, 100)
    assert stability((vague > 0.5).float()) == 1
    assert stability(vague) == pytest.approx(0.27 / 0.73, abs=0.02)


def test_an_empty_mask_has_no_stability():
    assert stability(torch.zeros(28, 28)) == 0


@pytest.mark.parametrize(
    ("row", "column", "touching"), [(0, 5, True), (9, 5, True), (5, 0, True), (5, 9, True), (5, 5, False)]
)
def test_a_mask_touches_the_border_where_it_reaches_the_edge(row: int, column: int, touching: bool):
    mask = np.zeros((10, 10), bool)
    mask[row, column] = True
    assert touches_border(mask) is touching


# What a user excludes

GOOD = {
    "outcome": "vehicle",
    "num_vehicles": 1,
    "several_vehicles": False,
    "touches_border": False,
    "area_fraction": 0.4,
    "stability": 0.9,
}
STRICT = ExcludeSettings(
    no_vehicle=True, several_vehicles=True, touches_border=True, min_area_fraction=0.1, min_stability=0.8
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"outcome": "no_vehicle"}, ["no vehicle"]),
        ({"several_vehicles": True, "num_vehicles": 3}, ["one of 3 vehicles"]),
        ({"touches_border": True}, ["touches the border"]),
        ({"area_fraction": 0.05}, ["covers 0.050 of the photo"]),
        ({"stability": 0.5, "touches_border": True}, ["touches the border", "mask stability 0.50"]),
        ({"stability": None}, []),
    ],
)
def test_a_measure_excludes_what_it_says(change: dict, words: list[str]):
    assert exclusion_reasons({**GOOD, **change}, STRICT) == words
    assert exclusion_reasons({**GOOD, **change}, ExcludeSettings()) == []
