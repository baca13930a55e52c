"""Balanced sampling: each class equally often, its photos in turn, for any number of workers and after a restart."""

from collections import Counter

import numpy as np
import pytest

from carclass.training.sample_order import SampleOrder

COUNTS = [(1, 9, 50), (7, 7, 7), (2, 3), (5,), (1, 1000), (3, 0, 8)]
counts_of_classes = pytest.mark.parametrize("counts", COUNTS, ids=str)


def balanced(counts: tuple[int, ...], **share: int) -> SampleOrder:
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = np.random.default_rng(5).integers(0, 2**63, len(labels), np.uint64)
    return SampleOrder(ids, labels, **{"seed": 1, "balanced": True, **share})


def drawn(samples: SampleOrder, epochs: range) -> list[int]:
    """Return the positions of all draws of some epochs, in order."""
    return [int(position) for epoch in epochs for position in samples.order(epoch).positions]


@counts_of_classes
def test_an_epoch_has_equally_many_photos_of_each_class(counts: tuple[int, ...]):
    samples = balanced(counts)
    by_class = Counter(samples.labels[samples.order(1).positions].tolist())
    num_classes = sum(count > 0 for count in counts)
    assert by_class == dict.fromkeys(np.flatnonzero(counts).tolist(), -(-sum(counts) // num_classes))


@counts_of_classes
@pytest.mark.parametrize("num_epochs", [1, 2, 5])
def test_no_photo_is_drawn_again_before_all_others_of_its_class(counts: tuple[int, ...], num_epochs: int):
    samples = balanced(counts)
    times = np.bincount(drawn(samples, range(1, num_epochs + 1)), minlength=len(samples))
    for label in np.unique(samples.labels):
        of_class = times[samples.labels == label]
        assert of_class.max() - of_class.min() <= 1


def test_the_photos_of_a_frequent_class_differ_between_epochs():
    samples = balanced((2, 20))  # 11 of each class in an epoch: all but the last of 20 in two
    frequent = [[i for i in samples.order(epoch).positions if i >= 2] for epoch in (1, 2)]
    assert len({*frequent[0]} | {*frequent[1]}) == 20


def test_draws_of_a_photo_have_random_numbers_of_their_own():
    order = balanced((1, 9, 50)).order(3)
    assert len({*order.ids.tolist()}) == len(order.ids)


def test_epochs_and_seeds_have_other_orders():
    one, other = balanced((3, 9)), balanced((3, 9), seed=2)
    orders = {tuple(order.positions) for order in (one.order(1), one.order(2), other.order(1))}
    assert len(orders) == 3


def test_the_order_does_not_depend_on_the_order_of_rows():
    samples, turned = balanced((3, 9)), balanced((3, 9))
    turned.ids, turned.labels = samples.ids[::-1], samples.labels[::-1]
    for epoch in (1, 2):
        np.testing.assert_array_equal(samples.order(epoch).ids, turned.order(epoch).ids)


@counts_of_classes
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_shares_of_all_workers_are_the_draws_of_an_epoch(counts: tuple[int, ...], num_workers: int):
    shares = [
        share
        for rank in range(num_workers)
        for share in balanced(counts, rank=rank, num_workers=num_workers).steps(2, 4)
        if share.weight
    ]
    assert sorted(i for share in shares for i in share.ids) == sorted(balanced(counts).order(2).ids)


@counts_of_classes
def test_the_number_of_steps_is_known_in_advance(counts: tuple[int, ...]):
    samples = balanced(counts)
    assert len(list(samples.steps(1, 4))) == samples.num_steps(4)


def test_a_resumed_epoch_goes_on_at_the_next_draw():
    whole, resumed = list(balanced((1, 9, 50)).steps(2, 8)), list(balanced((1, 9, 50)).steps(2, 8, start=24))
    assert [share.ids.tolist() for share in resumed] == [share.ids.tolist() for share in whole[3:]]


def test_validation_has_every_photo_once():
    samples = balanced((1, 9, 50))
    assert sorted(samples.order(None).positions) == list(range(60))
