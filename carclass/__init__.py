"""Fine-grained classification of vehicle photos on a Ray cluster, from a bucket of photos to a report."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carclass.data.loaded_dataset import LoadedDataset
    from carclass.experiments.loaded_comparison import LoadedComparison
    from carclass.prediction.loaded_run import LoadedRun
    from carclass.tuning.loaded_sweep import LoadedSweep

__all__ = ["load_comparison", "load_dataset", "load_run", "load_sweep"]


def load_run(uri: "str | os.PathLike[str]", stage: str | None = None) -> "LoadedRun":
    """Return a finished run by its URI, `<root>/experiments/<name>`: settings, metrics, predictions and model.

    `run.predict(photos)` classifies photos as jobs/predict.py does; `run.model` maps uint8 (N,3,S,S) RGB photos to
    float32 (N,C) logits. The model is the best epoch over the stages, or of the given stage. Raise UserError if there
    is no such run or stage, or it is not finished.
    """
    from carclass.prediction import loaded_run  # late: `import carclass` has to be fast

    return loaded_run.load_run(uri, stage)


def load_dataset(uri: "str | os.PathLike[str]") -> "LoadedDataset":
    """Return a published dataset by its URI, `<root>/datasets/<name>`: counts, photos and quarantine as tables."""
    from carclass.data import loaded_dataset

    return loaded_dataset.load_dataset(uri)


def load_sweep(uri: "str | os.PathLike[str]") -> "LoadedSweep":
    """Return a sweep by its URI, `<root>/sweeps/<name>`: a table of trials, the best settings, findings in words."""
    from carclass.tuning import loaded_sweep

    return loaded_sweep.load_sweep(uri)


def load_comparison(uri: "str | os.PathLike[str]") -> "LoadedComparison":
    """Return the comparison of a tree of experiments by its URI, `<root>/comparison`: a table of runs."""
    from carclass.experiments import loaded_comparison

    return loaded_comparison.load_comparison(uri)
