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
    for (encoded_step, _), (decoded_step, _) in zip(encoded.steps(1, 16), decoded.steps(1, 16), strict=True):
        np.testing.assert_array_equal(encoded.ids[encoded_step], decoded.ids[decoded_step])
        np.testing.assert_array_equal(encoded.labels[encoded_step], decoded.labels[decoded_step])
        np.testing.assert_array_equal(encoded.pixels(encoded_step), decoded.pixels(decoded_step))
