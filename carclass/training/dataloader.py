"""Dataloaders of photos and cached features, in an order that depends only on (seed, epoch, sample id)."""

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
from carclass.models.preprocessing import decode_photos, photos_to_device, to_device, to_network_input
from carclass.models.sample_rng import uniforms
from carclass.training import augmentation
from carclass.training.augmentation import warp_photos

T = TypeVar("T")
ORDER, VIEW, AUGMENT, DROPOUT, APPEARANCE = range(5)
"""Offsets of the seed, one for each use of random numbers."""
READ_AHEAD = 4
"""Batches that are read ahead, each in a thread."""
SMALL_STEP_PIXELS = 64 * 224**2
"""Up to this size of a step, a fast GPU takes less time than launching its kernels one by one."""
STEPS_PER_GROUP = 4
"""Number of such steps that are augmented at once."""


class EncodedPhotos:
    """Encoded photos, decoded on access: they take much less memory than decoded ones."""

    def __init__(self, images: pa.Array, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a decoded photo, uint8 (S,S,3) RGB."""
        return decode_photos([self.images[int(index)].as_py()], self.size)[0]


class PhotoBlock(NamedTuple):
    """A part of a split's photos."""

    pixels: np.ndarray | EncodedPhotos  # uint8 (N,S,S,3) RGB
    labels: np.ndarray  # int64 (N,)
    ids: np.ndarray  # uint64 (N,): first bytes of the sha256 of image_id and key


class Batch(NamedTuple):
    """A worker's share of a step."""

    inputs: Tensor
    labels: Tensor  # int64 (N,)
    weight: float  # of each sample's loss: makes the mean over workers the mean over the step's samples
    ids: np.ndarray  # uint64 (N,)


class SampleOrder:
    """The samples of a split and their order, sharded over workers.

    ids: uint64 (N,). labels: int64 (N,). rank, num_workers: the worker's shard of every step.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, *, seed: int, rank: int = 0, num_workers: int = 1) -> None:
        self.ids, self.labels = ids, labels
        self.seed, self.rank, self.num_workers = seed, rank, num_workers

    def __len__(self) -> int:
        return len(self.ids)

    def order(self, epoch: int | None) -> np.ndarray:
        """Return sample positions in the order of an epoch; None: by id, for validation."""
        if epoch is None:
            return np.argsort(self.ids)
        return np.lexsort((self.ids, uniforms(self.seed + ORDER, epoch, self.ids, 1)[:, 0]))

    def steps(self, epoch: int | None, batch_size: int, start: int = 0) -> Iterator[tuple[np.ndarray, float]]:
        """Yield (positions, weight) of this worker's share of every step, each sample once over all workers.

        batch_size: over all workers. start: samples of the epoch to skip, in whole steps. If the last step has fewer
        samples than workers, the others repeat a sample with weight 0, so that all take the same number of steps.
        """
        order = self.order(epoch)
        for first in range(start, len(order), batch_size):
            step = order[first : first + batch_size]
            share = step[self.rank :: self.num_workers]
            yield (share, self.num_workers / len(step)) if len(share) else (step[:1], 0.0)


class PhotoSamples(SampleOrder):
    """Samples with their photos. share: seed, rank, num_workers of SampleOrder."""

    def __init__(self, blocks: Sequence[PhotoBlock], **share: int) -> None:
        # Blocks of Ray are in shared memory: concatenated pixels would be a copy.
        self.blocks = [block for block in blocks if len(block.ids)]
        ids, labels = (np.concatenate([getattr(block, of) for block in self.blocks]) for of in ("ids", "labels"))
        super().__init__(ids, labels, **share)
        self.starts = np.cumsum([0, *(len(block.ids) for block in self.blocks)])

    @property
    def size(self) -> int:
        """Return the side of the photos in pixels."""
        pixels = self.blocks[0].pixels
        return pixels.size if isinstance(pixels, EncodedPhotos) else pixels.shape[1]

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Return the photos at positions in the split, uint8 (N,S,S,3)."""
        blocks = np.searchsorted(self.starts, indices, side="right") - 1
        return np.stack(
            [self.blocks[block].pixels[i - self.starts[block]] for block, i in zip(blocks, indices, strict=True)]
        )

    def read(self, batches: Iterable[tuple[np.ndarray, T]]) -> Iterator[tuple[np.ndarray, T, np.ndarray]]:
        """Yield (positions, item, pixels) for (positions, item), READ_AHEAD batches being read in the background."""
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            pending: deque = deque()
            for indices, item in batches:
                pending.append((indices, item, pool.submit(self.pixels, indices)))
                if len(pending) > READ_AHEAD:
                    yield _wait_for_pixels(pending.popleft())
            yield from map(_wait_for_pixels, pending)


class PhotoLoader:
    """The loader of the unfrozen stage: photos, augmented in training."""

    def __init__(
        self,
        train: PhotoSamples,
        val: PhotoSamples,
        settings: AugmentationSettings,
        stage: UnfrozenSettings,
        device: torch.device,
    ) -> None:
        self.train_samples, self.val_samples = train, val
        self.settings, self.stage, self.device = settings, stage, device
        self.num_steps = -(-len(train) // stage.batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch after its first `start` samples."""
        samples = self.train_samples
        steps = samples.steps(epoch, self.stage.batch_size, start)
        num_photos = -(-self.stage.batch_size // samples.num_workers)
        if self.device.type == "cpu" or num_photos * samples.size**2 > SMALL_STEP_PIXELS:
            return self._augmented_batches(([step] for step in steps), epoch)
        groups = iter(lambda: list(islice(steps, STEPS_PER_GROUP)), [])
        # A new thread uses the first GPU, which may be another worker's.
        set_device = partial(torch.cuda.set_device, self.device.index or 0)
        return prefetch(self._augmented_batches(groups, epoch), set_device)

    def val(self) -> Iterator[Batch]:
        """Yield every val photo once over all workers."""
        samples, stage = self.val_samples, self.stage
        # Without gradients, four times the photos of a forward pass take less memory.
        num_photos = min(stage.batch_size, (stage.micro_batch_size or stage.batch_size) * samples.num_workers)
        for indices, weight, pixels in samples.read(samples.steps(None, 4 * num_photos)):
            yield _batch(to_network_input(pixels, self.device), samples, indices, weight)

    def _augmented_batches(self, groups: Iterator[list[tuple[np.ndarray, float]]], epoch: int) -> Iterator[Batch]:
        """Yield the batches of groups of steps; a group is augmented at once, with the same result as step by step."""
        samples = self.train_samples
        joined = ((np.concatenate([indices for indices, _ in group]), group) for group in groups)
        for joined_indices, group, pixels in samples.read(joined):
            photos = self._augment(pixels, joined_indices, epoch).split([len(indices) for indices, _ in group])
            for inputs, (indices, weight) in zip(photos, group, strict=True):
                yield _batch(inputs, samples, indices, weight)

    def _augment(self, pixels: np.ndarray, indices: np.ndarray, epoch: int) -> Tensor:
        """Return the augmented, normalised photos of an epoch. indices: their positions in the split."""
        seed, ids = self.train_samples.seed, self.train_samples.ids[indices]
        photos = photos_to_device(pixels, self.device)
        if self.stage.appearance:
            photos = augmentation.change_appearance(photos.float(), uniforms(seed + APPEARANCE, epoch, ids, 2))
        return warp_photos(preprocessing.normalise(photos), self.settings, uniforms(seed + AUGMENT, epoch, ids, 5))


class FeatureLoader:
    """The loader of the frozen stage: cached features, of one view per photo and epoch.

    features: float32 (V,N,D) of train, and (1,N,D) of val.
    """

    def __init__(
        self,
        train: SampleOrder,
        val: SampleOrder,
        features: tuple[Tensor, Tensor],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.train_samples, self.val_samples, self.batch_size = train, val, batch_size
        self.train_features, self.val_features = (split.to(device) for split in features)
        self.num_steps = -(-len(train) // batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch after its first `start` samples."""
        samples, features = self.train_samples, self.train_features
        views = (uniforms(samples.seed + VIEW, epoch, samples.ids, 1)[:, 0] * len(features)).astype(np.int64)
        for indices, weight in samples.steps(epoch, self.batch_size, start):
            yield _batch(features[views[indices], indices], samples, indices, weight)

    def val(self) -> Iterator[Batch]:
        """Yield every val sample once over all workers."""
        samples = self.val_samples
        for indices, weight in samples.steps(None, self.batch_size * 16):
            yield _batch(self.val_features[0, indices], samples, indices, weight)


def feature_view(photos: Tensor, view: int, ids: np.ndarray, seed: int, settings: AugmentationSettings) -> Tensor:
    """Return a view of normalised photos: 0 unchanged, 1 mirrored, others augmented by (seed, view, sample id)."""
    if view == 0 or (view == 1 and settings.flip == "none"):
        return photos
    if view == 1:
        return photos.flip(3)
    return warp_photos(photos, settings, uniforms(seed + AUGMENT, view, ids, 5))


def prefetch(items: Iterator[T], initializer: Callable[[], None]) -> Iterator[T]:
    """Yield the items, which a thread makes ahead. initializer: called first in that thread."""
    with ThreadPoolExecutor(1, initializer=initializer) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(STEPS_PER_GROUP))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def _wait_for_pixels(batch: tuple) -> tuple:
    indices, item, pixels = batch
    return indices, item, pixels.result()


def _batch(inputs: Tensor, samples: SampleOrder, indices: np.ndarray, weight: float) -> Batch:
    return Batch(inputs, to_device(samples.labels[indices], inputs.device), weight, samples.ids[indices])
