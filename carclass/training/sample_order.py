"""Order of a split's samples in each epoch, a function of (seed, epoch, sample id), sharded over workers."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from carclass.models.sample_rng import random_bits, uniforms

ORDER, VIEW, AUGMENT, DROPOUT, APPEARANCE, SAMPLING = range(6)
"""Offsets of the seed, one for each use of random numbers."""


class Draws(NamedTuple):
    """Samples in the order in which they are drawn."""

    positions: np.ndarray  # int64 (N,): in the split
    ids: np.ndarray  # uint64 (N,): of the samples, or of their draws, so that repeated ones get other random numbers


class Share(NamedTuple):
    """A worker's share of a step."""

    positions: np.ndarray  # int64 (N,): in the split
    ids: np.ndarray  # uint64 (N,): see Draws
    weight: float  # of each sample's loss: makes the mean over workers the mean over the step's samples


class SampleOrder:
    """The samples of a split and their order, sharded over workers.

    ids: uint64 (N,). labels: int64 (N,). rank, num_workers: the worker's shard of every step. balanced: draw every
    class equally often in an epoch, instead of every sample once.
    """

    def __init__(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        rank: int = 0,
        num_workers: int = 1,
        balanced: bool = False,
    ) -> None:
        self.ids, self.labels = ids, labels
        self.seed, self.rank, self.num_workers, self.balanced = seed, rank, num_workers, balanced

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def class_draws(self) -> int:
        """Return the draws of each class in a balanced epoch; together they are as many as samples, rounded up."""
        return -(-len(self) // len(np.unique(self.labels)))

    def num_steps(self, batch_size: int) -> int:
        """Return the number of training steps of an epoch. batch_size: over all workers."""
        num_draws = self.class_draws * len(np.unique(self.labels)) if self.balanced else len(self)
        return -(-num_draws // batch_size)

    def order(self, epoch: int | None) -> Draws:
        """Return the draws of an epoch, from 1; None: every sample, by id, for validation."""
        if epoch is None:
            positions = np.argsort(self.ids)
            return Draws(positions, self.ids[positions])
        draws = self._balanced_draws(epoch) if self.balanced else Draws(np.arange(len(self)), self.ids)
        shuffled = np.lexsort((draws.ids, uniforms(self.seed + ORDER, epoch, draws.ids, 1)[:, 0]))
        return Draws(draws.positions[shuffled], draws.ids[shuffled])

    def steps(self, epoch: int | None, batch_size: int, start: int = 0) -> Iterator[Share]:
        """Yield this worker's share of every step; over all workers, the shares are the epoch's draws.

        batch_size: over all workers. start: draws of the epoch to skip, in whole steps. If the last step has fewer
        draws than workers, the others repeat one with weight 0, so that all take the same number of steps.
        """
        positions, ids = self.order(epoch)
        for first in range(start, len(positions), batch_size):
            step = np.arange(first, min(first + batch_size, len(positions)))
            share = step[self.rank :: self.num_workers]
            weight = self.num_workers / len(step) if len(share) else 0.0
            share = share if len(share) else step[:1]
            yield Share(positions[share], ids[share], weight)

    def _balanced_draws(self, epoch: int) -> Draws:
        """Return the draws of an epoch, of each class equally many.

        The draws of a class are consecutive over epochs, in cycles through its samples, each in another random order:
        all are drawn before one is drawn again.
        """
        _, classes, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        start = (epoch - 1) * self.class_draws
        end = start + self.class_draws
        first_cycle = start // counts  # by class
        num_cycles = (end - 1) // counts - first_cycle + 1
        positions = np.repeat(np.arange(len(self)), num_cycles[classes])
        classes = classes[positions]
        cycles = first_cycle[classes] + _count_repeats(positions)
        ids = random_bits(self.seed + SAMPLING, cycles, self.ids[positions], 1)[:, 0]
        order = np.lexsort((ids, cycles, classes))
        # A draw's number within its class, counted over all epochs.
        numbers = _count_repeats(classes[order]) + (first_cycle * counts)[classes[order]]
        drawn = order[(start <= numbers) & (numbers < end)]
        return Draws(positions[drawn], ids[drawn])


def _count_repeats(values: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2 … within each run of equal values. values: int64 (N,), sorted."""
    return np.arange(len(values)) - np.searchsorted(values, values)
