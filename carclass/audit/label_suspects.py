"""Doubtful labels: photos that a classifier, trained without them, puts into another class.

Ranked by cleanlab's confidence-weighted entropy (Kuan and Mueller 2022) of out-of-fold probabilities of a linear
classifier on the frozen backbone's features. A network trained on all layers would have learned the wrong labels too.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np

NUM_FOLDS = 5
INVERSE_REGULARISATION = 0.01
"""Of the linear classifier, on standardised features."""
MAX_ITERATIONS = 30
"""Few, as stopping early regularises too."""
MAX_SHARE = 0.02
"""Largest share of the photos that is reported."""


class Suspect(NamedTuple):
    """A photo whose label is doubtful."""

    photo: int  # index
    likely: int  # index of the class it is put into
    label_probability: float
    likely_probability: float


def out_of_fold_probabilities(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the class probabilities of each photo by a classifier trained on the other folds: float (N,C).

    features: float (N,D). labels: int (N,), each class at least once. groups: int (N,), whose photos share a fold.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # imported late: it takes a second
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probabilities = np.zeros((len(labels), labels.max() + 1))
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=0)
    for train, held_out in folds.split(features, labels, groups):
        head = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model = make_pipeline(StandardScaler(), head).fit(features[train], labels[train])
        probabilities[held_out[:, None], model.classes_] = model.predict_proba(features[held_out])
    return probabilities


def find_suspects(probabilities: np.ndarray, labels: np.ndarray) -> list[Suspect]:
    """Return the photos whose label is less probable than by chance, up to MAX_SHARE of all, the worst first."""
    from cleanlab.rank import get_label_quality_scores

    likely, chance = probabilities.argmax(1), 1 / probabilities.shape[1]
    own, best = (probabilities[np.arange(len(labels)), index] for index in (labels, likely))
    quality = get_label_quality_scores(labels, probabilities, method="confidence_weighted_entropy")
    worst = np.argsort(quality, kind="stable")[: math.ceil(MAX_SHARE * len(labels))]
    return [Suspect(int(i), int(likely[i]), float(own[i]), float(best[i])) for i in worst if own[i] < chance]
