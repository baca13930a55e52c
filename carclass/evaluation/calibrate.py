"""Calibration of a run's model on the val photos of its dataset, once per model."""

import dataclasses
import logging
from typing import Any

import numpy as np
import pyarrow as pa

from carclass.config.schema import EvaluateSettings
from carclass.data.dataset import Dataset
from carclass.errors import UserError
from carclass.evaluation import calibration
from carclass.evaluation.classification import predict_split
from carclass.evaluation.collect import to_arrays
from carclass.runs.calibration_record import Calibration, read_calibration, write_calibration
from carclass.runs.preprocessing_record import training_dataset
from carclass.runs.run import REFIT, Run
from carclass.storage import StorageError

log = logging.getLogger(__name__)


def calibrate_run(run: Run, model_uri: str, facts: dict[str, Any], batch_size: int) -> Calibration:
    """Return the calibration of a run's model, fitted on the val photos and stored at the first call.

    Raise UserError if it is not stored and the run's dataset is gone. facts: of the model, see saved_model.
    """
    if (chosen := _chosen_model(run, facts)) is not None:
        return _copy(model_uri, facts, calibrate_run(run, *chosen, batch_size))
    stored = read_calibration(model_uri, facts["sha256"])
    return stored or _fit(run, training_dataset(run), model_uri, facts, batch_size)


def calibrate_if_possible(run: Run, model_uri: str, facts: dict[str, Any], batch_size: int) -> Calibration | None:
    """Return the calibration of a run's model; None, with a warning, if it is not stored and the dataset is gone.

    facts: of the model, see saved_model.
    """
    if (chosen := _chosen_model(run, facts)) is not None:
        found = calibrate_if_possible(run, *chosen, batch_size)
        return None if found is None else _copy(model_uri, facts, found)
    if (stored := read_calibration(model_uri, facts["sha256"])) is not None:
        return stored
    try:
        source = training_dataset(run)
    except StorageError:
        raise
    except UserError as error:
        log.warning("evaluate: probabilities are not calibrated: %s", error)
        return None
    return _fit(run, source, model_uri, facts, batch_size)


def _chosen_model(run: Run, facts: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return URI and facts of the model that was chosen on val before a refit, which has seen the val photos.

    None for other models.
    """
    if facts["stage"] != REFIT:
        return None
    return run.model_uri(run.best_stage), run.model_facts(run.best_stage)


def _copy(model_uri: str, facts: dict[str, Any], calibrated: Calibration) -> Calibration:
    """Store the calibration of the chosen model as that of the refit, unless it is stored, and return it."""
    stored = read_calibration(model_uri, facts["sha256"])
    if stored is None:
        stored = dataclasses.replace(calibrated, model_sha256=facts["sha256"])
        write_calibration(model_uri, stored)
    return stored


def calibrate_predictions(predictions: pa.Table, temperature: float) -> pa.Table:
    """Return predictions of predict_split with calibrated probabilities and confidences."""
    raw = np.stack(predictions["probabilities"].to_numpy())
    probabilities = calibration.apply_temperature(raw, temperature).astype(np.float32)
    columns = {"confidence": pa.array(probabilities.max(1)), "probabilities": pa.array([*probabilities])}
    for name, values in columns.items():
        predictions = predictions.set_column(predictions.schema.get_field_index(name), name, values)
    return predictions


def _fit(run: Run, source: Dataset, model_uri: str, facts: dict[str, Any], batch_size: int) -> Calibration:
    """Fit and store the calibration of a model on the val photos of its run's dataset."""
    settings = EvaluateSettings(run=run.settings.name, split="val", batch_size=batch_size)
    table = predict_split(source, settings, model_uri, run.settings.use_gpu)
    fitted = calibration.fit_calibration(*to_arrays(table, facts["classes"]), facts["sha256"])
    write_calibration(model_uri, fitted)
    log.info("calibration: temperature %s", fitted.text)
    return fitted
