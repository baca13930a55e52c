"""Photos on their way from a dataset into training."""

import numpy as np
import ray

from carclass.data import dataset
from carclass.training.dataloader import PhotoSamples
from carclass.training.photo_store import open_block, store_split

SIZE = 48


def feed(source: dataset.Dataset, size: int | None) -> PhotoSamples:
    held = ray.get(store_split(source, "train", size))
    return PhotoSamples([open_block(block, SIZE) for block in held], seed=1)


def test_photos_that_stay_encoded_give_the_epochs_of_decoded_ones(ingested: dataset.Dataset):
    encoded, decoded = feed(ingested, None), feed(ingested, SIZE)
    assert len(encoded) == ingested.manifest["splits"]["train"]
    for (ours, _), (theirs, _) in zip(encoded.steps(1, 16), decoded.steps(1, 16), strict=True):
        np.testing.assert_array_equal(encoded.ids[ours], decoded.ids[theirs])
        np.testing.assert_array_equal(encoded.labels[ours], decoded.labels[theirs])
        np.testing.assert_array_equal(encoded.pixels(ours), decoded.pixels(theirs))
