"""Doubtful labels by out-of-fold probabilities of a linear classifier."""

import numpy as np
import pytest

from carclass.audit.label_suspects import find_suspects, out_of_fold_probabilities

SWAPPED = {3: 2, 41: 0, 77: 2}
"""Photo → its wrong label."""


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Return features of three classes, 40 photos each, with little overlap."""
    random = np.random.default_rng(0)
    centres = np.repeat(random.normal(size=(3, 16)), 40, axis=0)
    return (centres * 2 + random.normal(size=centres.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    labels = np.repeat(np.arange(3), 40)
    labels[list(SWAPPED)] = list(SWAPPED.values())
    return labels


def test_swapped_labels_are_suspects_with_the_right_class(features: np.ndarray, labels: np.ndarray):
    suspects = find_suspects(out_of_fold_probabilities(features, labels, np.arange(120)), labels)
    assert {each.photo: each.likely for each in suspects} == {photo: photo // 40 for photo in SWAPPED}


def test_photos_of_a_group_are_in_one_fold(features: np.ndarray, labels: np.ndarray):
    copied, twice = np.concatenate([features, features]), np.concatenate([labels, labels])
    grouped = out_of_fold_probabilities(copied, twice, np.tile(np.arange(120), 2))
    alone = out_of_fold_probabilities(copied, twice, np.arange(240))
    own = twice[list(SWAPPED)]
    assert grouped[list(SWAPPED), own].max() < alone[list(SWAPPED), own].max()


def test_probabilities_of_a_photo_add_up_to_one(features: np.ndarray, labels: np.ndarray):
    assert out_of_fold_probabilities(features, labels, np.arange(120)).sum(1) == pytest.approx(1)
