"""Photos in the object store for training."""

import numpy as np
import ray

from carclass.data import dataset
from carclass.training.dataloader import PhotoSamples
from carclass.training.photo_store import open_block, store_split

SIZE = 48


def load_samples(source: dataset.Dataset, size: int | None) -> PhotoSamples:
    blocks = ray.get(store_split(source, "train", size))
    return PhotoSamples([open_block(block, SIZE) for block in blocks], seed=1)


def test_encoded_and_decoded_photos_give_the_same_epochs(ingested: dataset.Dataset):
    encoded, decoded = load_samples(ingested, None), load_samples(ingested, SIZE)
    assert len(encoded) == ingested.manifest["splits"]["train"]
    for encoded_step, decoded_step in zip(encoded.steps(1, 16), decoded.steps(1, 16), strict=True):
        np.testing.assert_array_equal(encoded_step.ids, decoded_step.ids)
        of_encoded, of_decoded = encoded_step.positions, decoded_step.positions
        np.testing.assert_array_equal(encoded.labels[of_encoded], decoded.labels[of_decoded])
        np.testing.assert_array_equal(encoded.pixels(of_encoded), decoded.pixels(of_decoded))
