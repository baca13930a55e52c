"""Fine-grained classification of vehicle photos on a Ray cluster, from a bucket of photos to a report."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carclass.prediction.loaded_run import LoadedRun


def load_run(uri: "str | os.PathLike[str]", stage: str | None = None) -> "LoadedRun":
    """Return a finished run by its URI, `<root>/experiments/<name>`: settings, metrics, predictions and model.

    `run.predict(photos)` classifies photos as jobs/predict.py does; `run.model` maps uint8 (N,3,S,S) RGB photos to
    float32 (N,C) logits. The model is the best epoch over the stages, or of the given stage. Raise UserError if there
    is no such run or stage, or it is not finished.
    """
    from carclass.prediction import loaded_run  # late: `import carclass` has to be fast

    return loaded_run.load_run(uri, stage)
