"""Dataloaders of photos and cached features, in an order that depends only on (seed, epoch, sample id)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from carclass.config.schema import AugmentationSettings, UnfrozenSettings
from carclass.data.photo import decode_photos
from carclass.models.preprocessing import IMAGENET, Normalisation, normalise, photos_to_device, to_device
from carclass.models.sample_rng import uniforms
from carclass.training import augmentation
from carclass.training.augmentation import NUM_DRAWS, warp_photos
from carclass.training.sample_order import APPEARANCE, AUGMENT, VIEW, SampleOrder, Share

T = TypeVar("T")
READ_AHEAD = 4
"""Batches that are read ahead, each in a thread."""
SMALL_STEP_PIXELS = 64 * 224**2
"""Up to this size of a step, a fast GPU takes less time than launching its kernels one by one."""
STEPS_PER_GROUP = 4
"""Number of such steps that are augmented at once."""
RESIDENT_SHARE = 0.05
"""Share of a GPU's memory up to which a stage's photos stay there, decoded. The preflight check leaves a tenth free."""


RESIDENT_ROWS = 256
"""Photos copied to a GPU at once."""


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
    weight: float  # of each sample's loss, see Share
    ids: np.ndarray  # uint64 (N,)


class PhotoSamples(SampleOrder):
    """Samples with their photos. share: seed, rank, num_workers, balanced of SampleOrder."""

    def __init__(self, blocks: Sequence[PhotoBlock], **share: Any) -> None:
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

    @property
    def num_bytes(self) -> int:
        """Return the size of all photos when they are decoded."""
        return len(self) * self.size**2 * 3

    def copy_to(self, device: torch.device) -> Tensor:
        """Return all photos on a device, uint8 (N,S,S,3)."""
        photos = torch.empty(len(self), self.size, self.size, 3, dtype=torch.uint8, device=device)
        for start in range(0, len(self), RESIDENT_ROWS):
            positions = np.arange(start, min(start + RESIDENT_ROWS, len(self)))
            photos[start : start + len(positions)] = torch.from_numpy(self.pixels(positions)).to(device)
        return photos

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
    """The loader of the unfrozen stage: photos, augmented in training.

    Photos that take a small part of a GPU's memory are copied there once, and batches are gathered on it.
    """

    def __init__(
        self,
        train: PhotoSamples,
        val: PhotoSamples,
        settings: AugmentationSettings,
        stage: UnfrozenSettings,
        device: torch.device,
        scale: Normalisation = IMAGENET,
    ) -> None:
        self.train_samples, self.val_samples = train, val
        self.settings, self.stage, self.device, self.scale = settings, stage, device, scale
        self.num_steps = train.num_steps(stage.batch_size)
        self.resident: dict[PhotoSamples, Tensor] = {}
        """Photos on the device."""
        if fit_on_device(train.num_bytes + val.num_bytes, device):
            self.resident = {samples: samples.copy_to(device) for samples in (train, val)}

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
        steps = ((share.positions, share) for share in samples.steps(None, 4 * num_photos))
        for share, photos in self._photos(samples, steps):
            yield _batch(normalise(photos, self.scale), samples, share)

    def _augmented_batches(self, groups: Iterator[list[Share]], epoch: int) -> Iterator[Batch]:
        """Yield the batches of groups of steps; a group is augmented at once, with the same result as step by step."""
        samples = self.train_samples
        joined = ((np.concatenate([share.positions for share in group]), group) for group in groups)
        for group, photos in self._photos(samples, joined):
            ids = np.concatenate([share.ids for share in group])
            augmented = self._augment(photos, ids, epoch).split([len(share.ids) for share in group])
            for inputs, share in zip(augmented, group, strict=True):
                yield _batch(inputs, samples, share)

    def _photos(self, samples: PhotoSamples, batches: Iterable[tuple[np.ndarray, T]]) -> Iterator[tuple[T, Tensor]]:
        """Yield (item, photos) for (positions, item): uint8 (N,3,S,S) on the device."""
        if (resident := self.resident.get(samples)) is None:
            for _, item, pixels in samples.read(batches):
                yield item, photos_to_device(pixels, self.device)
        else:
            for positions, item in batches:
                yield item, resident[to_device(positions, self.device)].permute(0, 3, 1, 2)

    def _augment(self, photos: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
        """Return the augmented, normalised photos of an epoch. photos: uint8 (N,3,S,S)."""
        seed = self.train_samples.seed
        if self.stage.appearance:
            photos = augmentation.change_appearance(photos.float(), uniforms(seed + APPEARANCE, epoch, ids, 2))
        draws = uniforms(seed + AUGMENT, epoch, ids, NUM_DRAWS)
        return warp_photos(normalise(photos, self.scale), self.settings, draws, self.stage.train_size)


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
        self.num_steps = train.num_steps(batch_size)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch after its first `start` samples."""
        samples, features = self.train_samples, self.train_features
        for share in samples.steps(epoch, self.batch_size, start):
            views = (uniforms(samples.seed + VIEW, epoch, share.ids, 1)[:, 0] * len(features)).astype(np.int64)
            yield _batch(features[views, share.positions], samples, share)

    def val(self) -> Iterator[Batch]:
        """Yield every val sample once over all workers."""
        samples = self.val_samples
        for share in samples.steps(None, self.batch_size * 16):
            yield _batch(self.val_features[0, share.positions], samples, share)


def feature_view(photos: Tensor, view: int, ids: np.ndarray, seed: int, settings: AugmentationSettings) -> Tensor:
    """Return a view of normalised photos: 0 unchanged, 1 mirrored, others augmented by (seed, view, sample id)."""
    if view == 0 or (view == 1 and settings.flip == "none"):
        return photos
    if view == 1:
        return photos.flip(3)
    return warp_photos(photos, settings, uniforms(seed + AUGMENT, view, ids, NUM_DRAWS))


def fit_on_device(num_bytes: int, device: torch.device) -> bool:
    """Return True if photos of this size shall stay in the memory of a GPU."""
    return device.type == "cuda" and num_bytes <= RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory


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


def _batch(inputs: Tensor, samples: SampleOrder, share: Share) -> Batch:
    return Batch(inputs, to_device(samples.labels[share.positions], inputs.device), share.weight, share.ids)
