"""Preprocessing recorded with a run, as new photos get it."""

from pathlib import Path

from carclass.config.schema import DetectorSettings, MaskSettings
from carclass.masking import networks
from carclass.prediction.run_preprocessing import Preprocessing


def test_a_former_choice_in_a_stored_dataset_is_translated(tmp_path: Path):
    detector = networks.pin_weights(DetectorSettings(model="sample", weights="sample"), str(tmp_path))
    stored = MaskSettings(detector=detector).model_dump(mode="json")
    stored["detector"]["weights"] = stored["detector"].pop("weights_sha256")
    stored["detector"]["architecture"] = networks.architecture_digest(detector)
    preprocessing = Preprocessing({}, {**stored, "choice": "surest"}, detector.weights)
    settings = preprocessing.mask_settings(str(tmp_path), None)
    assert settings == MaskSettings(detector=detector, choice="highest_score")
