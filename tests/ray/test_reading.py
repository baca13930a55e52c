"""Photos on their way from a dataset into training."""

import numpy as np
import ray

from carclass import dataset
from carclass.training import stages
from carclass.training.feed import Feed

SIZE = 48


def feed(source: dataset.Dataset, size: int | None) -> Feed:
    held = ray.get(stages.read(source, "train", size))
    return Feed([stages.block_of(block, SIZE) for block in held], seed=1)


def test_photos_that_stay_encoded_give_the_epochs_of_decoded_ones(ingested: dataset.Dataset):
    encoded, decoded = feed(ingested, None), feed(ingested, SIZE)
    assert len(encoded) == ingested.manifest["splits"]["train"]
    for (ours, _), (theirs, _) in zip(encoded.steps(1, 16), decoded.steps(1, 16), strict=True):
        np.testing.assert_array_equal(encoded.ids[ours], decoded.ids[theirs])
        np.testing.assert_array_equal(encoded.labels[ours], decoded.labels[theirs])
        np.testing.assert_array_equal(encoded.pixels(ours), decoded.pixels(theirs))
