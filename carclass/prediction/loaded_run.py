"""A finished run for notebooks: `carclass.load_run("results/experiments/exp_002").model(photos)`."""

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import nn

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import Run, read_run_settings
from carclass.runs.saved_model import load_network


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in memory."""

    settings: TrainSettings
    lineage: dict[str, Any]  # parent, dataset and code, with their hashes
    metrics: list[dict[str, Any]]  # one per epoch, oldest first
    predictions: pa.Table | None  # on the run's test photos; None if it was not evaluated
    classes: list[str]
    model: nn.Module  # best epoch over the stages, in eval mode: uint8 (N,3,S,S) RGB → float32 (N,C) logits


def load_run(uri: str | os.PathLike[str], stage: str | None = None) -> LoadedRun:
    """Load a run from its folder or s3:// prefix, `<root>/experiments/<name>`.

    stage: the one whose best epoch to load, by default the best epoch over all stages. Raise UserError if there is no
    run or no such stage, the stage is not finished, or its weights are damaged.
    """
    run_uri = os.fspath(uri).rstrip("/")
    try:
        settings = read_run_settings(run_uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run_uri} is not a run: it has no config.yml. Give the folder <root>/experiments/<name>."
        ) from error
    # A copied run may have another folder name than the one in its settings.
    root, folder, name = (run_uri if "://" in run_uri else os.path.abspath(run_uri)).rsplit("/", 2)
    run = Run(root, settings.model_copy(update={"name": name}), folder)
    net, facts = load_network(run.model_uri(run.select_stage(stage)))
    return LoadedRun(
        settings=settings,
        lineage=run.lineage(),
        metrics=run.metrics(),
        predictions=_predictions(storage.join(run.uri, "report", "predictions.parquet")),
        classes=facts["classes"],
        model=PhotoClassifier(net),
    )


def _predictions(uri: str) -> pa.Table | None:
    return dataset.read_part(uri) if storage.exists(uri) else None
