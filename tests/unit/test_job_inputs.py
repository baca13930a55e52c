"""Files and variables that a submitted command needs from the machine it is submitted on."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.cluster import job_inputs
from carclass.errors import UserError

REPO = Path(__file__).parents[2]
ROOT = "s3://bucket/carclass"
PIPELINE = ("python", "jobs/pipeline.py", "--config", "my.yml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, without variables of config files."""
    for name in ("CARS196", "CARS196_WEIGHTS", "CARCLASS_ROOT", "CARCLASS_PHOTOS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.csv").write_text("img_name,class,subset\n")
    return tmp_path


def write(folder: Path, name: str = "my.yml", **values: Any) -> None:
    (folder / name).write_text(yaml.safe_dump({"root": ROOT, **values}))


def find(folder: Path, *command: str) -> list[str]:
    """Return the paths of the files that travel."""
    return sorted(job_inputs.find_files(command or PIPELINE, folder))


def test_files_that_a_config_names_travel_with_it(folder: Path):
    write(folder, ingest={"photos": "s3://bucket/photos", "labels": "labels.csv"})
    assert find(folder) == ["labels.csv", "my.yml"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ingest": {"photos": "photos"}}, "`ingest.photos` in my.yml is photos, a path on this machine"),
        ({"ingest": {"photos": "../shared/cars"}}, "`ingest.photos` in my.yml is ../shared/cars"),
        ({"ingest": {"photos": "s3://b/p", "labels": "none.csv"}}, "`ingest.labels` in my.yml is none.csv"),
        ({"root": "results"}, "`root` in my.yml is results"),
        ({"train": {"parent": "weights/r50.safetensors"}}, "`train.parent` in my.yml is weights/r50.safetensors"),
        ({"mask": {"detector": {"weights": "w.pkl"}}}, "`mask.detector.weights` in my.yml is w.pkl"),
    ],
)
def test_a_path_that_the_cluster_would_not_have_is_refused(folder: Path, values: dict[str, Any], text: str):
    write(folder, **values)
    with pytest.raises(UserError, match=f"{text}.*Put it on S3 and give its s3:// URI"):
        find(folder)


def test_a_config_that_is_not_here_is_refused(folder: Path):
    with pytest.raises(UserError, match=r"config file my.yml does not exist in .*. Correct --config"):
        find(folder)


def test_a_config_of_the_code_need_not_be_in_the_working_directory(folder: Path):
    job = ("python", "jobs/tune.py", "--config", "jobs/experiments/searches/both.yml", "--root", ROOT)
    assert find(folder, *job) == []


def test_a_root_on_the_nodes_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder, root="/not/here")
    with caplog.at_level(logging.WARNING):
        find(folder)
    assert "`root` is /not/here: results stay on the nodes" in caplog.text


def test_the_digest_tells_files_and_variables_apart(folder: Path):
    write(folder)
    files = {"my.yml": folder / "my.yml"}
    digests = {job_inputs.digest_inputs(files, values) for values in ({}, {"A": "1"}, {"A": "2"}, {"B": "1"})}
    write(folder, train={"name": "other"})
    assert len(digests | {job_inputs.digest_inputs(files, {})}) == 5


@pytest.mark.parametrize("value", ["sample", "imagenet", "exp_1@best", "s3://bucket/w.safetensors"])
def test_names_and_uris_are_no_paths_of_this_machine(folder: Path, value: str):
    write(folder, train={"parent": value})
    assert find(folder) == ["my.yml"]


def test_all_missing_paths_are_listed_together(folder: Path):
    write(folder, root="results", ingest={"photos": "photos"})
    with pytest.raises(UserError, match=r"(?s)2 problems.*`ingest.photos`.*`root`"):
        find(folder)


@pytest.mark.parametrize(
    "command",
    [
        ("python", "jobs/ingest.py", "--config", "my.yml", "--photos", "s3://b/p", "--root", ROOT),
        ("python", "jobs/pipeline.py", "--config=my.yml", "--ingest.photos=s3://b/p", f"--root={ROOT}"),
        ("carclass", "train", "--config", "my.yml", "--root", ROOT),
        ("python", "-m", "carclass", "evaluate", "--config", "my.yml", "--root", ROOT),
    ],
)
def test_paths_that_options_replace_or_that_the_job_does_not_read_are_not_needed(folder: Path, command: tuple[str]):
    write(folder, root="results", ingest={"photos": "photos"})
    assert find(folder, *command) == ["my.yml"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--root", "results"), "`--root` is results"),
        (("--ingest.photos", "photos/"), "`--ingest.photos` is photos/"),
        (("--train.parent=w.pth",), "`--train.parent` is w.pth"),
    ],
)
def test_a_relative_path_in_an_option_is_refused(folder: Path, options: tuple[str, ...], text: str):
    write(folder)
    with pytest.raises(UserError, match=f"{text}, a path on this machine"):
        find(folder, *PIPELINE, *options)


def test_a_path_that_exists_here_has_to_exist_on_the_nodes_too(folder: Path, caplog: pytest.LogCaptureFixture):
    write(folder, ingest={"photos": str(folder / "photos")})
    with caplog.at_level(logging.WARNING, "carclass"):
        assert find(folder) == ["my.yml"]
    assert f"`ingest.photos` is {folder}/photos: the nodes of the cluster need it at the same path" in caplog.text


def test_the_experiment_of_a_search_travels_and_takes_its_root(folder: Path):
    write(folder, "exp.yml", root="results", ingest={"photos": "photos"}, train={"parent": "imagenet"})
    write(folder, "search.yml", experiment="exp.yml", space={"train.frozen.lr": {"min": 1, "max": 2}})
    assert find(folder, "carclass", "tune", "--config", "search.yml") == ["exp.yml", "search.yml"]


def test_the_experiments_of_a_budget_travel_without_their_roots(folder: Path):
    for name in ("exp_1.yml", "exp_2.yml"):
        write(folder, name, root="results")
    write(folder, "budget.yml", experiments="exp_*.yml")
    command = ("carclass", "lineage", "run", "all", "--budget", "budget.yml")
    assert find(folder, *command) == ["budget.yml", "exp_1.yml", "exp_2.yml"]


@pytest.mark.parametrize("command", [("lineage", "run", "all", "--budget", "tiny"), ("pipeline",)])
def test_the_root_of_an_included_config_is_refused_unless_it_is_given(folder: Path, command: tuple[str, ...]):
    with pytest.raises(UserError, match=r"`root` in (tiny|sample).yml is "):
        find(folder, "carclass", *command)
    assert find(folder, "carclass", *command, "--root", ROOT) == []


def test_the_example_on_real_photos_is_refused_until_its_variables_are_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ("python", "jobs/pipeline.py", "--config", "jobs/experiments/cars196.yml")
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError) as error:
        find(REPO, *command)
    for key in ("root", "ingest.photos", "ingest.labels", "mask.detector.weights", "train.parent"):
        assert f"`{key}` in cars196.yml is " in str(error.value)
    variables = {"CARS196": "s3://b/cars", "CARS196_WEIGHTS": "s3://b/weights", "CARCLASS_ROOT": ROOT}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find(REPO, *command) == ["jobs/experiments/cars196.yml", "jobs/pipeline.py"]
    assert job_inputs.find_variables([]) == dict(sorted(variables.items()))


def test_variables_that_uploaded_configs_name_travel(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "my.yml").write_text("root: ${BUCKET}/results\ningest: {photos: '${PHOTOS:-s3://b/p}'}  # ${OTHER}\n")
    monkeypatch.setenv("BUCKET", "s3://b")
    monkeypatch.setenv("UNRELATED", "secret")
    assert job_inputs.find_variables([folder / "my.yml"]) == {"BUCKET": "s3://b"}


def test_a_variable_that_is_not_set_is_an_error_before_submission(folder: Path):
    (folder / "my.yml").write_text("root: ${NO_SUCH_VARIABLE}/results\n")
    with pytest.raises(UserError, match=r"uses \$\{NO_SUCH_VARIABLE\}, which is not set"):
        find(folder)


def test_a_large_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_inputs, "MAX_FILE_BYTES", 10)
    write(folder)
    with pytest.raises(UserError, match=r"my.yml has \d+ bytes: only code and configs are uploaded. Put it on S3"):
        find(folder)
