"""A split's photos in memory, served for many epochs, in an order that depends on (seed, epoch, photo) alone."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from carclass.config.schema import AugmentationSettings, UnfrozenSettings
from carclass.models import preprocessing
from carclass.models.preprocessing import decode_photos, to_network_input, upload, upload_photos
from carclass.models.sample_rng import uniforms
from carclass.training import augmentation
from carclass.training.augmentation import warp_photos

T = TypeVar("T")
ORDER, VIEW, AUGMENT, DROPOUT, APPEARANCE = range(5)
"""What a draw is for: added to the seed, so that no two purposes share their randomness."""
READ_AHEAD = 4
"""Batches that are read, in a thread each, while one is trained on."""
SMALL_STEP_PIXELS = 64 * 224**2
"""So many in a step, or less, a fast GPU is done with before the program has started its kernels one by one."""
STEPS_PER_GROUP = 4
"""Of such steps: so many are augmented at once."""


class EncodedPhotos:
    """Photos as they are on storage, usually much smaller than decoded; decoded whenever they are asked for."""

    def __init__(self, images: pa.Array, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 (S,S,3) RGB."""
        return decode_photos([self.images[int(index)].as_py()], self.size)[0]


class PhotoBlock(NamedTuple):
    """Some of a split's photos."""

    pixels: np.ndarray | EncodedPhotos  # uint8 (N,S,S,3) RGB
    labels: np.ndarray  # int64 (N,)
    ids: np.ndarray  # uint64 (N,): the first bytes of image_id and key


class Batch(NamedTuple):
    """A worker's share of a step."""

    inputs: Tensor
    labels: Tensor  # int64 (N,)
    weight: float  # of each sample's loss, so that the mean over workers is the mean over the step's samples
    ids: np.ndarray  # uint64 (N,)


class SampleOrder:
    """Which samples a split has, on one of several workers.

    ids: uint64 (N,). labels: int64 (N,). rank, num_workers: which share of every step this worker takes.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, *, seed: int, rank: int = 0, num_workers: int = 1) -> None:
        self.ids, self.labels = ids, labels
        self.seed, self.rank, self.num_workers = seed, rank, num_workers

    def __len__(self) -> int:
        return len(self.ids)

    def order(self, epoch: int | None) -> np.ndarray:
        """Positions in the order of an epoch; None: by id, for validation."""
        if epoch is None:
            return np.argsort(self.ids)
        return np.lexsort((self.ids, uniforms(self.seed + ORDER, epoch, self.ids, 1)[:, 0]))

    def steps(self, epoch: int | None, batch_size: int, start: int = 0) -> Iterator[tuple[np.ndarray, float]]:
        """(positions, weight) of this worker's share of every step. batch_size: over all workers.

        start: how many samples of the epoch were taken before, in whole steps.
        Every sample comes once. Where the last step has fewer samples than workers, a worker without any
        repeats one at weight 0, so that all take equally many steps.
        """
        order = self.order(epoch)
        for first in range(start, len(order), batch_size):
            step = order[first : first + batch_size]
            mine = step[self.rank :: self.num_workers]
            yield (mine, self.num_workers / len(step)) if len(mine) else (step[:1], 0.0)


class PhotoSamples(SampleOrder):
    """Samples with their photos. share: seed, rank, num_workers."""

    def __init__(self, blocks: Sequence[PhotoBlock], **share: int) -> None:
        # Blocks lie in shared memory when Ray holds them; they are indexed, never joined.
        self.blocks = [block for block in blocks if len(block.ids)]
        ids, labels = (np.concatenate([getattr(block, of) for block in self.blocks]) for of in ("ids", "labels"))
        super().__init__(ids, labels, **share)
        self.starts = np.cumsum([0, *(len(block.ids) for block in self.blocks)])

    @property
    def size(self) -> int:
        """Of its photos' sides, in pixels."""
        first = self.blocks[0].pixels
        return first.size if isinstance(first, EncodedPhotos) else first.shape[1]

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (N,S,S,3) of photos by their position in the split."""
        where = np.searchsorted(self.starts, indices, side="right") - 1
        found = [self.blocks[block].pixels[i - self.starts[block]] for block, i in zip(where, indices, strict=True)]
        return np.stack(found)

    def read(self, batches: Iterable[tuple[np.ndarray, T]]) -> Iterator[tuple[np.ndarray, T, np.ndarray]]:
        """(positions, what came with them, their pixels), a few batches being read ahead."""
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            reading: deque = deque()
            for indices, more in batches:
                reading.append((indices, more, pool.submit(self.pixels, indices)))
                if len(reading) > READ_AHEAD:
                    yield _done(reading.popleft())
            yield from map(_done, reading)


class PhotoLoader:
    """What the unfrozen stage trains on: photos, augmented in training."""

    def __init__(
        self,
        train: PhotoSamples,
        val: PhotoSamples,
        settings: AugmentationSettings,
        stage: UnfrozenSettings,
        device: torch.device,
    ) -> None:
        self.feeds, self.settings, self.stage, self.device = (train, val), settings, stage, device
        self.num_steps = -(-len(train) // stage.batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's steps after its first `start` samples."""
        steps = self.feeds[0].steps(epoch, self.stage.batch_size, start)
        num_photos = -(-self.stage.batch_size // self.feeds[0].num_workers)
        if self.device.type == "cpu" or num_photos * self.feeds[0].size ** 2 > SMALL_STEP_PIXELS:
            return self._changed(([step] for step in steps), epoch)
        groups = iter(lambda: list(islice(steps, STEPS_PER_GROUP)), [])
        # A thread begins with the first GPU, which may be another worker's.
        return prefetch(self._changed(groups, epoch), partial(torch.cuda.set_device, self.device.index or 0))

    def val(self) -> Iterator[Batch]:
        """Every val photo once over all workers."""
        feed = self.feeds[1]
        for indices, weight, pixels in feed.read(feed.steps(None, self.stage.batch_size * 4)):
            yield _batch(to_network_input(pixels, self.device), feed, indices, weight)

    def _changed(self, groups: Iterator[list[tuple[np.ndarray, float]]], epoch: int) -> Iterator[Batch]:
        """Steps, those of a group augmented together, which changes nothing else: a photo's draws are its own."""
        feed = self.feeds[0]
        joined = ((np.concatenate([indices for indices, _ in group]), group) for group in groups)
        for indices, group, pixels in feed.read(joined):
            parts = self._augmented(pixels, indices, epoch).split([len(indices) for indices, _ in group])
            for inputs, (mine, weight) in zip(parts, group, strict=True):
                yield _batch(inputs, feed, mine, weight)

    def _augmented(self, pixels: np.ndarray, indices: np.ndarray, epoch: int) -> Tensor:
        """Photos as an epoch shows them, normalised. indices: where they are in the split."""
        seed, ids = self.feeds[0].seed, self.feeds[0].ids[indices]
        photos = upload_photos(pixels, self.device)
        if self.stage.appearance:
            photos = augmentation.change_appearance(photos.float(), uniforms(seed + APPEARANCE, epoch, ids, 2))
        return warp_photos(preprocessing.normalise(photos), self.settings, uniforms(seed + AUGMENT, epoch, ids, 5))


class FeatureLoader:
    """What the frozen stage trains on: cached features, of one view per photo and epoch.

    features: float (V,N,D) of the train samples, and (1,N,D) of val.
    """

    def __init__(
        self,
        train: SampleOrder,
        val: SampleOrder,
        features: tuple[Tensor, Tensor],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.samples, self.batch_size = (train, val), batch_size
        self.features = features[0].to(device), features[1].to(device)
        self.num_steps = -(-len(train) // batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's steps after its first `start` samples."""
        samples, features = self.samples[0], self.features[0]
        views = (uniforms(samples.seed + VIEW, epoch, samples.ids, 1)[:, 0] * len(features)).astype(np.int64)
        for indices, weight in samples.steps(epoch, self.batch_size, start):
            yield _batch(features[views[indices], indices], samples, indices, weight)

    def val(self) -> Iterator[Batch]:
        """Every val photo once over all workers."""
        samples = self.samples[1]
        for indices, weight in samples.steps(None, self.batch_size * 16):
            yield _batch(self.features[1][0, indices], samples, indices, weight)


def feature_view(photos: Tensor, view: int, ids: np.ndarray, seed: int, settings: AugmentationSettings) -> Tensor:
    """The photos as a cached view shows them: 0 as they are, 1 mirrored, more: augmented by (seed, view, photo)."""
    if view == 0 or (view == 1 and settings.flip == "none"):
        return photos
    if view == 1:
        return photos.flip(3)
    return warp_photos(photos, settings, uniforms(seed + AUGMENT, view, ids, 5))


def prefetch(items: Iterator[T], begin: Callable[[], None]) -> Iterator[T]:
    """The same items, a few of them made in a thread while one is used: a GPU would wait while they are made.

    begin: called in that thread before anything else.
    """
    with ThreadPoolExecutor(1, initializer=begin) as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(STEPS_PER_GROUP))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


def _done(batch: tuple) -> tuple:
    *told, pixels = batch
    return *told, pixels.result()


def _batch(inputs: Tensor, samples: SampleOrder, indices: np.ndarray, weight: float) -> Batch:
    return Batch(inputs, upload(samples.labels[indices], inputs.device), weight, samples.ids[indices])
