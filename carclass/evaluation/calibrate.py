"""Calibration of a run's model on the val photos of its dataset, once per model."""

import logging
from typing import Any

from carclass.cluster import connection
from carclass.config.schema import EvaluateSettings
from carclass.errors import UserError
from carclass.evaluation import calibration
from carclass.evaluation.classification import predict_split
from carclass.evaluation.collect import to_arrays
from carclass.runs.calibration_record import Calibration, read_calibration, write_calibration
from carclass.runs.preprocessing_record import training_dataset
from carclass.runs.run import Run

log = logging.getLogger(__name__)


def calibrate_run(run: Run, model_uri: str, facts: dict[str, Any], batch_size: int) -> Calibration:
    """Return the calibration of a run's model, fitted on the val photos and stored at the first call.

    Raise UserError if it is not stored and the run's dataset is gone. facts: of the model, see saved_model.
    """
    if (stored := read_calibration(model_uri, facts["sha256"])) is not None:
        return stored
    source = training_dataset(run)
    if not source.manifest["splits"]["val"]:
        raise UserError(
            f"dataset `{source.name}` has no val photos to calibrate run `{run.settings.name}` on. "
            "Choose a run whose dataset has a val split."
        )
    connection.connect({"root": run.uri})
    settings = EvaluateSettings(run=run.settings.name, split="val", batch_size=batch_size)
    table = predict_split(source, settings, model_uri)
    fitted = calibration.fit_calibration(*to_arrays(table, facts["classes"]), facts["sha256"])
    write_calibration(model_uri, fitted)
    log.info("calibration: temperature %s", fitted.text)
    return fitted
