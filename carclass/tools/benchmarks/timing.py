"""A clock for training loops that leaves out the first steps, in which memory is taken and kernels are chosen."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
WARM_UP = 3
"""Steps that are not counted."""


class Clock:
    """Counts photos and seconds from the moment at which the step after the warm-up is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.photos, self.started = 0, 0.0

    def after_warm_up(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches."""
        iterator = iter(batches)
        yield from islice(iterator, WARM_UP)
        self._synchronise()
        self.photos, self.started = 0, time.perf_counter()
        yield from iterator

    def count(self, photos: int) -> None:
        """Photos that a step has used."""
        self.photos += photos

    def rate(self) -> float:
        """Photos per second up to now, the device's work included."""
        assert self.photos, f"no step came after the {WARM_UP} of the warm-up"
        self._synchronise()
        return self.photos / (time.perf_counter() - self.started)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
