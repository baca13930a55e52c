"""Calibration of a published model, stored beside it as `<stage>/calibration.json`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from carclass import storage
from carclass.data import formats
from carclass.errors import UserError
from carclass.runs.run import Run

FILE = "calibration.json"
MIN_USED_TEMPERATURE = 0.1
"""A fitted temperature below it is near the lower bound of the fit, as the photos do not determine it."""
MAX_STANDARD_ERROR = 0.035
"""Standard error of the val accuracy above which no temperature below 1 is used. The best epoch was chosen on the same
photos, so their accuracy is higher than that of new photos, by about this error, and a temperature below 1 would raise
the confidence of every prediction to it."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, with metrics on the val photos without and with the fitted one; log losses are in nats.

    The temperature is the fitted one if that improves the probabilities, else 1, which leaves them as they are.
    """

    temperature: float
    fitted_temperature: float
    num_photos: int
    log_loss_before: float
    log_loss_after: float
    expected_calibration_error_before: float
    expected_calibration_error_after: float
    model_sha256: str
    coverage: list[dict[str, Any]]
    """Rows of evaluation.metrics.coverage_curve at the temperature; empty in files of former formats."""
    objection: str | None = None
    """Reason why the fitted temperature is not used; None if it is, and in files of former formats."""

    def __repr__(self) -> str:
        return f"Calibration({self.verdict})"

    @property
    def verdict(self) -> str:
        """Return "calibrated: temperature …" or "not calibrated: temperature 1, …", with the reason."""
        return f"{'not ' if self.temperature == 1 else ''}calibrated: temperature {self.text}"

    @property
    def text(self) -> str:
        """Return the temperature in words, with the reason if it is not the fitted one."""
        source = f"from {self.num_photos:,} val photos"
        if self.temperature == self.fitted_temperature:
            return f"{self.temperature:.3f}, {source}"
        reason = self.objection or "it does not improve their probabilities"
        return f"{self.temperature:g}; {self.fitted_temperature:.3f}, fitted {source}, is not used, as {reason}"


def refuse_sharpening(temperature: float, num_photos: int, accuracy: float | None) -> str | None:
    """Return the reason not to use a temperature below 1 that is fitted on too few photos; None for others.

    accuracy: of the val photos; None if it is not known, as in files of former formats.
    """
    # With two more correct and two more wrong photos, as by Agresti and Coull: a perfect accuracy has an error too.
    share = 0.5 if accuracy is None else (accuracy * num_photos + 2) / (num_photos + 4)
    error = math.sqrt(share * (1 - share) / (num_photos + 4))
    if temperature >= 1 or error <= MAX_STANDARD_ERROR:
        return None
    return f"these are too few to raise probabilities (standard error of their accuracy: {error:.3f})"


def read_calibration(model_uri: str, model_sha256: str) -> Calibration | None:
    """Return the calibration of a model; None if there is none, or it belongs to another network.

    model_uri: as of Run.model_uri. Earlier versions stored it in the run's folder, for the last stage, and used
    temperatures below 1 from few photos.
    """
    folder = model_uri.rsplit("/", 1)[0]
    for uri in (storage.join(folder, FILE), storage.join(folder.rsplit("/", 1)[0], FILE)):
        try:
            values = formats.read(uri, "calibration")
        except FileNotFoundError:
            continue
        calibration = formats.build(Calibration, values, "calibration", uri)
        if calibration.model_sha256 == model_sha256:
            accuracy = calibration.coverage[0]["accuracy"] if calibration.coverage else None
            objection = refuse_sharpening(calibration.temperature, calibration.num_photos, accuracy)
            changes: dict[str, Any] = {"temperature": 1.0, "objection": objection, "coverage": []}
            return calibration if objection is None else dataclasses.replace(calibration, **changes)
    return None


def require_calibration(run: Run, model_uri: str, model_sha256: str) -> Calibration:
    """Return the calibration of a run's model. Raise UserError if there is none, or can be none any more."""
    if (calibration := read_calibration(model_uri, model_sha256)) is None:
        from carclass.runs.preprocessing_record import training_dataset  # imported late: it needs PyTorch

        training_dataset(run)  # without it, an evaluation does not calibrate either
        name, stage = run.settings.name, model_uri.rsplit("/", 2)[-2]
        raise UserError(
            f"the model of run `{name}` (stage {stage}) is not calibrated yet, which takes its val photos. Evaluate it "
            f"first: jobs/evaluate.py --config FILE --run {name} --stage {stage}"
        )
    return calibration


def write_calibration(model_uri: str, calibration: Calibration) -> None:
    """Store the calibration of a model."""
    uri = storage.join(model_uri.rsplit("/", 1)[0], FILE)
    formats.write(uri, "calibration", dataclasses.asdict(calibration))
