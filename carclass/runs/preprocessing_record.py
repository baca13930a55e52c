"""Preprocessing of a run's photos, stored as `<run>/preprocessing.json` when training begins.

It is all that predictions and exports need of the datasets of an evaluated run, so these may be deleted.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.config.section import validate
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.models import architectures, weights
from carclass.runs.run import Run

log = logging.getLogger(__name__)
FILE = "preprocessing.json"
READING = ("min_side", "max_pixels", "max_side", "quality")
"""Settings of `ingest` that determine the stored photo."""

MASKING = ("detector", "choice", "choice_version", "cutout", "quality")
"""Settings of `mask` that determine the masked photo."""


@dataclass(frozen=True)
class Preprocessing:
    """All steps from a photo's file to the input of a run's network, and the classes of its output."""

    reading: dict[str, Any]  # the settings named in READING
    mask: dict[str, Any] | None  # settings in a masked dataset's manifest; None: photos are not masked
    detector_weights: str | None  # their URI when the dataset was masked; None: not recorded
    detector_source_sha256: str | None  # of the file, such as the zoo's, that these weights were converted from
    image_size: int  # photos are resized to squares, antialiased bilinear
    mean: list[float]  # RGB of 0 to 1, subtracted
    std: list[float]
    classes: list[str]

    def ingest_settings(self, photos: str) -> IngestSettings:
        """Return settings that read the photos at a URI in the same way."""
        return validate({"photos": photos, **self.reading}, IngestSettings, source=FILE, base=Path("/"))


def record_preprocessing(run: Run, source: dataset.Dataset) -> None:
    """Store the preprocessing of the dataset that a run is trained on, unless it is stored.

    Warn if it cannot be repeated for new photos: training and evaluation don't need it.
    """
    if storage.exists(storage.join(run.uri, FILE)):
        return
    try:
        store_preprocessing(run, dataset_preprocessing(run, source))
    except storage.StorageError:
        raise
    except UserError as error:
        log.warning("train: run %s will not be able to predict new photos: %s", run.settings.name, error)


def store_preprocessing(run: Run, preprocessing: Preprocessing) -> None:
    """Store a run's preprocessing, unless it is stored."""
    uri = storage.join(run.uri, FILE)
    if not storage.exists(uri):
        origin = {"dataset_digest": run.lineage()["dataset_digest"]}
        formats.write(uri, "preprocessing", {**dataclasses.asdict(preprocessing), **origin})


def load_preprocessing(run: Run) -> Preprocessing:
    """Return the preprocessing stored with a run, or that of its dataset; raise UserError if both are gone."""
    uri = storage.join(run.uri, FILE)
    try:
        stored = formats.read(uri, "preprocessing")
    except FileNotFoundError:
        return dataset_preprocessing(run, training_dataset(run))
    if stored.get("format", 1) == 1:
        facts = run.model_facts(run.best_stage)
        detector = _detector(stored.get("mask"), stored.get("detector_weights"))
        stored |= detector | _network_input(run, facts["classes"])
    if missing := [name for name in READING if name not in stored["reading"]]:
        raise formats.damaged("preprocessing", uri, f"`reading.{missing[0]}` is missing")
    preprocessing = formats.build(Preprocessing, stored, "preprocessing", uri)
    if stored.get("dataset_digest") not in (None, run.lineage()["dataset_digest"]):
        raise formats.damaged("preprocessing", uri, "it is of another dataset than lineage.json (`dataset_digest`)")
    _check_network_input(run, preprocessing, uri)
    return preprocessing


def _check_network_input(run: Run, preprocessing: Preprocessing, uri: str) -> None:
    """Raise DamagedFileError if the record contradicts the models of the run's finished stages."""
    finished = [stage for stage in run.stages if run.is_finished(stage)]
    classes = run.model_facts(finished[-1])["classes"] if finished else preprocessing.classes
    for name, value in _network_input(run, classes).items():
        if getattr(preprocessing, name) != value:
            raise formats.damaged("preprocessing", uri, f"`{name}` is not that of the run's model")


def dataset_preprocessing(run: Run, source: dataset.Dataset) -> Preprocessing:
    """Return the preprocessing of a dataset's photos for a run.

    Raise UserError if the dataset was masked twice, or by an earlier version and its unmasked source is gone.
    """
    reading, mask = source.manifest["settings"], None
    if source.manifest["kind"] == "masked":
        mask = source.manifest["settings"]
        reading = mask.get("source_settings") or _source_settings(run.root, source)
    if reading.get("min_side") is None:
        raise UserError(f"dataset `{source.name}` was masked twice, which prediction and export do not support.")
    return Preprocessing(
        reading={name: reading[name] for name in READING},
        mask=mask,
        **_detector(mask, source.manifest.get("detector_weights")),
        **_network_input(run, source.classes),
    )


def _detector(mask: dict[str, Any] | None, uri: str | None) -> dict[str, Any]:
    return {
        "detector_weights": uri if mask else None,
        "detector_source_sha256": weights.converted_from(uri) if mask and uri else None,
    }


def _network_input(run: Run, classes: list[str]) -> dict[str, Any]:
    scale = architectures.normalisation(run.settings.model.architecture)
    return {
        "image_size": run.settings.model.image_size,
        "mean": [*scale.mean],
        "std": [*scale.std],
        "classes": classes,
    }


def _source_settings(root: str, masked: dataset.Dataset) -> dict[str, Any]:
    """Return the settings of the dataset that another was masked from, by a version that did not record them."""
    source = dataset.load_dataset(root, masked.manifest["settings"]["source"])
    if source.digest != masked.source_digest:
        raise UserError(
            f"dataset `{source.name}` in {root} is not the one that the run's photos were masked from. "
            "Restore that dataset."
        )
    settings: dict[str, Any] = source.manifest["settings"]
    return settings


def masking_difference(run: Run, source: dataset.Dataset) -> str | None:
    """Return in words how a dataset is masked otherwise than a run's photos; None if it is not, or it is not known."""
    try:
        trained = load_preprocessing(run).mask
    except storage.StorageError:
        raise
    except UserError:
        return None
    other = source.manifest["settings"] if source.manifest["kind"] == "masked" else None
    if trained is None or other is None:
        states = ["masked" if mask else "not masked" for mask in (other, trained)]
        return None if trained is other else f"its photos are {states[0]}, those of the run are {states[1]}"
    changed = ", ".join(name for name in MASKING if trained.get(name) != other.get(name))
    return f"its photos are masked with other settings than those of the run ({changed})" if changed else None


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
