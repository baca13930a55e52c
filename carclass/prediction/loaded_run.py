"""A finished run for notebooks: `carclass.load_run("results/experiments/exp_002").predict(["car.jpg"])`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from torchvision.models.resnet import ResNet

from carclass import storage
from carclass.config.schema import StageName, TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.runs.calibration_record import Calibration, read_calibration
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import Preprocessing, load_preprocessing
from carclass.runs.report_record import own_report_uri, read_report_metrics
from carclass.runs.run import Run, read_run_settings
from carclass.runs.saved_model import load_network

if TYPE_CHECKING:
    from carclass.prediction.photo_predictor import PhotoPredictor, PhotoSource


class CheckedClassifier(PhotoClassifier):
    """A PhotoClassifier that refuses other input, such as normalised photos, instead of returning wrong logits."""

    def __init__(self, net: ResNet, image_size: int) -> None:
        super().__init__(net)
        self.image_size = image_size

    def forward(self, photos: Tensor) -> Tensor:
        """Return the logits. Raise UserError for another dtype, shape or range."""
        if not torch.compiler.is_compiling():  # an exported graph has the checks of its format
            self.check(photos)
        return super().forward(photos)

    def check(self, photos: Any) -> None:
        """Raise UserError unless the photos are uint8 (N,3,S,S) with values of 0 to 255."""
        expected = (3, self.image_size, self.image_size)
        if not isinstance(photos, Tensor):
            found = f"an object of type {type(photos).__name__}"
        elif photos.dtype != torch.uint8 or photos.ndim != 4 or photos.shape[1:] != expected:
            found = f"{str(photos.dtype).removeprefix('torch.')} ({','.join(map(str, photos.shape))})"
        elif photos.numel() and photos.max() == 1:
            found = "uint8 with values of at most 1, as of photos scaled to 0 to 1"
        else:
            return
        side = self.image_size
        raise UserError(
            f"`run.model` takes uint8 (N,3,{side},{side}) RGB photos, 0 to 255 and not normalised, but got {found}. "
            "Give it photos that went through `run.preprocessing`, or paths, URIs or PIL images to `run.predict`."
        )


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in memory."""

    settings: TrainSettings
    lineage: dict[str, Any]  # parent, dataset and code, with their hashes
    metrics: list[dict[str, Any]]  # one per epoch, oldest first
    predictions: pa.Table | None  # of the model on the run's test photos; None if it was not evaluated
    classes: list[str]
    model: CheckedClassifier  # best epoch over the stages, in eval mode: uint8 (N,3,S,S) RGB → float32 (N,C) logits
    calibration: Calibration | None  # of the model's probabilities; None if it was not evaluated
    run: Run
    stage: str  # of the model

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Return all steps from a photo's file to the model's input. Raise UserError if they are not known any more."""
        return load_preprocessing(self.run)

    def predict(self, photos: "PhotoSource | Iterable[PhotoSource]") -> pa.Table:
        """Predict photos in this process as jobs/predict.py does: read, mask, resize, classify, calibrate.

        photos: paths, URIs or PIL images, or one of them. Return a row per photo, in order, with the columns of
        jobs/predict.py except `rejected`: `label`, `probability`, `top5`, …, or the `reason` of failure. Raise
        UserError for anything else, if the model is not calibrated, or the detector's weights are lost.
        """
        return self._predictor(photos)

    @cached_property
    def _predictor(self) -> "PhotoPredictor":
        from carclass.prediction.photo_predictor import PhotoPredictor  # late: the detector's library takes seconds

        return PhotoPredictor(self.run, self.run.model_uri(self.stage))


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
    selected = run.select_stage(stage)
    net, facts = load_network(run.model_uri(selected))
    return LoadedRun(
        settings=settings,
        lineage=run.lineage(),
        metrics=run.metrics(),
        predictions=_predictions(run, selected),
        classes=facts["classes"],
        model=CheckedClassifier(net, facts["model"]["image_size"]),
        calibration=read_calibration(run.model_uri(selected), facts["sha256"]),
        run=run,
        stage=selected,
    )


def _predictions(run: Run, stage: StageName) -> pa.Table | None:
    if read_report_metrics(run, stage) is None:
        return None
    return dataset.read_part(storage.join(own_report_uri(run, stage), "predictions.parquet"))
