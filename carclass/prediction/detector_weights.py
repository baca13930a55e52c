"""Masking settings for new photos, with the detector weights that a run's dataset was masked with."""

from pathlib import Path

from carclass import storage
from carclass.config.schema import RENAMED_CHOICES, DetectorSettings, MaskSettings
from carclass.config.section import validate
from carclass.errors import UserError
from carclass.masking import selection
from carclass.models import weights
from carclass.runs.preprocessing_record import Preprocessing
from carclass.runs.run import stored_settings

KEY = "predict.detector_weights"


def mask_settings(preprocessing: Preprocessing, root: str, uri: str | None = None) -> MaskSettings | None:
    """Return settings that mask photos as those of the run's dataset; None if these are not masked.

    root: holds the cache of weights. uri: of the detector's weights, by default the recorded one. Raise UserError if
    the weights, a YAML file that describes the detector, or the selection of vehicles are not those of the dataset.
    """
    if preprocessing.mask is None:
        if uri is not None:
            raise UserError(f"`{KEY}` has no effect: the run's photos are not masked. Leave it out.")
        return None
    from carclass.masking import networks  # imported late: predictions without masks need no Detectron2

    if (version := preprocessing.mask.get("choice_version", 1)) != selection.VERSION:
        raise UserError(
            f"the run's photos were masked with version {version} of `mask.choice`, and this version of carclass has "
            f"{selection.VERSION}, which may choose other vehicles. Use the version of carclass that masked them, or "
            "mask and train again."
        )
    source, detector = "the run's preprocessing.json: `mask`", {**preprocessing.mask["detector"]}
    sha256, architecture = detector.pop("weights"), detector.pop("architecture")
    file = _find_weights(preprocessing, root, uri, sha256)
    detector |= {"weights": file.uri, "weights_sha256": file.sha256}
    settings = stored_settings(detector, DetectorSettings, f"{source}: `detector`")
    if networks.architecture_digest(settings) != architecture:
        raise UserError(
            f"{settings.model} has changed since the run's dataset was masked with it. Restore the former file."
        )
    values = {name: preprocessing.mask[name] for name in ("choice", "cutout", "exclude", "quality")}
    values["choice"] = RENAMED_CHOICES.get(values["choice"], values["choice"])
    return validate({**values, "detector": settings}, MaskSettings, source=source, base=Path("/"))


def _find_weights(preprocessing: Preprocessing, root: str, uri: str | None, sha256: str) -> weights.WeightsFile:
    """Return the first file found that has the recorded hash, or was converted from the file with the recorded one."""
    from carclass.masking import networks

    assert preprocessing.mask is not None
    cache, original = storage.join(root, "weights"), preprocessing.detector_source_sha256
    candidates = [(uri or preprocessing.detector_weights, sha256)]
    if original is not None:
        zoo = networks.ZOO.get(preprocessing.mask["detector"]["model"])
        candidates += [(uri, original)] if uri else [(storage.join(cache, f"{original}.safetensors"), sha256)]
        candidates += [] if uri else [(zoo, original)]
    errors = []
    for place, expected in dict.fromkeys((place, expected) for place, expected in candidates if place is not None):
        try:
            file = weights.cache_weights(place, expected, sample=networks.SAMPLE, cache=cache, key=KEY)
        except UserError as error:
            errors.append(str(error))
        else:
            if expected in (original, file.sha256):
                return file
            errors.append(f"`{KEY}`: {place} has sha256 {file.sha256}, expected {expected}.")
    converted = f", or of the file with sha256 {original} that it was converted from" if original else ""
    raise UserError(
        " ".join([*errors, "The detector's weights, with which the run's photos were masked, were not found."])
        + f" Set `{KEY}` to the URI of the file with sha256 {sha256}{converted}."
    )
