"""Throughput of training loops after a warm-up, in which memory is allocated and kernels are selected."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
WARM_UP = 3
"""Steps before the measurement."""


class ThroughputClock:
    """Counter of photos and seconds from the request of the first batch after the warm-up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.photos, self.started = 0, 0.0

    def after_warm_up(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches and start the clock after the warm-up."""
        iterator = iter(batches)
        yield from islice(iterator, WARM_UP)
        self._synchronise()
        self.photos, self.started = 0, time.perf_counter()
        yield from iterator

    def count(self, photos: int) -> None:
        """Add the photos of a step."""
        self.photos += photos

    def rate(self) -> float:
        """Return the photos per second so far, after synchronising with the device."""
        assert self.photos, f"no steps after the {WARM_UP} of the warm-up"
        self._synchronise()
        return self.photos / (time.perf_counter() - self.started)

    def _synchronise(self) -> None:
        """Wait for the device to finish its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
