"""Dataloaders: every sample once per epoch, in the same steps for any number of workers."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from carclass.config.schema import AugmentationSettings, UnfrozenSettings
from carclass.data import photo
from carclass.data.photo import decode_photos
from carclass.models import preprocessing
from carclass.models.preprocessing import to_network_input
from carclass.training import dataloader
from carclass.training.dataloader import (
    READ_AHEAD,
    EncodedPhotos,
    FeatureLoader,
    PhotoBlock,
    PhotoLoader,
    PhotoSamples,
    feature_view,
    prefetch,
)

CPU = torch.device("cpu")
SIDE = 8
PLAIN = UnfrozenSettings(batch_size=8, appearance=False)
NOTHING = AugmentationSettings(flip="none", rotation=0, zoom_height=0, zoom_width=0)
CHANGED = UnfrozenSettings(batch_size=8, appearance=True)


def block(ids: np.ndarray) -> PhotoBlock:
    """Return photos with pixels and label derived from their id."""
    pixels = np.stack([np.random.default_rng(int(i)).integers(0, 256, (SIDE, SIDE, 3), np.uint8) for i in ids])
    return PhotoBlock(pixels, (ids % np.uint64(10)).astype(np.int64), ids)


def ids_of(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 2**63, count, np.uint64)


def blocks(count: int, size: int = 7) -> list[PhotoBlock]:
    ids = ids_of(count)
    return [block(ids[start : start + size]) for start in range(0, count, size)]


def shard(count: int, num_workers: int) -> list[PhotoSamples]:
    return [PhotoSamples(blocks(count), seed=1, rank=rank, num_workers=num_workers) for rank in range(num_workers)]


SHARES = [(23, 8, 1), (23, 8, 2), (23, 8, 3), (24, 8, 3), (25, 8, 4), (3, 8, 5), (8, 1, 3), (17, 16, 4)]
shares = pytest.mark.parametrize(("count", "batch_size", "num_workers"), SHARES)


# Pixels


@pytest.mark.parametrize("num_workers", [1, 3])
def test_photos_that_stay_on_a_device_give_the_same_batches(num_workers: int, monkeypatch: pytest.MonkeyPatch):
    def batches() -> list[torch.Tensor]:
        loaders = [PhotoLoader(part, part, AugmentationSettings(), CHANGED, CPU) for part in shard(23, num_workers)]
        return [batch.inputs for loader in loaders for batch in [*loader.train(2, 8), *loader.val()]]

    read = batches()
    monkeypatch.setattr(dataloader, "RESIDENT_ROWS", 5)
    monkeypatch.setattr(dataloader, "fit_on_device", lambda _size, _device: True)
    monkeypatch.delattr(PhotoSamples, "read")
    for resident, expected in zip(batches(), read, strict=True):
        torch.testing.assert_close(resident, expected, rtol=0, atol=0)


def test_photos_are_trained_smaller_than_they_are_validated():
    (samples,) = shard(9, 1)
    loader = PhotoLoader(samples, samples, AugmentationSettings(), PLAIN.model_copy(update={"train_size": 6}), CPU)
    assert next(loader.train(0)).inputs.shape == (8, 3, 6, 6)
    assert next(loader.val()).inputs.shape[1:] == (3, SIDE, SIDE)


def test_photos_on_a_cpu_are_not_copied():
    samples = shard(23, 1)[0]
    assert not dataloader.fit_on_device(samples.num_bytes, CPU)
    assert samples.num_bytes == 23 * SIDE * SIDE * 3


def test_encoded_photos_equal_decoded_ones():
    rng = np.random.default_rng(2)
    images = [photo.encode(rng.integers(0, 256, (30 + i, 40, 3), np.uint8)) for i in range(9)]
    ids, labels = ids_of(9), np.zeros(9, np.int64)
    decoded = PhotoSamples([PhotoBlock(decode_photos(images, SIDE), labels, ids)], seed=1)
    encoded = PhotoSamples([PhotoBlock(EncodedPhotos(pa.array(images), SIDE), labels, ids)], seed=1)
    chosen = np.array([7, 0, 7, 3])
    np.testing.assert_array_equal(encoded.pixels(chosen), decoded.pixels(chosen))


def test_batches_read_ahead_are_in_order():
    (samples,) = shard(23, 1)
    steps = list(samples.steps(0, 2))
    assert len(steps) > READ_AHEAD
    read = samples.read((step.positions, step.weight) for step in steps)
    for step, (read_positions, item, pixels) in zip(steps, read, strict=True):
        assert read_positions is step.positions
        assert item == step.weight
        np.testing.assert_array_equal(pixels, samples.pixels(step.positions))


# Steps


@shares
@pytest.mark.parametrize("epoch", [0, 7, None])
def test_every_sample_occurs_once_per_epoch_over_all_workers(
    count: int, batch_size: int, num_workers: int, epoch: int | None
):
    seen = [
        index
        for samples in shard(count, num_workers)
        for share in samples.steps(epoch, batch_size)
        if share.weight > 0
        for index in share.positions
    ]
    assert sorted(seen) == list(range(count))


@shares
def test_shares_of_all_workers_add_up_to_the_step_of_one_worker(count: int, batch_size: int, num_workers: int):
    alone = [set(share.positions) for share in shard(count, 1)[0].steps(3, batch_size)]
    shared: list[set[int]] = [set() for _ in alone]
    for samples in shard(count, num_workers):
        for step, share in enumerate(samples.steps(3, batch_size)):
            shared[step] |= set(share.positions) if share.weight else set()
    assert shared == alone


@shares
def test_all_workers_take_the_same_number_of_steps_and_none_is_empty(count: int, batch_size: int, num_workers: int):
    lengths = [[len(share.ids) for share in samples.steps(0, batch_size)] for samples in shard(count, num_workers)]
    assert {len(steps) for steps in lengths} == {-(-count // batch_size)}
    assert min(min(steps) for steps in lengths) >= 1


@shares
def test_the_mean_over_workers_is_the_mean_over_the_samples_of_the_step(count: int, batch_size: int, num_workers: int):
    loss = np.random.default_rng(2).uniform(0, 5, count)
    alone = [loss[share.positions].mean() for share in shard(count, 1)[0].steps(3, batch_size)]
    sums = [
        [(loss[share.positions] * share.weight).sum() for share in samples.steps(3, batch_size)]
        for samples in shard(count, num_workers)
    ]
    np.testing.assert_allclose(np.mean(sums, axis=0), alone)


# Order


def test_the_order_does_not_depend_on_blocks():
    rng, ids = np.random.default_rng(0), ids_of(40)
    one = PhotoSamples(blocks(40), seed=1)
    shuffled = rng.permutation(ids)
    other = PhotoSamples([block(shuffled[:3]), block(shuffled[3:30]), block(shuffled[30:])], seed=1)
    for epoch in (None, 0, 5):
        np.testing.assert_array_equal(one.order(epoch).ids, other.order(epoch).ids)


def test_the_order_differs_between_epochs_and_seeds():
    one, other = PhotoSamples(blocks(40), seed=1), PhotoSamples(blocks(40), seed=2)
    orders = {tuple(order.positions) for order in (one.order(0), one.order(1), other.order(0))}
    assert len(orders) == 3


def test_the_order_of_an_epoch_does_not_depend_on_previous_epochs():
    fresh, used = PhotoSamples(blocks(40), seed=1), PhotoSamples(blocks(40), seed=1)
    for epoch in range(4):
        list(used.steps(epoch, 8))
    np.testing.assert_array_equal(fresh.order(4).positions, used.order(4).positions)


def test_photos_are_read_by_position():
    samples = PhotoSamples(blocks(20, size=6), seed=1)
    indices = np.array([19, 0, 6, 5, 12])
    expected = np.concatenate([item.pixels for item in blocks(20, size=6)])[indices]
    np.testing.assert_array_equal(samples.pixels(indices), expected)


def test_empty_blocks_are_ignored():
    empty = PhotoBlock(np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.uint64))
    samples = PhotoSamples([empty, blocks(5)[0], empty], seed=1)
    assert len(samples) == 5
    np.testing.assert_array_equal(samples.pixels(np.arange(5)), blocks(5)[0].pixels)


# Batches


def inputs_of(count: int, num_workers: int, stage: UnfrozenSettings) -> dict[int, torch.Tensor]:
    """Return the inputs of an epoch by sample id."""
    seen: dict[int, torch.Tensor] = {}
    for train in shard(count, num_workers):
        for batch in PhotoLoader(train, train, AugmentationSettings(), stage, CPU).train(2):
            seen.update(zip(batch.ids.tolist(), batch.inputs, strict=True))
    return seen


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("stage", [PLAIN, CHANGED], ids=["plain", "changed"])
def test_augmentation_does_not_depend_on_the_number_of_workers(stage: UnfrozenSettings, num_workers: int):
    alone, shared = inputs_of(20, 1, stage), inputs_of(20, num_workers, stage)
    assert alone.keys() == shared.keys()
    for i, expected in alone.items():
        torch.testing.assert_close(shared[i], expected, atol=1e-5, rtol=0)


def test_augmentation_does_not_depend_on_the_batch():
    alone = inputs_of(20, 1, PLAIN)
    for i, expected in inputs_of(20, 1, PLAIN.model_copy(update={"batch_size": 20})).items():
        torch.testing.assert_close(alone[i], expected, atol=1e-5, rtol=0)


def test_appearance_differs_between_epochs():
    # All in one step, to compare photos in the order of their ids.
    train, stage = PhotoSamples(blocks(20), seed=1), CHANGED.model_copy(update={"batch_size": 20})
    batches = PhotoLoader(train, train, NOTHING, stage, CPU)
    one, other = (torch.cat([b.inputs[b.ids.argsort()] for b in batches.train(epoch)]) for epoch in (1, 2))
    assert (one != other).flatten(1).any(1).sum() > 10


def test_labels_belong_to_their_photos():
    train = PhotoSamples(blocks(20), seed=1)
    for batch in PhotoLoader(train, train, NOTHING, PLAIN, CPU).train(0):
        for inputs, label in zip(batch.inputs, batch.labels, strict=True):
            distance = [
                (inputs - other).abs().max().item() for other in to_network_input(train.pixels(np.arange(20)), CPU)
            ]
            assert train.labels[int(np.argmin(distance))] == label
            assert min(distance) < 1e-4


def test_validation_photos_are_not_augmented():
    val = PhotoSamples(blocks(6), seed=1)
    (batch,) = PhotoLoader(PhotoSamples(blocks(20), seed=1), val, AugmentationSettings(), PLAIN, CPU).val()
    torch.testing.assert_close(batch.inputs, to_network_input(val.pixels(val.order(None).positions), CPU))


@pytest.mark.parametrize(("micro_batch_size", "sizes"), [(None, [18]), (1, [4, 4, 4, 4, 2])])
def test_validation_batches_are_small_if_forward_passes_are(micro_batch_size: int | None, sizes: list[int]):
    samples, stage = PhotoSamples(blocks(18), seed=1), PLAIN.model_copy(update={"micro_batch_size": micro_batch_size})
    batches = PhotoLoader(samples, samples, AugmentationSettings(), stage, CPU).val()
    assert [len(batch.ids) for batch in batches] == sizes


def test_steps_augmented_in_a_group_equal_single_ones():
    train = PhotoSamples(blocks(20), seed=1)
    batches = PhotoLoader(train, train, AugmentationSettings(), CHANGED, CPU)
    grouped = list(batches._augmented_batches(iter([list(train.steps(1, CHANGED.batch_size))]), 1))
    for one, other in zip(batches.train(1), grouped, strict=True):
        torch.testing.assert_close(other.inputs, one.inputs, atol=1e-5, rtol=0)
        assert other.labels.tolist() == one.labels.tolist()
        assert (other.weight, other.ids.tolist()) == (one.weight, one.ids.tolist())


def test_prefetched_items_are_in_order():
    initialized: list[int] = []
    assert list(prefetch(iter(range(1, 20)), lambda: initialized.append(1))) == list(range(1, 20))
    assert initialized == [1]


def test_errors_while_prefetching_are_raised_at_their_item():
    items = prefetch((12 // i for i in (4, 3, 0, 1)), lambda: None)
    assert [next(items), next(items)] == [3, 4]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_num_steps_includes_the_last_smaller_step():
    train = PhotoSamples(blocks(17), seed=1)
    batches = PhotoLoader(train, train, AugmentationSettings(), PLAIN, CPU)
    assert batches.num_steps == len(list(batches.train(0))) == 3


def test_features_have_their_labels_and_one_view_per_epoch():
    train, val = PhotoSamples(blocks(20), seed=1), PhotoSamples(blocks(6), seed=1)
    # A feature is the pair of its view and its photo.
    features = torch.stack([torch.stack([torch.full((20,), float(view)), torch.arange(20.0)], 1) for view in range(3)])
    batches = FeatureLoader(train, val, (features, torch.zeros((1, 6, 2))), 8, CPU)
    seen = torch.cat([batch.inputs for batch in batches.train(0)])
    labels = torch.cat([batch.labels for batch in batches.train(0)])
    assert sorted(seen[:, 1].tolist()) == list(range(20))
    assert labels.tolist() == [train.labels[int(position)] for position in seen[:, 1]]
    assert set(seen[:, 0].tolist()) == {0.0, 1.0, 2.0}


def test_the_view_depends_on_the_epoch_but_not_on_the_number_of_workers():
    def views(epoch: int, num_workers: int) -> dict[float, float]:
        views_by_photo = {}
        for train in shard(20, num_workers):
            pairs = [torch.stack([torch.full((20,), float(v)), torch.arange(20.0)], 1) for v in range(3)]
            batches = FeatureLoader(train, train, (torch.stack(pairs), torch.zeros((1, 20, 2))), 8, CPU)
            views_by_photo.update({row[1]: row[0] for batch in batches.train(epoch) for row in batch.inputs.tolist()})
        return views_by_photo

    assert views(0, 1) == views(0, 3)
    assert views(0, 1) != views(1, 1)


# Balanced sampling


def rare_class(**share: int) -> PhotoSamples:
    """Return two photos of a class and ten of another, of which an epoch has six each."""
    ids = ids_of(12)
    photos = block(ids)._replace(labels=np.repeat([0, 1], [2, 10]))
    return PhotoSamples([photos], seed=1, balanced=True, **share)


def test_repeated_photos_are_augmented_differently():
    train, stage = rare_class(), PLAIN.model_copy(update={"batch_size": 12})
    (batch,) = PhotoLoader(train, train, AugmentationSettings(), stage, CPU).train(1)
    assert batch.labels.tolist().count(0) == 6
    distances = torch.cdist(batch.inputs.flatten(1), batch.inputs.flatten(1)).fill_diagonal_(1.0)
    assert distances.min() > 1e-3


def test_repeated_photos_have_views_of_their_own():
    train = rare_class()
    pairs = [torch.stack([torch.full((12,), float(view)), torch.arange(12.0)], 1) for view in range(4)]
    batches = FeatureLoader(train, train, (torch.stack(pairs), torch.zeros((1, 12, 2))), 12, CPU).train(1)
    views = [view for batch in batches for view, position in batch.inputs.tolist() if position == 0]
    assert len(views) == 3
    assert len({*views}) > 1


# Views and pixels


def test_the_first_two_views_are_the_photo_and_its_mirror_image():
    photos = to_network_input(blocks(4)[0].pixels, CPU)
    views = [feature_view(photos, view, ids_of(4), 1, AugmentationSettings()) for view in range(3)]
    torch.testing.assert_close(views[0], photos)
    torch.testing.assert_close(views[1], photos.flip(3))
    assert not torch.allclose(views[2], photos)


def test_without_flips_no_view_is_mirrored():
    photos = to_network_input(blocks(4)[0].pixels, CPU)
    torch.testing.assert_close(feature_view(photos, 1, ids_of(4), 1, AugmentationSettings(flip="none")), photos)


def test_network_inputs_are_normalised_photos():
    pixels = blocks(4)[0].pixels
    expected = preprocessing.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    torch.testing.assert_close(to_network_input(pixels, CPU), expected)


def test_decoded_photos_are_squares_of_one_size():
    rng = np.random.default_rng(0)
    images = [photo.encode(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((30, 50), (16, 16), (64, 20))]
    pixels = decode_photos(images, 16)
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(pixels[1], photo.decode(images[1]))
