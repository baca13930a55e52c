"""A finished run as a notebook wants it: `carclass.load_run("results/experiments/exp_002").model(photos)`."""

import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from carclass import storage
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.errors import UserError
from carclass.models import resnet
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import Run, parse_run_settings
from carclass.runs.saved_model import read_model


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in memory."""

    settings: TrainSettings
    lineage: dict[str, Any]  # parent, dataset and code, with their hashes
    metrics: list[dict[str, Any]]  # one per epoch, oldest first
    predictions: pa.Table | None  # of the evaluation on the run's own test photos; None where there was none
    classes: list[str]
    model: nn.Module  # the best of the last stage, in eval mode: uint8 (N,3,S,S) RGB → float32 (N,C) logits


def load_run(uri: str | os.PathLike[str]) -> LoadedRun:
    """A run by its folder or s3:// prefix, `<root>/experiments/<name>`.

    UserError when there is no run, its last stage is not finished, or its weights were changed.
    """
    place = os.fspath(uri).rstrip("/")
    try:
        text = storage.read_bytes(storage.join(place, "config.yml"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{place} is no run: it has no config.yml. Give the place <root>/experiments/<name>."
        ) from error
    settings = parse_run_settings(text)
    # A copied run may lie under another name than the one that its settings say.
    root, folder, name = (place if "://" in place else os.path.abspath(place)).rsplit("/", 2)
    run = Run(root, settings.model_copy(update={"name": name}), folder)
    state, facts = read_model(run.model_uri(run.stages[-1]))
    net = resnet.build(ModelSettings.model_validate(facts["model"]), len(facts["classes"]))
    net.load_state_dict(state)
    return LoadedRun(
        settings=settings,
        lineage=run.lineage(),
        metrics=run.metrics(),
        predictions=_predictions(storage.join(run.uri, "report", "predictions.parquet")),
        classes=facts["classes"],
        model=PhotoClassifier(net),
    )


def _predictions(uri: str) -> pa.Table | None:
    if not storage.exists(uri):
        return None
    with storage.open_file(uri) as file:
        return pq.read_table(file)
