"""What was done to the photos that a run was trained on, so that new ones come to its network in the same way.

It's taken from the run's dataset at the first prediction and kept with the run, as datasets may be deleted.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from carclass import storage
from carclass.config.schema import DetectorSettings, IngestSettings, MaskSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.masking import networks
from carclass.models import weights
from carclass.runs.run import Run

FILE = "preprocessing.json"
READING = ("min_side", "max_pixels", "max_side", "quality")
"""Settings of ingest that decide what is stored of a photo."""
KEY = "predict.detector_weights"


@dataclass(frozen=True)
class Preprocessing:
    """How a dataset's photos were made."""

    reading: dict[str, Any]  # the settings named in READING
    mask: dict[str, Any] | None  # settings as a masked dataset's manifest has them; None: photos are not masked
    detector_weights: str | None  # where they were when the dataset was masked, if it is known

    def ingest(self, photos: str) -> IngestSettings:
        """Settings that read other photos in the same way."""
        return IngestSettings.model_validate({"photos": photos, **self.reading})

    def masking(self, root: str, detector_weights: str | None) -> MaskSettings | None:
        """Settings that mask other photos in the same way; None where nothing is masked.

        detector_weights: another place of the weights. UserError when they, or a YAML file that describes the
        detector, are not those of the dataset.
        """
        if self.mask is None:
            return None
        known = {**self.mask["detector"]}
        sha256, architecture = known.pop("weights"), known.pop("architecture")
        uri = detector_weights or self.detector_weights
        if uri is None:
            raise UserError(
                "the run's dataset was masked before it was recorded where the detector's weights are. Set "
                f"`{KEY}` to the URI of the file with sha256 {sha256}."
            )
        there = weights.fetch(uri, sha256, sample=networks.SAMPLE, cache=storage.join(root, "weights"), key=KEY)
        if there.sha256 != sha256:
            raise UserError(
                f"`{KEY}`: {uri} has sha256 {there.sha256}, the run's photos were masked with {sha256}. "
                "Give the URI of that file."
            )
        detector = DetectorSettings.model_validate({**known, "weights": there.uri, "weights_sha256": sha256})
        if networks.architecture_digest(detector) != architecture:
            raise UserError(
                f"{detector.model} describes another detector than when the run's dataset was masked. Bring that "
                "file back as it was."
            )
        same = {name: self.mask[name] for name in ("choice", "cutout", "exclude", "quality")}
        return MaskSettings.model_validate({**same, "detector": detector})


def run_preprocessing(run: Run) -> Preprocessing:
    """That of a run, as it was kept or from its dataset; UserError where neither is there."""
    uri = storage.join(run.uri, FILE)
    try:
        return Preprocessing(**json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        found = dataset_preprocessing(run.root, training_dataset(run))
    storage.write_bytes(uri, json.dumps(dataclasses.asdict(found), indent=1).encode())
    return found


def dataset_preprocessing(root: str, source: dataset.Dataset) -> Preprocessing:
    """That of a dataset; UserError when the one it was masked from is gone or is masked itself."""
    mask, where = None, None
    if source.manifest["kind"] == "masked":
        mask, where = source.manifest["settings"], source.manifest.get("detector_weights")
        source = dataset.load_dataset(root, mask["source"])
        if source.digest != mask["source_digest"]:
            raise UserError(
                f"dataset `{source.name}` in {root} is not the one that the run's photos were masked from. "
                "Bring that one back."
            )
    if source.manifest["kind"] != "photos":
        raise UserError(f"dataset `{source.name}` was masked twice, which predictions don't repeat.")
    reading = {name: source.manifest["settings"][name] for name in READING}
    return Preprocessing(reading, mask, where)


def training_dataset(run: Run) -> dataset.Dataset:
    """The dataset that a run was trained on; UserError when it's gone, or another one has its name."""
    name = run.settings.dataset
    found = dataset.find_dataset(run.root, name)
    if found is None or found.digest != run.lineage()["dataset_digest"]:
        what = "is no longer" if found is None else "has been replaced by another one"
        raise UserError(
            f"dataset `{name}`, which run `{run.settings.name}` was trained on, {what} in {run.root}, and the run "
            "was not calibrated while it was there. Bring the dataset back, or train on one that is there."
        )
    return found
