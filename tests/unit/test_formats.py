"""Stored files: former formats are read, newer ones and damaged files are refused with a way out.

format_1/ holds files of a small run and sweep as they were written before files had a format, the settings of an early
run, and files that were added later in their first format. format_2/ holds the second format of settings, a search, a
manifest, preprocessing, calibration and metrics, and the lineage of today. format_3/ holds settings and a search in
their third format, format_4/ in their fourth, format_5/ as of today.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass import storage
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.masking import quality
from carclass.prediction import predictions
from carclass.runs import checkpoint_index, export, preprocessing_record
from carclass.runs.calibration_record import read_calibration
from carclass.runs.report_record import read_report_metrics
from carclass.runs.run import find_run, flatten
from carclass.runs.saved_model import load_network, read_model
from carclass.training import checkpoint
from carclass.tuning import trial_records
from carclass.tuning.collect import collect_sweep
from carclass.tuning.trial_records import load_records

FORMAT_1, FORMAT_2, FORMAT_3, FORMAT_4, FORMAT_5 = (
    Path(__file__).with_name(f"format_{number}") for number in range(1, 6)
)
RUN = "experiments/run"
SHA256 = "81e08061c1c9ef2a3a0e7232a0f853754e7d9e3f1c3b2d32dbe5d6241056d6fb"
READERS: dict[str, Callable[[str], Any]] = {
    "datasets/v2/manifest.json": lambda root: dataset.load_dataset(root, "v2"),
    f"{RUN}/config.yml": lambda root: find_run(root, "run"),
    f"{RUN}/lineage.json": lambda root: find_run(root, "run").lineage(),
    f"{RUN}/unfrozen/best.json": lambda root: find_run(root, "run").best_val_accuracy("unfrozen"),
    f"{RUN}/model.json": lambda root: find_run(root, "run").best_stage,
    f"{RUN}/frozen/epoch-0001/checkpoint.json": lambda root: checkpoint.read_weights(f"{root}/{RUN}/frozen/epoch-0001"),
    f"{RUN}/report/metrics.json": lambda root: read_report_metrics(find_run(root, "run"), "unfrozen"),
    f"{RUN}/export/export.json": lambda root: export._is_current(f"{root}/{RUN}/export", {}),
    f"{RUN}/calibration.json": lambda root: read_calibration(f"{root}/{RUN}/unfrozen/best", SHA256),
    f"{RUN}/preprocessing.json": lambda root: preprocessing_record.load_preprocessing(find_run(root, "run")),
    f"{RUN}/predictions/predictions/settings.json": lambda root: predictions.begin_predictions(
        f"{root}/{RUN}/predictions/predictions",
        json.loads((FORMAT_1 / RUN / "predictions/predictions/settings.json").read_text()),
    ),
    "experiments/budget.json": lambda root: formats.read(f"{root}/experiments/budget.json", "budget"),
    "sweeps/head/search.yml": lambda root: load_records(root, "head"),
    "sweeps/head/trials.json": lambda root: load_records(root, "head"),
}
"""Every stored file of keys and values, and a function that reads it below a root."""
every_file = pytest.mark.parametrize("file", READERS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(FORMAT_1, tmp_path / "root")


def metrics_of(root: Path) -> list[dict[str, Any]]:
    return find_run(str(root), "run").metrics()


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the content of a JSON file; of a YAML file, append the same keys."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content if isinstance(content, dict) else {"format": 2, "trials": content})))
    else:
        path.write_text(path.read_text() + "".join(f"{key}: {value}\n" for key, value in change({}).items()))


# Former formats


@every_file
def test_a_file_without_a_format_is_read(root: Path, file: str):
    assert READERS[file](str(root)) is not None


def test_the_content_of_a_former_run_is_read():
    run = find_run(str(FORMAT_1), "run")
    assert (run.settings.name, run.settings.frozen and run.settings.frozen.lr) == ("run", 2e-3)
    assert [(row["stage"], row["epoch"]) for row in run.metrics()] == [("frozen", 1), ("frozen", 2), ("unfrozen", 1)]
    assert run.steps("frozen", 2)[0]["step"] == 1
    assert run.best_val_accuracy("unfrozen") == pytest.approx(2 / 11)
    assert checkpoint_index.recorded_sha256(f"{FORMAT_1}/{RUN}/frozen/epoch-0001") is not None


def test_a_dataset_of_a_former_format_held_out_val_alone():
    published = dataset.load_dataset(str(FORMAT_2), "v1")
    assert (published.held_out, published.digest[:8]) == ({"val": 0.2}, "727ee3a8")
    assert dataset.find_same_dataset(str(FORMAT_2), "v1", published.manifest["settings"]) == published


def test_settings_that_a_former_run_lacks_have_the_values_it_was_trained_with():
    settings = find_run(str(FORMAT_1), "early").settings
    assert settings.frozen is not None
    assert settings.unfrozen is not None
    assert (settings.frozen.ema_decay, settings.unfrozen.ema_decay, settings.unfrozen.clip_grad_norm) == (None,) * 3
    assert (settings.unfrozen.layer_decay, settings.unfrozen.appearance) == (1.0, False)


@pytest.mark.parametrize("folder", [FORMAT_1, FORMAT_2])
def test_runs_and_sweeps_before_balanced_sampling_drew_every_photo_once(folder: Path):
    assert find_run(str(folder), "run").settings.sampling == "uniform"
    assert load_records(str(folder), "head")[0].base_settings.sampling == "uniform"


def test_the_lineage_of_a_former_run_has_no_environments():
    lineage = find_run(str(FORMAT_1), "run").lineage()
    assert (lineage["code"], lineage["started"], lineage["environments"]) == ("643bc8fcd13c", "unknown", [])


def test_the_present_format_has_every_setting_of_training():
    """A new setting needs a new format, and a value in the migration: that of the runs before it."""
    stored = flatten(yaml.safe_load((FORMAT_5 / RUN / "config.yml").read_text()))
    settings = find_run(str(FORMAT_5), "run").settings
    assert {*stored} == {"format", *flatten(settings.model_dump(mode="json"))}
    assert stored["format"] == formats.KINDS["run_config"].format


def test_a_run_of_the_third_format_has_no_refit():
    assert not find_run(str(FORMAT_3), "run").settings.refit
    assert load_records(str(FORMAT_3), "head")


def test_a_run_of_the_fourth_format_was_trained_on_whole_photos_of_one_size():
    settings = find_run(str(FORMAT_4), "run").settings
    assert (settings.augmentation.crop, settings.train_size) == (None, settings.model.image_size)
    assert load_records(str(FORMAT_4), "head")


def test_the_present_lineage_is_read():
    assert [each["device"] for each in find_run(str(FORMAT_2), "run").lineage()["environments"]] == [
        "CPU",
        "NVIDIA H100 80GB HBM3",
    ]


def test_a_calibration_of_a_former_format_has_no_coverage():
    calibration = read_calibration(f"{FORMAT_2}/{RUN}/unfrozen/best", SHA256)
    assert calibration is not None
    assert calibration.coverage == []


def test_metrics_of_a_former_format_have_no_coverage():
    metrics = formats.read(f"{FORMAT_2}/{RUN}/report/metrics.json", "evaluation")
    assert (metrics["accuracy"], metrics["coverage"]) == (0.0, [])


def test_a_sweep_without_a_setting_of_its_format_is_refused(tmp_path: Path):
    assert load_records(str(FORMAT_5), "head")
    root = shutil.copytree(FORMAT_5, tmp_path / "root")
    file = root / "sweeps" / "head" / "search.yml"
    file.write_text(file.read_text().replace("    views: 3\n", ""))
    with pytest.raises(UserError, match=r"search.yml: `train` lacks the setting `frozen.views`"):
        load_records(str(root), "head")


def test_a_former_run_is_still_on_its_dataset():
    lineage = find_run(str(FORMAT_1), "run").lineage()
    assert dataset.load_dataset(str(FORMAT_1), "v2").digest == lineage["dataset_digest"]


def test_the_trials_of_a_former_sweep_are_read():
    space, records = load_records(str(FORMAT_1), "head")
    assert [(number, trial.state) for number, trial in records.trials.items()] == [(0, "complete"), (1, "complete")]
    assert len(trial_records.recorded_accuracies(space, records.trials[1])) == 3


@pytest.mark.parametrize("kind", formats.KINDS)
def test_a_written_file_has_its_format_first(tmp_path: Path, kind: str):
    uri = f"{tmp_path}/file.json"
    formats.write(uri, kind, {"a": 1})
    assert next(iter(json.loads(Path(uri).read_bytes()).items())) == ("format", formats.KINDS[kind].format)


def test_what_is_written_is_read(tmp_path: Path):
    for file in ("x.json", "x.yml"):
        formats.write(f"{tmp_path}/{file}", "draft", {"settings": {"é": "1e3"}, "mask": None})
        assert formats.read(f"{tmp_path}/{file}", "draft")["settings"] == {"é": "1e3"}


@pytest.mark.slow
def test_a_trial_with_damaged_metrics_is_lost_beside_the_others(root: Path):
    first, _ = (trial.name for trial in load_records(str(root), "head")[1].trials.values())
    (root / "sweeps" / "head" / "trials" / first / "metrics.jsonl").write_text("{\n")
    assert [each.trial.state for each in collect_sweep(str(root), "head").trials] == ["lost", "complete"]


def test_preprocessing_and_calibration_without_a_seal_are_read():
    run = find_run(str(FORMAT_2), "run")
    calibrated = read_calibration(run.model_uri("unfrozen"), SHA256)
    assert calibrated is not None
    assert calibrated.temperature == pytest.approx(16.6, rel=0.01)
    assert preprocessing_record.load_preprocessing(run).mask


# Newer formats


@every_file
def test_a_newer_format_is_refused(root: Path, file: str):
    rewrite(root / file, lambda content: {**content, "format": 99})
    with pytest.raises(UserError, match=r"has format 99 and was written by a newer version of carclass.*Update"):
        READERS[file](str(root))


def test_a_checkpoint_of_a_newer_format_is_not_removed_as_damaged(root: Path):
    stage = root / RUN / "frozen"
    newer = (stage / "epoch-0001").rename(stage / "epoch-0001-00000016")
    shutil.copy(newer / "weights.safetensors", newer / "optimizer.safetensors")
    rewrite(newer / "checkpoint.json", lambda content: {**content, "format": 99})
    with pytest.raises(UserError, match="newer version"):
        checkpoint.newest_valid(str(stage))
    assert (newer / "checkpoint.json").exists()


@pytest.mark.parametrize("number", ["x", 0, -1, None, 1.5])
def test_a_format_that_is_no_number_is_damage(root: Path, number: Any):
    rewrite(root / RUN / "lineage.json", lambda content: {**content, "format": number})
    with pytest.raises(UserError, match=r"lineage.json is damaged: `format` is"):
        find_run(str(root), "run").lineage()


# Damage


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (f"{RUN}/preprocessing.json", "mask", None),
        (f"{RUN}/preprocessing.json", "reading", {"min_side": 16, "max_pixels": 1, "max_side": 80, "quality": 92}),
        (f"{RUN}/preprocessing.json", formats.SEAL, None),
        (f"{RUN}/calibration.json", "temperature", 5.0),
        (f"{RUN}/calibration.json", "model_sha256", "0" * 64),
    ],
)
def test_an_edited_record_that_predictions_depend_on_is_refused(root: Path, file: str, key: str, value: Any):
    kind = Path(file).stem
    content = READERS[file](str(root)).__dict__
    formats.write(f"{root}/{file}", kind, content)
    assert READERS[file](str(root)) is not None
    rewrite(root / file, lambda content: {**content, key: value})
    with pytest.raises(UserError, match=rf"{kind}.json is damaged: its values are not those that were written"):
        READERS[file](str(root))


def test_a_sealed_record_may_be_formatted_anew(root: Path):
    path = root / RUN / "calibration.json"
    formats.write(str(path), "calibration", READERS[f"{RUN}/calibration.json"](str(root)).__dict__)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=7))
    assert READERS[f"{RUN}/calibration.json"](str(root))


@every_file
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "lists", "zeros"])
def test_a_damaged_file_is_named_with_a_way_out(root: Path, file: str, damage: str):
    data = (root / file).read_bytes()
    damaged = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "other": b'{"a": 1}',
        "lists": b"[[1]]",
        "zeros": bytes(len(data)),
    }[damage]
    (root / file).write_bytes(damaged)
    if file.endswith("settings.json") and damage == "other":
        pytest.skip("settings of other predictions")
    with pytest.raises(UserError) as caught:
        READERS[file](str(root))
    assert file.split("/")[-1] in str(caught.value)
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (f"{RUN}/lineage.json", "dataset_digest", 3),
        (f"{RUN}/unfrozen/best.json", "val_accuracy", None),
        (f"{RUN}/unfrozen/best.json", "val_accuracy", "0.5"),
        (f"{RUN}/frozen/epoch-0001/checkpoint.json", "val_accuracies", ["0.5"]),
        (f"{RUN}/frozen/epoch-0001/checkpoint.json", "sha256", {"weights.safetensors": 3}),
        (f"{RUN}/report/metrics.json", "accuracy", True),
        (f"{RUN}/export/export.json", "files", {"model.onnx": "x"}),
        (f"{RUN}/calibration.json", "temperature", "1.5"),
        (f"{RUN}/calibration.json", "num_photos", 11.5),
        (f"{RUN}/preprocessing.json", "mask", []),
        ("sweeps/head/trials.json", "trials", [3]),
        ("sweeps/head/trials.json", "trials", [{"number": "0", "values": {}, "seed": 1}]),
        ("sweeps/head/trials.json", "trials", [{"number": 0, "values": {}, "seed": 1, "state": "asleep"}]),
    ],
)
def test_values_of_another_type_are_refused_in_every_file(root: Path, file: str, key: str, value: Any):
    rewrite(root / file, lambda content: {**content, key: value})
    with pytest.raises(UserError, match=rf"{file.split('/')[-1]} is damaged: `.*(should|must) be"):
        READERS[file](str(root))


@pytest.mark.parametrize(("key", "value"), [("epoch", "1"), ("val_accuracy", "0.5"), ("lr", True), ("stage", None)])
def test_a_line_with_a_value_of_another_type_is_refused(root: Path, key: str, value: Any):
    path = root / RUN / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), key: value}), *others, ""]))
    with pytest.raises(UserError, match=rf"metrics.jsonl is damaged: `{key}` should be"):
        metrics_of(root)


def test_a_manifest_that_says_format_1_is_read_as_one_that_says_nothing(root: Path):
    digest = dataset.load_dataset(str(root), "v2").digest
    rewrite(root / "datasets/v2/manifest.json", lambda content: {**content, "format": 1})
    assert dataset.load_dataset(str(root), "v2").manifest["format"] == 1
    assert dataset.load_dataset(str(root), "v2").digest == digest


@every_file
def test_an_unknown_key_ends_in_no_traceback(root: Path, file: str):
    rewrite(root / file, lambda content: {**content, "surprise": 1})
    if file.endswith(("config.yml", "settings.json", "checkpoint.json")):  # part of their identity
        with pytest.raises(UserError, match=r"surprise|sha256 of state"):
            READERS[file](str(root))
    else:
        assert READERS[file](str(root)) is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"dropout": 0.2', '"dropout": 0.2, "depth": 9', r"best.json: `model`: `depth` is not a setting"),
        ('"stride_in_1x1": false,', "", r"best.json is damaged: `model.stride_in_1x1` is missing"),
    ],
)
def test_a_model_of_another_version_is_refused_with_the_setting(root: Path, old: str, new: str, message: str):
    facts = root / RUN / "unfrozen" / "best.json"
    weights = b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
    facts.with_suffix(".safetensors").write_bytes(weights)
    facts.write_text(facts.read_text().replace(old, new).replace(SHA256, storage.sha256(weights)))
    with pytest.raises(UserError, match=message):
        load_network(find_run(str(root), "run").model_uri("unfrozen"))


def test_a_run_without_readable_model_facts_is_refused(root: Path):
    (root / RUN / "frozen" / "best.json").write_bytes(b"")
    with pytest.raises(UserError, match=r"best.json is damaged: it is empty. Delete the file"):
        read_model(find_run(str(root), "run").model_uri("frozen"))


def test_the_best_epoch_is_found_beside_a_damaged_one(root: Path):
    stage = root / RUN / "frozen"
    shutil.copytree(stage / "epoch-0001", stage / "epoch-0002")
    (stage / "epoch-0002" / "checkpoint.json").write_bytes(b"")
    loaded: dict[str, Any] = {}

    class Module:
        def load_state_dict(self, state: dict[str, Any]) -> None:
            loaded.update(state)

    assert checkpoint.restore_best(str(stage), Module())["epoch"] == 1  # type: ignore[arg-type]
    assert loaded


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"images": [], "annotations": [{}]}'])
def test_a_truth_file_that_is_no_coco_file_is_named(tmp_path: Path, content: str):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(UserError, match=r"`mask.truth`: .*truth.json is not a COCO file"):
        quality.ious(dataset.load_dataset(str(FORMAT_1), "v2"), f"{tmp_path}/truth.json")


@pytest.mark.parametrize("data", [None, b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_table_is_named_with_a_way_out(tmp_path: Path, data: bytes | None):
    if data is not None:
        (tmp_path / "predictions.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"predictions.parquet is missing or damaged .* run the job that wrote it"):
        predictions.read_counts(str(tmp_path))


# Numbers that are not finite


def test_numbers_that_are_not_finite_are_not_written_as_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        formats.to_json({"a": math.nan})


def test_a_checkpoint_in_an_epoch_that_diverged_is_restored(tmp_path: Path):
    state = {"epoch": 0, "val_accuracies": [], "steps": [[math.nan, 1.0, 16.0]], "seconds": 1.0}
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.Snapshot("epoch-0001", {checkpoint_index.WEIGHTS: {}}, state))
    text = (tmp_path / "epoch-0001" / "checkpoint.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["steps"] == [[None, 1.0, 16.0]]
    restored = checkpoint._state("", checkpoint.verify(f"{tmp_path}/epoch-0001"))
    assert math.isnan(restored["steps"][0][0])
