"""Preprocessing recorded with a run, as new photos get it."""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from carclass.config.schema import DetectorSettings, MaskSettings, TrainSettings
from carclass.data import dataset, formats, publishing
from carclass.errors import UserError
from carclass.masking import networks
from carclass.models import preprocessing, weights
from carclass.prediction.detector_weights import mask_settings
from carclass.runs.preprocessing_record import (
    FILE,
    Preprocessing,
    dataset_preprocessing,
    load_preprocessing,
    masking_difference,
    record_preprocessing,
)
from carclass.runs.run import Run, begin_run, find_run
from tests.helpers import runs

READING = {"min_side": 16, "max_pixels": 1000, "max_side": 640, "quality": 90}
FORMAT_1 = Path(__file__).with_name("format_1")


def recorded(detector: DetectorSettings, **changes: Any) -> Preprocessing:
    """Return the preprocessing of photos that were masked with pinned weights."""
    mask = MaskSettings(detector=detector).model_dump(mode="json")
    mask["detector"]["weights"] = mask["detector"].pop("weights_sha256")
    mask["detector"]["architecture"] = networks.architecture_digest(detector)
    values = {"detector_source_sha256": weights.converted_from(detector.weights), "image_size": 64, "classes": ["a"]}
    statistics = {"mean": [*preprocessing.IMAGENET.mean], "std": [*preprocessing.IMAGENET.std]}
    return Preprocessing(READING, {**mask, **changes}, detector.weights, **values, **statistics)  # type: ignore[arg-type]


def test_a_former_choice_in_a_stored_dataset_is_translated(tmp_path: Path):
    detector = networks.pin_weights(DetectorSettings(model="sample", weights="sample"), str(tmp_path))
    settings = mask_settings(recorded(detector, choice="surest"), str(tmp_path))
    assert settings == MaskSettings(detector=detector, choice="highest_score")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nms": 0.5}, r"preprocessing.json: `mask`: `detector`: `nms` is not a setting.*another version of carclass"),
        ({"precision": None}, r"preprocessing.json: `mask`: `detector` lacks the setting `precision`"),
    ],
)
def test_detector_settings_of_another_version_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    pinned = recorded(networks.pin_weights(DetectorSettings(model="sample", weights="sample"), str(tmp_path)))
    assert pinned.mask is not None
    detector = {key: value for key, value in {**pinned.mask["detector"], **change}.items() if value is not None}
    changed = dataclasses.replace(pinned, mask={**pinned.mask, "detector": detector})
    with pytest.raises(UserError, match=message):
        mask_settings(changed, str(tmp_path))


# The record


def publish(root: Path, **manifest: Any) -> tuple[Run, dataset.Dataset]:
    """Return a run, begun by the first call, and its dataset, both unfinished, with the manifest's settings."""
    counts = {"inputs": 0, "rows": 0, "quarantined": 0, "splits": {}, "reasons": {}}
    facts = {"classes": ["a", "b"], **counts, "parts": []}
    source = dataset.Dataset(dataset.dataset_uri(str(root), "v2"), {**facts, **manifest})
    run = Run(str(root), TrainSettings(name="first", model=runs.MODEL))  # type: ignore[arg-type]
    return run if Path(run.uri).exists() else begin_run(run, source, "0" * 64), source


def test_the_record_has_all_steps_up_to_the_networks_input(tmp_path: Path):
    run, source = publish(tmp_path, kind="photos", settings=READING)
    record_preprocessing(run, source)
    stored = formats.read(f"{run.uri}/{FILE}", "preprocessing")
    assert len(stored.pop("record_sha256")) == 64
    assert stored == {
        "format": 4, "dataset_digest": source.digest,
        "reading": READING, "mask": None, "detector_weights": None, "detector_source_sha256": None,
        "image_size": 32, "classes": ["a", "b"],
        **{name: [*values] for name, values in preprocessing.IMAGENET._asdict().items()},
    }  # fmt: skip


def test_a_masked_dataset_is_recorded_without_its_source(tmp_path: Path):
    mask = {"source": "v1", "source_settings": READING, "detector": {"weights": "f" * 64}}
    uri = f"s3://bucket/weights/{'e' * 64}.safetensors"
    run, source = publish(tmp_path, kind="masked", settings=mask, detector_weights=uri)
    record_preprocessing(run, source)
    stored = load_preprocessing(run)
    assert (stored.reading, stored.mask) == (READING, mask)
    assert (stored.detector_weights, stored.detector_source_sha256) == (uri, "e" * 64)


def test_a_record_is_never_overwritten(tmp_path: Path):
    run, source = publish(tmp_path, kind="photos", settings=READING)
    record_preprocessing(run, source)
    record_preprocessing(run, publish(tmp_path, kind="photos", settings={**READING, "quality": 50})[1])
    assert load_preprocessing(run).reading == READING


@pytest.mark.parametrize(
    ("mask", "cause"),
    [
        ({"source": "v1", "source_settings": {**READING, "min_side": None}}, "masked twice"),
        ({"source": "v1"}, "no dataset `v1`"),
    ],
)
def test_training_goes_on_with_a_warning_if_no_record_is_possible(
    tmp_path: Path, mask: dict[str, Any], cause: str, caplog: pytest.LogCaptureFixture
):
    run, source = publish(tmp_path, kind="masked", settings=mask, source_digest="0" * 64)
    record_preprocessing(run, source)
    assert cause in caplog.text
    assert not Path(run.uri, FILE).exists()


def test_a_record_of_a_former_format_gets_the_networks_input(tmp_path: Path):
    shutil.copytree(FORMAT_1 / "experiments", tmp_path / "experiments")
    stored = load_preprocessing(find_run(str(tmp_path), "run"))
    assert (stored.image_size, stored.mean, len(stored.classes)) == (64, [*preprocessing.IMAGENET.mean], 10)
    assert (stored.detector_weights, stored.detector_source_sha256) == ("sample", None)


@pytest.mark.parametrize("key", ["mask", "classes", "detector_weights", "reading", "reading.max_side"])
def test_a_record_that_lacks_a_key_is_damaged(tmp_path: Path, key: str):
    run, source = publish(tmp_path, kind="photos", settings=READING)
    record_preprocessing(run, source)
    path = Path(run.uri, FILE)
    stored = {**json.loads(path.read_text()), "format": 2}  # without a seal
    _ = stored["reading"].pop("max_side") if key == "reading.max_side" else stored.pop(key)
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"preprocessing.json is damaged: .*{key.split('.')[-1]}.* Delete the file"):
        load_preprocessing(run)


@pytest.mark.parametrize(
    ("key", "value"), [("classes", ["b", "a"]), ("image_size", 96), ("mean", [0.0, 0.0, 0.0]), ("std", [1.0, 1.0, 1.0])]
)
def test_a_record_that_contradicts_the_model_is_damaged(tmp_path: Path, key: str, value: Any):
    root = shutil.copytree(FORMAT_1, tmp_path / "root")
    run = find_run(str(root), "run")
    path = Path(run.uri, FILE)
    stored = {**json.loads(path.read_text()), **dataclasses.asdict(load_preprocessing(run)), "format": 2}
    path.write_text(json.dumps({**stored, key: value}))
    with pytest.raises(UserError, match=rf"preprocessing.json is damaged: `{key}` is not that of the run's model"):
        load_preprocessing(run)


def test_an_unknown_setting_of_reading_is_named(tmp_path: Path):
    run, source = publish(tmp_path, kind="photos", settings=READING)
    stored = dataclasses.replace(dataset_preprocessing(run, source), reading={**READING, "gamma": 2})
    with pytest.raises(UserError, match=r"preprocessing.json: .*gamma"):
        stored.ingest_settings("s3://bucket/photos")


def test_a_run_without_a_record_gets_that_of_its_dataset(tmp_path: Path):
    run, source = publish(tmp_path, kind="photos", settings=READING, splits={})
    begin_run(run, publishing.publish_manifest(source), "0" * 64)
    assert load_preprocessing(run).reading == READING
    shutil.rmtree(source.uri)
    with pytest.raises(UserError, match="dataset `v2`, which run `first` was trained on, is no longer in"):
        load_preprocessing(run)


# Other datasets

MASK = {"source": "v1", "source_settings": READING, "detector": {"weights": "f" * 64}, "choice": "largest"}


@pytest.mark.parametrize(
    ("trained", "other", "difference"),
    [
        (
            {"kind": "masked", "settings": MASK},
            {"kind": "photos", "settings": READING},
            "are not masked, those .*masked",
        ),
        (
            {"kind": "photos", "settings": READING},
            {"kind": "masked", "settings": MASK},
            "are masked, those .* not masked",
        ),
        ({"kind": "masked", "settings": MASK}, {"kind": "masked", "settings": {**MASK, "choice": "central"}}, "choice"),
    ],
)
def test_a_dataset_that_is_masked_otherwise_is_described(
    tmp_path: Path, trained: dict[str, Any], other: dict[str, Any], difference: str
):
    run, source = publish(tmp_path, **trained)
    record_preprocessing(run, source)
    assert re.search(difference, masking_difference(run, publish(tmp_path, **other)[1]) or "")
    assert masking_difference(run, source) is None


def test_a_selection_of_the_same_photos_is_masked_alike(tmp_path: Path):
    run, source = publish(tmp_path, kind="masked", settings=MASK)
    record_preprocessing(run, source)
    selected = {**MASK, "limit": 5, "exclude": {"no_vehicle": True}}
    assert masking_difference(run, publish(tmp_path, kind="masked", settings=selected)[1]) is None


# The detector's weights


@pytest.fixture
def zoo(tmp_path: Path) -> tuple[Path, str]:
    """Return a pickle of the sample detector's weights, as the zoo has them, and its sha256."""
    state, _ = weights.load_weights("sample", None, sample=networks.SAMPLE, key="")
    path = tmp_path / "zoo" / "model.pkl"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps({"model": {name: tensor.numpy() for name, tensor in state.items()}}))
    return path, weights.storage.sha256(path.read_bytes())


@pytest.fixture
def pinned(tmp_path: Path, zoo: tuple[Path, str]) -> Preprocessing:
    """Return the preprocessing of photos that were masked with the zoo's weights, converted below `root`."""
    detector = DetectorSettings(model="sample", weights=str(zoo[0]), weights_sha256=zoo[1])
    return recorded(networks.pin_weights(detector, str(tmp_path / "root")))


def test_the_hash_of_the_file_that_weights_were_converted_from_is_recorded(
    pinned: Preprocessing, zoo: tuple[Path, str]
):
    assert pinned.detector_source_sha256 == zoo[1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, b"damaged"])
def test_the_zoos_own_file_replaces_a_lost_or_damaged_converted_one(
    tmp_path: Path, pinned: Preprocessing, zoo: tuple[Path, str], damage: bytes | None
):
    assert pinned.detector_weights is not None
    converted = Path(pinned.detector_weights)
    expected = mask_settings(pinned, str(tmp_path / "root"))
    converted.unlink() if damage is None else converted.write_bytes(damage)
    assert mask_settings(pinned, str(tmp_path / "root"), str(zoo[0])) == expected


def test_the_zoos_file_is_fetched_again_by_its_hash(
    tmp_path: Path, pinned: Preprocessing, zoo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(networks.ZOO, "sample", str(zoo[0].rename(zoo[0].with_name("model_final_f10217.pkl"))))
    shutil.rmtree(tmp_path / "root" / "weights")
    assert mask_settings(pinned, str(tmp_path / "root")) is not None


def test_a_copied_root_uses_its_own_converted_weights(tmp_path: Path, pinned: Preprocessing, zoo: tuple[Path, str]):
    (tmp_path / "root").rename(tmp_path / "moved")
    zoo[0].unlink()
    settings = mask_settings(pinned, str(tmp_path / "moved"))
    assert settings is not None
    assert settings.detector.weights == f"{tmp_path}/moved/weights/{zoo[1]}.safetensors"


def test_lost_weights_are_named_with_both_hashes(tmp_path: Path, pinned: Preprocessing, zoo: tuple[Path, str]):
    shutil.rmtree(tmp_path / "root" / "weights")
    assert pinned.mask is not None
    digests = rf"sha256 {pinned.mask['detector']['weights']}, or of the file with sha256 {zoo[1]}"
    with pytest.raises(UserError, match=rf"Set `predict.detector_weights` to the URI of the file with {digests}"):
        mask_settings(pinned, str(tmp_path / "root"))


def test_other_weights_are_refused(tmp_path: Path, pinned: Preprocessing):
    other = tmp_path / "other.pkl"
    other.write_bytes(pickle.dumps({"model": {}}))
    shutil.rmtree(tmp_path / "root" / "weights")
    with pytest.raises(UserError, match=r"has sha256 .*, expected"):
        mask_settings(pinned, str(tmp_path / "root"), str(other))


def test_weights_for_photos_that_are_not_masked_are_refused(tmp_path: Path, pinned: Preprocessing):
    unmasked = dataclasses.replace(pinned, mask=None)
    assert mask_settings(unmasked, str(tmp_path)) is None
    with pytest.raises(UserError, match=r"`predict.detector_weights` has no effect"):
        mask_settings(unmasked, str(tmp_path), "sample")


def test_the_weights_of_unrecorded_origin_must_be_named(tmp_path: Path, pinned: Preprocessing):
    unknown = dataclasses.replace(pinned, detector_weights=None, detector_source_sha256=None)
    with pytest.raises(UserError, match=r"were not found. Set `predict.detector_weights` to the URI of the file"):
        mask_settings(unknown, str(tmp_path / "root"))
