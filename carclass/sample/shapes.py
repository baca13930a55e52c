"""Silhouettes of cars, seen from the side.

Lengths are in metres, somewhat shorter than real ones so that details are visible at 96 px. A car faces left: x
increases from the nose to the tail, and y upwards from the ground.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Silhouette shared by all models with the same body."""

    kind: str
    outline: tuple[tuple[float, float, float], ...]
    """Corners of the body, from the front bumper over the roof to the rear bumper: x, y, rounding radius."""
    glass: tuple[Point, ...]
    """Convex area that contains the windows."""
    axles: tuple[float, float]
    """x of the front and the rear wheel."""
    wheel: float
    """Radius of a tyre."""
    front_lamp: Point
    rear_lamp: Point
    """The foremost and the rearmost point of a lamp."""
    doors: tuple[float, ...]
    """x of the door gaps."""
    cargo: tuple[float, float, float, float] | None = None
    """Box behind the cab, painted separately: x1, y1, x2, y2."""

    @property
    def length(self) -> float:
        """Return the length in metres."""
        return max(x for x, _, _ in self.outline)

    @property
    def height(self) -> float:
        """Return the height of the highest point, cargo included."""
        return max([y for _, y, _ in self.outline] + ([self.cargo[3]] if self.cargo else []))

    @property
    def belt(self) -> float:
        """Return the height of the windows' lower edge."""
        return min(y for _, y in self.glass)

    @property
    def sill(self) -> float:
        """Return the height of the body's lower edge."""
        return min(y for _, y, _ in self.outline)

    def warped(self, stretch: float, lift: float) -> Shape:
        """Return the shape with lengths scaled by `stretch`, and heights above 0.5 m by `lift`."""

        def lifted(y: float) -> float:
            return y if y < 0.5 else 0.5 + (y - 0.5) * lift

        x1, y1, x2, y2 = self.cargo or (0.0, 0.0, 0.0, 0.0)
        return replace(
            self,
            outline=tuple((x * stretch, lifted(y), r) for x, y, r in self.outline),
            glass=tuple((x * stretch, lifted(y)) for x, y in self.glass),
            axles=(self.axles[0] * stretch, self.axles[1] * stretch),
            front_lamp=(self.front_lamp[0] * stretch, lifted(self.front_lamp[1])),
            rear_lamp=(self.rear_lamp[0] * stretch, lifted(self.rear_lamp[1])),
            doors=tuple(x * stretch for x in self.doors),
            cargo=(x1 * stretch, lifted(y1), x2 * stretch, lifted(y2)) if self.cargo else None,
        )


SEDAN = Shape(
    kind="Sedan",
    outline=(
        (0.03, 0.22, 0.06),
        (0.0, 0.5, 0.1),
        (0.07, 0.76, 0.14),
        (1.02, 0.95, 0.1),
        (1.68, 1.44, 0.28),
        (2.5, 1.5, 0.5),
        (3.12, 1.42, 0.28),
        (3.62, 1.02, 0.08),
        (4.08, 0.97, 0.1),
        (4.15, 0.55, 0.1),
        (4.1, 0.24, 0.06),
    ),
    glass=((1.16, 0.97), (1.75, 1.38), (2.5, 1.43), (3.04, 1.36), (3.46, 0.99)),
    axles=(0.8, 3.3),
    wheel=0.35,
    front_lamp=(0.04, 0.68),
    rear_lamp=(4.13, 0.78),
    doors=(1.25, 2.3, 3.15),
)
HATCH = Shape(
    kind="Hatchback",
    outline=(
        (0.03, 0.22, 0.06),
        (0.0, 0.5, 0.12),
        (0.08, 0.8, 0.18),
        (0.72, 1.0, 0.1),
        (1.3, 1.5, 0.3),
        (2.1, 1.57, 0.5),
        (2.95, 1.48, 0.2),
        (3.25, 1.0, 0.1),
        (3.36, 0.88, 0.1),
        (3.4, 0.5, 0.1),
        (3.35, 0.24, 0.06),
    ),
    glass=((0.86, 1.02), (1.38, 1.43), (2.1, 1.49), (2.82, 1.42), (3.06, 1.02)),
    axles=(0.66, 2.75),
    wheel=0.34,
    front_lamp=(0.05, 0.7),
    rear_lamp=(3.32, 0.92),
    doors=(0.98, 2.1),
)
WAGON = Shape(
    kind="Wagon",
    outline=(
        (0.03, 0.22, 0.06),
        (0.0, 0.5, 0.1),
        (0.07, 0.76, 0.14),
        (1.02, 0.95, 0.1),
        (1.68, 1.44, 0.28),
        (2.5, 1.5, 0.5),
        (3.8, 1.45, 0.15),
        (4.15, 0.95, 0.1),
        (4.2, 0.55, 0.1),
        (4.15, 0.24, 0.06),
    ),
    glass=((1.16, 0.97), (1.75, 1.38), (2.5, 1.43), (3.72, 1.38), (3.98, 0.99)),
    axles=(0.8, 3.35),
    wheel=0.35,
    front_lamp=(0.04, 0.68),
    rear_lamp=(4.14, 0.85),
    doors=(1.25, 2.3, 3.2),
)
SUV = Shape(
    kind="SUV",
    outline=(
        (0.04, 0.32, 0.06),
        (0.0, 0.6, 0.08),
        (0.04, 1.0, 0.12),
        (0.95, 1.14, 0.1),
        (1.45, 1.76, 0.2),
        (2.6, 1.84, 0.6),
        (3.72, 1.77, 0.14),
        (3.98, 1.12, 0.1),
        (4.04, 0.65, 0.08),
        (3.98, 0.34, 0.06),
    ),
    glass=((1.1, 1.17), (1.54, 1.68), (2.6, 1.75), (3.6, 1.69), (3.82, 1.17)),
    axles=(0.8, 3.2),
    wheel=0.43,
    front_lamp=(0.03, 0.88),
    rear_lamp=(4.0, 1.0),
    doors=(1.2, 2.2, 3.1),
)
COUPE = Shape(
    kind="Coupe",
    outline=(
        (0.05, 0.16, 0.06),
        (0.0, 0.36, 0.08),
        (0.14, 0.58, 0.16),
        (1.42, 0.82, 0.2),
        (2.02, 1.2, 0.3),
        (2.5, 1.26, 0.4),
        (3.1, 1.14, 0.5),
        (3.9, 0.92, 0.1),
        (4.08, 0.86, 0.06),
        (4.12, 0.5, 0.1),
        (4.05, 0.2, 0.06),
    ),
    glass=((1.5, 0.84), (2.07, 1.13), (2.5, 1.18), (2.98, 1.09), (3.5, 0.9)),
    axles=(0.82, 3.3),
    wheel=0.37,
    front_lamp=(0.12, 0.54),
    rear_lamp=(4.1, 0.7),
    doors=(1.55, 2.85),
)
PICKUP = Shape(
    kind="Pickup",
    outline=(
        (0.04, 0.34, 0.06),
        (0.0, 0.6, 0.08),
        (0.04, 1.0, 0.1),
        (1.0, 1.12, 0.1),
        (1.5, 1.7, 0.2),
        (2.1, 1.76, 0.4),
        (2.6, 1.7, 0.14),
        (2.72, 1.1, 0.03),
        (4.5, 1.1, 0.05),
        (4.55, 0.6, 0.08),
        (4.5, 0.36, 0.06),
    ),
    glass=((1.16, 1.15), (1.6, 1.62), (2.1, 1.67), (2.5, 1.62), (2.6, 1.15)),
    axles=(0.85, 3.6),
    wheel=0.44,
    front_lamp=(0.03, 0.9),
    rear_lamp=(4.53, 0.9),
    doors=(1.25, 2.1, 2.78),
)
VAN = Shape(
    kind="Van",
    outline=(
        (0.03, 0.26, 0.06),
        (0.0, 0.6, 0.1),
        (0.05, 0.95, 0.16),
        (0.62, 1.18, 0.15),
        (1.2, 2.0, 0.3),
        (1.7, 2.12, 0.4),
        (4.15, 2.12, 0.15),
        (4.34, 1.2, 0.3),
        (4.36, 0.5, 0.08),
        (4.3, 0.28, 0.06),
    ),
    glass=((0.78, 1.2), (1.3, 1.88), (2.4, 1.9), (4.08, 1.9), (4.2, 1.2)),
    axles=(0.78, 3.45),
    wheel=0.38,
    front_lamp=(0.04, 0.82),
    rear_lamp=(4.33, 1.1),
    doors=(0.95, 1.85, 3.0),
)
BUS_BODY = Shape(
    kind="Bus",
    outline=(
        (0.02, 0.3, 0.06),
        (0.0, 0.9, 0.2),
        (0.1, 2.2, 0.25),
        (0.3, 2.5, 0.3),
        (5.3, 2.5, 0.2),
        (5.42, 1.2, 0.3),
        (5.4, 0.32, 0.06),
    ),
    glass=((0.07, 1.15), (0.18, 2.1), (2.5, 2.12), (5.24, 2.1), (5.32, 1.25)),
    axles=(1.15, 4.1),
    wheel=0.45,
    front_lamp=(0.01, 0.75),
    rear_lamp=(5.4, 0.95),
    doors=(0.35, 0.8),
)
BOX_TRUCK = Shape(
    kind="Box Truck",
    outline=(
        (0.02, 0.36, 0.06),
        (0.0, 0.9, 0.12),
        (0.12, 1.25, 0.12),
        (0.38, 1.95, 0.16),
        (0.6, 2.02, 0.2),
        (1.35, 2.02, 0.05),
        (1.4, 0.72, 0.02),
        (5.0, 0.72, 0.02),
        (5.0, 0.44, 0.02),
    ),
    glass=((0.2, 1.28), (0.46, 1.85), (0.8, 1.88), (1.22, 1.88), (1.22, 1.28)),
    axles=(0.85, 3.9),
    wheel=0.43,
    front_lamp=(0.02, 0.75),
    rear_lamp=(5.0, 0.62),
    doors=(0.4, 1.25),
    cargo=(1.48, 0.74, 5.05, 2.65),
)
SHAPES = (SEDAN, HATCH, WAGON, SUV, COUPE, PICKUP, VAN, BUS_BODY, BOX_TRUCK)
