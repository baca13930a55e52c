"""Preprocessing of a run's training photos, to repeat it for new photos.

It is read from the run's dataset at the first prediction and stored with the run, as datasets may be deleted.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from carclass import storage
from carclass.config.schema import RENAMED_CHOICES, DetectorSettings, IngestSettings, MaskSettings
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.masking import networks
from carclass.models import weights
from carclass.runs.run import Run

FILE = "preprocessing.json"
READING = ("min_side", "max_pixels", "max_side", "quality")
"""Settings of `ingest` that determine the stored photo."""
KEY = "predict.detector_weights"


@dataclass(frozen=True)
class Preprocessing:
    """Ingestion and masking settings of a dataset's photos."""

    reading: dict[str, Any]  # the settings named in READING
    mask: dict[str, Any] | None  # settings in a masked dataset's manifest; None: photos are not masked
    detector_weights: str | None  # their URI when the dataset was masked; None: not recorded

    def ingest_settings(self, photos: str) -> IngestSettings:
        """Return settings that read the photos at a URI in the same way."""
        return IngestSettings.model_validate({"photos": photos, **self.reading})

    def mask_settings(self, root: str, detector_weights: str | None) -> MaskSettings | None:
        """Return settings that mask other photos in the same way; None if photos are not masked.

        detector_weights: another URI of the weights. Raise UserError if the weights, or a YAML file that describes the
        detector, are not those of the dataset.
        """
        if self.mask is None:
            return None
        detector = {**self.mask["detector"]}
        sha256, architecture = detector.pop("weights"), detector.pop("architecture")
        file = self._pin_weights(root, detector_weights or self.detector_weights, sha256)
        settings = DetectorSettings.model_validate({**detector, "weights": file.uri, "weights_sha256": sha256})
        if networks.architecture_digest(settings) != architecture:
            raise UserError(
                f"{settings.model} has changed since the run's dataset was masked with it. Restore the former file."
            )
        values = {name: self.mask[name] for name in ("choice", "cutout", "exclude", "quality")}
        values["choice"] = RENAMED_CHOICES.get(values["choice"], values["choice"])
        return MaskSettings.model_validate({**values, "detector": settings})

    def _pin_weights(self, root: str, uri: str | None, sha256: str) -> weights.WeightsFile:
        """Return the weights with this hash; raise UserError if the URI is None or has other ones."""
        if uri is None:
            raise UserError(
                "the location of the detector's weights was not recorded when the run's dataset was masked. Set "
                f"`{KEY}` to the URI of the file with sha256 {sha256}."
            )
        file = weights.cache_weights(uri, sha256, sample=networks.SAMPLE, cache=storage.join(root, "weights"), key=KEY)
        if file.sha256 != sha256:
            raise UserError(
                f"`{KEY}`: {uri} has sha256 {file.sha256}, but the run's photos were masked with {sha256}. "
                "Set the URI of that file."
            )
        return file


def load_preprocessing(run: Run) -> Preprocessing:
    """Return the preprocessing stored with the run, or store that of its dataset; raise UserError if both are gone."""
    uri = storage.join(run.uri, FILE)
    try:
        return formats.build(Preprocessing, formats.read(uri, "preprocessing"), "preprocessing", uri)
    except FileNotFoundError:
        preprocessing = dataset_preprocessing(run.root, training_dataset(run))
    formats.write(uri, "preprocessing", dataclasses.asdict(preprocessing))
    return preprocessing


def dataset_preprocessing(root: str, source: dataset.Dataset) -> Preprocessing:
    """Return the preprocessing of a dataset's photos.

    Raise UserError if the unmasked dataset is gone, was replaced, or is masked itself.
    """
    mask, weights_uri = None, None
    if source.manifest["kind"] == "masked":
        mask, weights_uri, source_digest = (
            source.manifest["settings"],
            source.manifest.get("detector_weights"),
            source.source_digest,
        )
        source = dataset.load_dataset(root, mask["source"])
        if source.digest != source_digest:
            raise UserError(
                f"dataset `{source.name}` in {root} is not the one that the run's photos were masked from. "
                "Restore that dataset."
            )
    if source.manifest["kind"] != "photos":
        raise UserError(f"dataset `{source.name}` was masked twice, which prediction does not support.")
    reading = {name: source.manifest["settings"][name] for name in READING}
    return Preprocessing(reading, mask, weights_uri)


def training_dataset(run: Run) -> dataset.Dataset:
    """Return the dataset that a run was trained on; raise UserError if it is gone or was replaced."""
    name = run.settings.dataset
    source = dataset.find_dataset(run.root, name)
    if source is None or source.digest != run.lineage()["dataset_digest"]:
        state = "is no longer" if source is None else "has been replaced by another one"
        raise UserError(
            f"dataset `{name}`, which run `{run.settings.name}` was trained on, {state} in {run.root}, and the run has "
            "no stored calibration or preprocessing. Restore the dataset, or train on an existing one."
        )
    return source
