"""Drawn car models: the sample's classes, and others to pretrain a small backbone on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from carclass.sample.shapes import BOX_TRUCK, BUS_BODY, COUPE, HATCH, PICKUP, SEDAN, SHAPES, SUV, VAN, Shape

CAR, BUS, TRUCK = 2, 5, 7
"""Contiguous, zero-based COCO category ids of vehicles, as detectors use them."""

CATEGORY_NAMES = {CAR: "car", BUS: "bus", TRUCK: "truck"}

FrontLamp = Literal["round", "slim", "square", "tall"]
RearLamp = Literal["round", "slim", "block", "strip"]
Grille = Literal["none", "dark", "chrome"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CarModel:
    """A class of the sample: a shape, and details that distinguish it from other classes of the same shape."""

    name: str
    category_id: int
    shape: Shape
    panes: tuple[tuple[float, float], ...]
    """Windows from the front: start and end as fractions of the glass's length."""
    rim: float
    """Radius of the rim as a fraction of the tyre's."""
    spokes: int
    """Number of spokes; 0 is a steel disc with a hub cap."""
    dark_rim: bool = False
    front: FrontLamp = "square"
    rear: RearLamp = "block"
    grille: Grille = "none"
    cladding: bool = False
    """Dark plastic around the wheels and along the sill."""
    rails: bool = False
    """Bars along the roof."""
    spoiler: bool = False
    """A wing on the tail."""


_FOUR_DOOR = ((0.03, 0.48), (0.53, 0.97))
_SIX_LIGHT = ((0.03, 0.42), (0.46, 0.76), (0.82, 1.0))

MODELS: tuple[CarModel, ...] = (
    CarModel(
        name="Aster Corva Sedan 2012",
        category_id=CAR,
        shape=SEDAN,
        panes=_FOUR_DOOR,
        rim=0.56,
        spokes=0,
        front="round",
        rear="block",
    ),
    CarModel(
        name="Aster Corva Sedan 2016",
        category_id=CAR,
        shape=SEDAN,
        panes=_SIX_LIGHT,
        rim=0.78,
        spokes=5,
        dark_rim=True,
        front="slim",
        rear="slim",
        grille="dark",
    ),
    CarModel(
        name="Nimbo Pika Hatchback 2014",
        category_id=CAR,
        shape=HATCH,
        panes=((0.04, 0.58), (0.64, 0.97)),
        rim=0.66,
        spokes=7,
        front="round",
        rear="round",
    ),
    CarModel(
        name="Lumo Falx Coupe 2015",
        category_id=CAR,
        shape=COUPE,
        panes=((0.05, 0.66), (0.7, 0.98)),
        rim=0.8,
        spokes=10,
        front="slim",
        rear="round",
        grille="dark",
        spoiler=True,
    ),
    CarModel(
        name="Kodar Ridge SUV 2010",
        category_id=CAR,
        shape=SUV,
        panes=((0.03, 0.36), (0.41, 0.68), (0.73, 0.97)),
        rim=0.58,
        spokes=5,
        front="square",
        rear="block",
        grille="dark",
        cladding=True,
    ),
    CarModel(
        name="Kodar Ridge SUV 2018",
        category_id=CAR,
        shape=SUV,
        panes=((0.03, 0.42), (0.47, 0.76)),
        rim=0.78,
        spokes=8,
        dark_rim=True,
        front="slim",
        rear="strip",
        grille="chrome",
        cladding=True,
    ),
    CarModel(
        name="Tarn Mule Pickup 2013",
        category_id=TRUCK,
        shape=PICKUP,
        panes=((0.03, 0.55), (0.61, 0.96)),
        rim=0.58,
        spokes=6,
        front="square",
        rear="strip",
        grille="chrome",
        cladding=True,
    ),
    CarModel(
        name="Boreal C/V Cargo Van 2011",
        category_id=TRUCK,
        shape=VAN,
        panes=((0.02, 0.31),),
        rim=0.58,
        spokes=0,
        front="tall",
        rear="strip",
        grille="dark",
    ),
    CarModel(
        name="Ostra Metro Bus 2009",
        category_id=BUS,
        shape=BUS_BODY,
        panes=((0.0, 0.14), (0.16, 0.34), (0.36, 0.55), (0.57, 0.76), (0.78, 0.98)),
        rim=0.62,
        spokes=0,
        front="round",
        rear="strip",
    ),
    CarModel(
        name="Grond Haul Box Truck 2008",
        category_id=TRUCK,
        shape=BOX_TRUCK,
        panes=((0.05, 0.95),),
        rim=0.6,
        spokes=0,
        front="square",
        rear="block",
        grille="dark",
    ),
)
"""The sample's classes. The two sedans, and the two SUVs, differ only in glass, lamps, wheels and grille."""

NUM_PRETRAIN_MODELS = 24


def _pretrain_model(index: int) -> CarModel:
    """Build model `index` of PRETRAIN_MODELS: a warped shape with random details."""
    rng = np.random.default_rng((2601, index))
    shape = SHAPES[index % len(SHAPES)]
    num_panes = {"Van": 3, "Bus": 6, "Box Truck": 1, "Coupe": 1}.get(shape.kind, 2) + index // len(SHAPES) % 2
    edges = np.linspace(0.02, rng.uniform(0.85, 0.99), num_panes + 1)
    return CarModel(
        name=f"Study {shape.kind} {index:02d}",
        category_id={"Bus": BUS, "Box Truck": TRUCK, "Pickup": TRUCK, "Van": TRUCK}.get(shape.kind, CAR),
        shape=shape.warped(rng.uniform(0.88, 1.14), rng.uniform(0.86, 1.16)),
        panes=tuple((float(a) + 0.02, float(b) - 0.02) for a, b in itertools.pairwise(edges)),
        rim=float(rng.uniform(0.52, 0.82)),
        spokes=int(rng.choice((0, 3, 4, 5, 6, 8, 10, 12))),
        dark_rim=bool(rng.random() < 0.4),
        front=("round", "slim", "square", "tall")[rng.integers(4)],
        rear=("round", "slim", "block", "strip")[rng.integers(4)],
        grille=("none", "dark", "chrome")[rng.integers(3)],
        cladding=bool(rng.random() < 0.35),
        rails=bool(rng.random() < 0.35),
        spoiler=bool(rng.random() < 0.3) and shape.kind in ("Sedan", "Coupe"),
    )


PRETRAIN_MODELS: tuple[CarModel, ...] = tuple(_pretrain_model(i) for i in range(NUM_PRETRAIN_MODELS))
"""Models for pretraining a small backbone, as ImageNet is used for ResNet50."""
