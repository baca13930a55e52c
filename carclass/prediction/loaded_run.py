"""A finished run for notebooks: `carclass.load_run("results/experiments/exp_002").predict(["car.jpg"])`."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from carclass.config.schema import TrainSettings
from carclass.data.results import split_place
from carclass.errors import UserError
from carclass.evaluation import tables
from carclass.models.classifier import Classifier
from carclass.reporting.notebook import facts_html
from carclass.runs.calibration_record import Calibration, read_calibration
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import Preprocessing, load_preprocessing
from carclass.runs.report_record import read_report_metrics, read_report_predictions
from carclass.runs.run import Run, epoch_text, read_run_settings
from carclass.runs.saved_model import load_network

if TYPE_CHECKING:
    import pandas as pd

    from carclass.prediction.photo_predictor import PhotoPredictor, PhotoSource


class CheckedClassifier(PhotoClassifier):
    """A PhotoClassifier that refuses other input, such as normalised photos, instead of returning wrong logits."""

    def __init__(self, net: Classifier, image_size: int) -> None:
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
    evaluation: dict[str, Any] | None  # metrics of `predictions`
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

    def summary(self) -> "pd.Series[Any]":
        """Return the model, its accuracies and its origin by name."""
        import pandas as pd

        return pd.Series(dict(self._facts()), dtype=object, name=self.settings.name)

    def report(self) -> "pd.DataFrame":
        """Return precision, recall, F1 and support of each class on the test photos, and their averages.

        Raise UserError, as the next two do, if the model was not evaluated on them.
        """
        return tables.classification_report(self._evaluated()[0])

    def confusion(self) -> "pd.DataFrame":
        """Return the counts of test photos: a row per true class, a column per predicted one."""
        return tables.confusion_table(self._evaluated()[1], self.classes)

    def mistakes(self, number: int = 20) -> "pd.DataFrame":
        """Return the wrong predictions of test photos, the most confident first: key, label, predicted, confidence."""
        return tables.worst_mistakes(self._evaluated()[1], number)

    def history(self) -> "pd.DataFrame":
        """Return a row per epoch: stage, epoch, losses, accuracies, learning rate, seconds."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def _evaluated(self) -> tuple[dict[str, Any], pa.Table]:
        if self.evaluation is None or self.predictions is None:
            name = self.settings.name
            raise UserError(
                f"the model of run `{name}` (stage {self.stage}) was not evaluated on its test photos. Run "
                f"jobs/evaluate.py --run {name} --stage {self.stage} first."
            )
        return self.evaluation, self.predictions

    def _facts(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of the summary."""
        facts = self.run.model_facts(self.stage)
        yield from (("model", epoch_text(facts)), ("classes", len(self.classes)), ("dataset", self.settings.dataset))
        yield from (("parent", self.settings.parent), ("val accuracy", facts["val_accuracy"]))
        if (metrics := self.evaluation) is not None:
            yield from (("test accuracy", metrics["accuracy"]), ("test photos", metrics["num_photos"]))
            names = {"accuracy_interval": "95 % interval"}
            names |= {"top5_accuracy": "top-5 accuracy"} if len(self.classes) > 5 else {}
            names |= {"expected_calibration_error": "calibration error"}
            yield from ((names[key], metrics[key]) for key in names if key in metrics)

    def __repr__(self) -> str:
        return f"LoadedRun({self.run.uri}, stage {self.stage})"

    def _repr_html_(self) -> str:
        facts = [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in self._facts()]
        return facts_html(f"run {self.settings.name}", [*facts, ("uri", self.run.uri)])

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
    place = split_place(run_uri)
    # A copied run may have another folder name than the one in its settings.
    run = Run(place.root, settings.model_copy(update={"name": place.name}), place.folder)
    selected = run.select_stage(stage)
    net, facts = load_network(run.model_uri(selected))
    evaluation = read_report_metrics(run, selected)
    return LoadedRun(
        settings=settings,
        lineage=run.lineage(),
        metrics=run.metrics(),
        predictions=None if evaluation is None else read_report_predictions(run, selected, evaluation),
        classes=facts["classes"],
        model=CheckedClassifier(net, facts["model"]["image_size"]),
        evaluation=evaluation,
        calibration=read_calibration(run.model_uri(selected), facts["sha256"]),
        run=run,
        stage=selected,
    )
