"""Selection of one vehicle among several, quality measures of its mask, and exclusion by them."""

import numpy as np
import pytest
import torch

from carclass.config.schema import DetectorSettings, ExcludeSettings, MaskSettings
from carclass.data.dataset import Dataset
from carclass.errors import UserError
from carclass.masking import selection
from carclass.masking.mask import _identity
from carclass.masking.paste import touches_border
from carclass.masking.selection import SelectionRule, select_vehicle, stability
from carclass.masking.writer import exclusion_reasons
from carclass.prediction.detector_weights import mask_settings
from carclass.runs.preprocessing_record import Preprocessing

SIZE = (100, 200)  # height, width


def boxes(*corners: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(corners, dtype=torch.float32)


def full_masks(count: int, share: float = 1.0) -> torch.Tensor:
    """Return masks that cover a share of their boxes."""
    masks = torch.zeros(count, 10, 10)
    masks[:, : round(10 * share)] = 1
    return masks


CORNER, MIDDLE = (0.0, 0, 40, 40), (90.0, 40, 110, 60)


def test_no_detections_give_no_selection():
    assert select_vehicle(torch.zeros(0, 4), torch.zeros(0), None, SIZE, "largest") is None


@pytest.mark.parametrize("rule", ["largest", "central", "highest_score"])
def test_an_empty_mask_is_no_vehicle(rule: SelectionRule):
    assert select_vehicle(boxes(MIDDLE), torch.tensor([0.9]), full_masks(1, 0), SIZE, rule) is None


@pytest.mark.parametrize("rule", ["largest", "central", "highest_score"])
def test_a_vehicle_is_preferred_to_an_empty_mask_around_it(rule: SelectionRule):
    masks = torch.cat([full_masks(1), full_masks(2, 0)])
    corners = boxes((88, 38, 110, 60), MIDDLE, (88, 38, 111, 61))
    selected = select_vehicle(corners, torch.tensor([0.6, 0.7, 0.9]), masks, SIZE, rule)
    assert selected is not None
    assert (selected.best, selected.num_vehicles) == (0, 1)


def test_a_box_without_area_is_no_vehicle():
    assert select_vehicle(boxes((5, 5, 5, 40)), torch.tensor([0.9]), None, SIZE, "highest_score") is None


@pytest.mark.parametrize(("rule", "expected"), [("largest", 0), ("central", 1), ("highest_score", 2)])
def test_each_rule_selects_its_vehicle(rule: str, expected: int):
    corners = boxes(CORNER, MIDDLE, (150, 0, 170, 20))
    selected = select_vehicle(corners, torch.tensor([0.6, 0.7, 0.9]), None, SIZE, rule)  # type: ignore[arg-type]
    assert selected is not None
    assert selected.best == expected


def test_the_area_is_that_of_the_mask_not_of_the_box():
    masks = torch.cat([full_masks(1, 0.2), full_masks(1)])
    selected = select_vehicle(
        boxes((0, 0, 40, 40), (100, 50, 130, 80)), torch.tensor([0.9, 0.9]), masks, SIZE, "largest"
    )
    assert selected is not None
    assert selected.best == 1


def test_of_two_similarly_large_vehicles_the_more_central_is_selected():
    selected = select_vehicle(boxes((0, 0, 42, 40), (80, 30, 120, 70)), torch.tensor([0.9, 0.6]), None, SIZE, "largest")
    assert selected is not None
    assert selected.best == 1


def test_a_clearly_larger_vehicle_is_preferred_to_a_central_one():
    selected = select_vehicle(boxes((0, 0, 50, 40), (80, 30, 120, 70)), torch.tensor([0.6, 0.9]), None, SIZE, "largest")
    assert selected is not None
    assert selected.best == 0


def test_overlapping_boxes_are_one_vehicle_with_the_class_of_the_highest_score():
    selected = select_vehicle(boxes((0, 0, 100, 80), (2, 0, 100, 80)), torch.tensor([0.6, 0.8]), None, SIZE, "largest")
    assert selected is not None
    assert (selected.best, selected.num_vehicles, selected.several_vehicles) == (1, 1, False)


@pytest.mark.parametrize(("width", "several"), [(24, True), (16, False)])
def test_several_vehicles_is_set_if_another_is_half_as_large(width: int, several: bool):
    corners = boxes((0, 0, 40, 40), (100, 0, 100 + width, 40))
    selected = select_vehicle(corners, torch.tensor([0.9, 0.9]), full_masks(2), SIZE, "largest")
    assert selected is not None
    assert (selected.num_vehicles, selected.several_vehicles) == (2, several)


def test_forty_vehicles_are_counted():
    corners = torch.tensor([[i % 8 * 25.0, i // 8 * 20.0, i % 8 * 25.0 + 20, i // 8 * 20.0 + 15] for i in range(40)])
    selected = select_vehicle(corners, torch.linspace(0.5, 0.9, 40), full_masks(40), SIZE, "largest")
    assert selected is not None
    assert (selected.num_vehicles, selected.several_vehicles) == (40, True)


def test_a_binary_mask_is_stable_and_a_soft_one_is_not():
    soft = torch.linspace(0, 1, 100)
    assert stability((soft > 0.5).float()) == 1
    assert stability(soft) == pytest.approx(0.27 / 0.73, abs=0.02)


def test_an_empty_mask_has_stability_zero():
    assert stability(torch.zeros(28, 28)) == 0


@pytest.mark.parametrize(
    ("row", "column", "touching"), [(0, 5, True), (9, 5, True), (5, 0, True), (5, 9, True), (5, 5, False)]
)
def test_a_mask_touches_the_border_if_it_reaches_the_edge(row: int, column: int, touching: bool):
    mask = np.zeros((10, 10), bool)
    mask[row, column] = True
    assert touches_border(mask) is touching


@pytest.mark.parametrize(("version", "recorded"), [(1, None), (2, 2)])
def test_the_version_of_the_selection_is_recorded_with_a_dataset_unless_it_is_the_first(
    monkeypatch: pytest.MonkeyPatch, version: int, recorded: int | None
):
    monkeypatch.setattr(selection, "VERSION", version)
    settings = MaskSettings(detector=DetectorSettings(model="sample", weights="sample"))
    assert _identity(settings, Dataset("v1", {"settings": {}})).get("choice_version") == recorded


def test_photos_masked_with_another_version_of_the_selection_are_not_predicted():
    masked = {"choice": "largest", "choice_version": 2}
    other = Preprocessing({}, masked, None, None, image_size=96, mean=[], std=[], classes=[])
    with pytest.raises(UserError, match=r"masked with version 2 of `mask.choice`, and this version of carclass has 1"):
        mask_settings(other, "root")


# Exclusion by `mask.exclude`

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
    ("changes", "reasons"),
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
def test_exclusion_reasons_of_each_setting(changes: dict, reasons: list[str]):
    assert exclusion_reasons({**GOOD, **changes}, STRICT) == reasons
    assert exclusion_reasons({**GOOD, **changes}, ExcludeSettings()) == []
