"""Settings: errors name the key, paths do not depend on the working directory, every setting is explained."""

from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli, yaml_file
from carclass.config.budget import Baseline, Budget
from carclass.config.reference import render_reference
from carclass.config.schema import Config, FrozenSettings, IngestSettings, MaskSettings, TrainSettings
from carclass.config.search import Range, Search
from carclass.config.section import CommandLineText, Section, Setting, list_settings, validate
from carclass.data.dataset import to_json
from carclass.errors import UserError

REPO = Path(__file__).parents[2]
EXPERIMENTS = sorted((REPO / "jobs" / "experiments").glob("*.yml"))
BASE = Path("/base")


def config_of(**values: Any) -> Any:
    return validate({"root": "results", **values}, Config, source="test.yml", base=BASE)


def write_config(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


# Keys


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_setting():
    with pytest.raises(UserError, match=r"`mask.detector.weigths` is not a setting; did you mean `weights`\?"):
        config_of(mask={"detector": {"weigths": "zoo"}})


def test_an_unknown_key_in_an_optional_section_is_named_too():
    with pytest.raises(UserError, match=r"`train.unfrozen.epoch` is not a setting; did you mean `epochs`\?"):
        config_of(train={"name": "x", "unfrozen": {"epoch": 3}})


def test_an_unknown_key_without_a_close_match_lists_the_known_settings():
    with pytest.raises(UserError, match=r"`mask.cutout.zzz` is not a setting; known here: mode, fill, margin"):
        config_of(mask={"cutout": {"zzz": 1}})


def test_the_error_names_the_source_and_every_wrong_key_at_once():
    with pytest.raises(UserError) as caught:
        config_of(ingest={"photos": "p", "quality": 3}, train={"name": "x", "nmae": "y"})
    assert str(caught.value).startswith("test.yml: ")
    assert "`ingest.quality`" in str(caught.value)
    assert "`train.nmae`" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choice": "surest"}, "`mask.choice`: `surest` was renamed to `highest_score`"),
        ({"preview": 40}, "test.yml: `mask.preview` is now a flag of jobs/mask.py: --preview 40"),
    ],
)
def test_a_former_name_is_refused_with_the_new_one(values: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        config_of(mask=values)
    assert message in str(caught.value)


def test_the_steps_between_checkpoints_are_now_seconds():
    with pytest.raises(UserError, match=r"`train.checkpoint_steps` is now `checkpoint_seconds`"):
        config_of(train={"name": "x", "checkpoint_steps": 100})


def test_a_setting_of_a_deeper_section_is_suggested():
    with pytest.raises(UserError, match=r"`train.lr` is not a setting; did you mean `frozen.lr` or `unfrozen.lr`\?"):
        config_of(train={"name": "x", "lr": 1e-3})


@pytest.mark.parametrize("masks", [{"preview": 40}, {"cutout": {"marign": 0}}])
def test_an_unknown_key_in_a_list_of_sections_is_named(masks: dict[str, Any]):
    values = {"root": "r", "experiments": "e", "masks": [{}, masks]}
    with pytest.raises(UserError, match=r"`masks\.1\.(preview` is now a flag|cutout\.marign` is .* mean `margin`)"):
        validate(values, Budget, source="test.yml", base=BASE)


def test_a_missing_required_setting_is_named():
    with pytest.raises(UserError, match=r"`train.name` is missing"):
        config_of(train={})


# Values


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"root": 3}, "root"),
        ({"train": 3}, "train"),
        ({"ingest": {"photos": "p", "num_classes": 1}}, "ingest.num_classes"),
        ({"ingest": {"photos": "p", "num_classes": "many"}}, "ingest.num_classes"),
        ({"ingest": {"photos": "p", "val_fraction": 1.2}}, "ingest.val_fraction"),
        ({"ingest": {"photos": "p", "val_fraction": float("nan")}}, "ingest.val_fraction"),
        ({"ingest": {"photos": "p", "val_fraction": 1}}, "ingest.val_fraction"),
        ({"ingest": {"photos": "p", "test_fraction": 1.0}}, "ingest.test_fraction"),
        ({"ingest": {"photos": "p", "part_rows": 2.5}}, "ingest.part_rows"),
        ({"ingest": {"photos": "p", "dataset": "a/b"}}, "ingest.dataset"),
        ({"mask": {"cutout": {"mode": "blur"}}}, "mask.cutout.mode"),
        ({"mask": {"cutout": {"fill": [1, 2, "x"]}}}, "mask.cutout.fill.2"),
        ({"mask": {"detector": {"weights_sha256": "abc"}}}, "mask.detector.weights_sha256"),
        ({"train": {"name": ".."}}, "train.name"),
        ({"train": {"name": "x", "seed": -1}}, "train.seed"),
        ({"train": {"name": "x", "num_workers": 0}}, "train.num_workers"),
        ({"train": {"name": "x", "num_workers": 2.5}}, "train.num_workers"),
        ({"train": {"name": "x", "num_workers": True}}, "train.num_workers"),
        ({"train": {"name": "x", "num_workers": [4, 1]}}, "train.num_workers"),
        ({"train": {"name": "x", "num_workers": [1, 2, 3]}}, "train.num_workers"),
        ({"train": {"name": "x", "checkpoint_seconds": -1}}, "train.checkpoint_seconds"),
        ({"train": {"name": "x", "frozen": {"lr": 0}}}, "train.frozen.lr"),
        ({"train": {"name": "x", "unfrozen": {"optimizer": "lion"}}}, "train.unfrozen.optimizer"),
        ({"evaluate": {"split": "train"}}, "evaluate.split"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_by_its_key(values: dict[str, Any], key: str):
    with pytest.raises(UserError, match=f"`{key}`: "):
        config_of(**values)


def test_the_error_repeats_the_value():
    with pytest.raises(UserError, match=r"`train.num_workers`: .*greater than or equal to 1 \(got 0\)"):
        config_of(train={"name": "x", "num_workers": 0})


@pytest.mark.parametrize(("value", "workers"), [(4, (4, 4)), ([1, 4], (1, 4)), ([2, 2], (2, 2))])
def test_workers_are_one_number_or_a_range(value: Any, workers: tuple[int, int]):
    assert config_of(train={"name": "x", "num_workers": value}).train.workers == workers


def test_a_range_of_workers_survives_the_runs_config_file():
    settings = TrainSettings(name="x", num_workers=(1, 4))
    assert TrainSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_a_run_without_any_stage_is_refused():
    with pytest.raises(UserError, match=r"`frozen` and `unfrozen` are both null"):
        config_of(train={"name": "x", "frozen": None, "unfrozen": None})


def test_one_stage_may_be_left_out():
    assert config_of(train={"name": "x", "unfrozen": None}).train.unfrozen is None


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        config_of().root = "elsewhere"


# Paths


def test_a_path_that_is_not_utf_8_is_refused():
    with pytest.raises(UserError, match="`photos`: is not UTF-8; rename"):
        validate({"photos": "/data/caf\udce9"}, IngestSettings, source="here", base=Path("/"))


def test_a_relative_path_in_a_file_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    path = write_config(tmp_path, "root: ../results\ningest: {photos: ./photos}")
    config: Any = cli.load_config(path, {}, Config)
    assert config.root == str(tmp_path.parent / "results")
    assert config.ingest.photos == str(tmp_path / "photos")


def test_a_relative_path_on_the_command_line_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.load_config(write_config(tmp_path, "root: r"), {"root": "mine"}, Config).root == str(
        tmp_path / "elsewhere/mine"
    )


def test_the_home_directory_is_resolved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert config_of(root="~/results").root == "/home/someone/results"


def test_uris_and_absolute_paths_are_unchanged():
    config = config_of(root="s3://bucket/out", ingest={"photos": "/data/photos"})
    assert (config.root, config.ingest.photos) == ("s3://bucket/out", "/data/photos")


def test_names_of_weights_and_the_sample_are_not_paths():
    config = config_of(ingest={"photos": "sample"}, train={"name": "x", "parent": "imagenet"})
    assert (config.ingest.photos, config.train.parent) == ("sample", "imagenet")


def test_a_root_called_sample_is_a_path():
    assert config_of(root="sample").root == "/base/sample"


@pytest.mark.parametrize("root", ["s3:/bucket/out", "s3://", "s3:///out"])
def test_a_mistyped_s3_uri_is_not_a_local_folder(root: str):
    with pytest.raises(UserError, match=r"`root`: an S3 URI is written s3://bucket/prefix"):
        config_of(root=root)


def test_a_validated_command_line_path_is_a_plain_string():
    assert type(config_of(root=CommandLineText("x")).root) is str


# Files and the environment


def test_environment_variables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLACE", "s3://bucket")
    assert yaml_file.read(write_config(tmp_path, "root: ${PLACE}/out")) == {"root": "s3://bucket/out"}


@pytest.mark.parametrize("value", [None, ""])
def test_an_unset_or_empty_variable_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None):
    monkeypatch.delenv("PLACE", raising=False)
    if value is not None:
        monkeypatch.setenv("PLACE", value)
    assert yaml_file.read(write_config(tmp_path, "root: ${PLACE:-../out}/x")) == {"root": "../out/x"}


def test_a_set_variable_takes_precedence_over_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLACE", "here")
    assert yaml_file.read(write_config(tmp_path, "root: ${PLACE:-there}")) == {"root": "here"}


def test_an_unset_variable_without_default_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MISSING_VARIABLE", raising=False)
    with pytest.raises(UserError, match=r"\$\{MISSING_VARIABLE\}, which is not set. Run `export MISSING_VARIABLE"):
        yaml_file.read(write_config(tmp_path, "root: ${MISSING_VARIABLE}"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"config file .*nothing.yml: No such file"):
        yaml_file.read(tmp_path / "nothing.yml")


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not valid YAML"):
        yaml_file.read(write_config(tmp_path, "root: [unclosed"))


def test_a_binary_file_is_refused(tmp_path: Path):
    (tmp_path / "weights.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        yaml_file.read(tmp_path / "weights.yml")


@pytest.mark.parametrize("text", ["", "# nothing", "- a list", "a word"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="holds no settings"):
        yaml_file.read(write_config(tmp_path, text))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_file_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CARCLASS_ROOT", "CARCLASS_PHOTOS", "CARS196", "CARS196_WEIGHTS"):
        monkeypatch.setenv(name, "/somewhere")
    assert cli.load_config(path, {}, Config).root == "/somewhere"


# Identity: the settings as a dataset's manifest has them


def serialise(settings: Section) -> bytes:
    return to_json(settings.model_dump(mode="json"))


def test_serialised_settings_do_not_depend_on_the_order_of_the_keys():
    first = MaskSettings.model_validate(
        {"source": "a", "detector": {"short_side": 320, "classes": {2: "car", 7: "truck"}}}
    )
    second = MaskSettings.model_validate(
        {"detector": {"classes": {7: "truck", 2: "car"}, "short_side": 320}, "source": "a"}
    )
    assert serialise(first) == serialise(second)


def test_an_explicit_default_does_not_change_serialised_settings():
    assert serialise(TrainSettings(name="x")) == serialise(TrainSettings(name="x", num_workers=1))


def test_serialised_settings_do_not_depend_on_the_spelling_of_a_number():
    spelled = config_of(train={"name": "x", "frozen": {"lr": "2e-3"}})
    assert serialise(spelled) == serialise(config_of(train={"name": "x"}))


def test_a_nested_setting_changes_serialised_settings():
    changed = TrainSettings(name="x", frozen=FrozenSettings(lr=3e-3))
    assert serialise(TrainSettings(name="x")) != serialise(changed)


# Explanations


def test_every_setting_is_explained_in_a_sentence():
    settings = [setting for kind in (Config, Search, Range, Budget, Baseline) for setting in list_settings(kind)]
    explanations = {setting.key: setting.explanation for setting in settings}
    assert {key: text for key, text in explanations.items() if len(text.split()) < 3 or text[-1] != "."} == {}


def test_the_reference_is_current():
    assert (REPO / "docs" / "configuration.md").read_text(encoding="utf-8") == render_reference(), "run `make docs`"


def test_the_reference_has_every_setting_and_no_former_one():
    page = render_reference()
    keys = [setting.key for name in ("ingest", "mask", "train", "evaluate", "predict") for setting in settings_of(name)]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert "preview" not in page
    assert "surest" not in page


def settings_of(name: str) -> list[Setting]:
    prefix = f"{name}."
    settings = [setting for setting in list_settings(Config) if setting.key.startswith(prefix)]
    return [setting._replace(key=setting.key.removeprefix(prefix)) for setting in settings]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"name": "x"}}, "`root` is missing"),
        ({"root": "r", "train": {}}, "`train.name` is missing"),
        ({"root": ""}, "`root`: is empty; give a path or URI"),
        (
            {"root": "r", "mask": {"detector": None}},
            "`mask.detector`: must be a section of settings (key: value) (got null)",
        ),
        ({"root": "r", "train": {"name": "x" * 201}}, "`train.name`: a name has up to 200 letters a-z or A-Z"),
        (
            {"root": "r", "train": {"name": "my run"}},
            "`train.name`: a name has up to 200 letters a-z or A-Z, digits and .",
        ),
        (
            {"root": "r", "mask": {"cutout": {"fill": "1,2"}}},
            "`mask.cutout.fill`: must be a list, such as [1, 2] (got '1,2')",
        ),
    ],
)
def test_errors_speak_of_yaml_not_of_python(tmp_path: Path, values: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        validate(values, Config, source="my.yml", base=tmp_path)
    assert message in str(caught.value)
