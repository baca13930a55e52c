"""The jobs' command line: typed overrides, help for every setting, mistakes as one paragraph and status 2."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli
from carclass.config.schema import Config, TrainSettings
from carclass.config.section import section_type
from carclass.errors import UserError

JOBS = Path(__file__).parents[2] / "jobs"
SECTIONS = {
    "ingest": "ingest",
    "mask": "mask",
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "pipeline": None,
}


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yml"
    path.write_text("root: results\nmask: {}\ntrain: {name: first, unfrozen: null}\n")
    return str(path)


def parse(section: str | None, *argv: str) -> Any:
    return cli.parse_job("A job.", section, list(argv))


# Overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("num_workers", "4", 4),
        ("frozen.lr", "3e-5", 3e-5),
        ("frozen.batch_size", "64", 64),
        ("use_gpu", "false", False),
        ("use_gpu", "null", None),
        ("augmentation.flip", "none", "none"),
        ("name", "7", "7"),
        ("name", "on", "on"),
        ("name", "2024-01-01", "2024-01-01"),
        ("parent", "s3://bucket/a.safetensors", "s3://bucket/a.safetensors"),
    ],
)
def test_a_value_typed_by_the_user_gets_the_type_of_its_setting(config_file: str, key: str, text: str, value: object):
    found = parse("train", "--config", config_file, f"--{key}", text).train
    for step in key.split("."):
        found = getattr(found, step)
    assert found == value
    assert type(found) is type(value)


def test_lists_and_mappings_are_written_as_in_the_file(config_file: str):
    given = ("--cutout.fill", "[1, 2, 3]", "--detector.classes", "{3: car}")
    mask = parse("mask", "--config", config_file, *given).mask
    assert (mask.cutout.fill, mask.detector.classes) == ((1, 2, 3), {3: "car"})


def test_what_is_not_given_stays_as_the_file_has_it(config_file: str):
    train = parse("train", "--config", config_file, "--name", "second").train
    assert (train.name, train.unfrozen) == ("second", None)


@pytest.mark.parametrize("place", ["/a/{x", "/a/@x", "/a/b #c", "/a: b"])
def test_a_place_may_hold_the_signs_that_yaml_uses(config_file: str, place: str):
    assert parse("train", "--config", config_file, "--root", place).root == place


def test_a_wrong_value_typed_by_the_user_is_named_by_its_key(config_file: str):
    with pytest.raises(UserError, match=r"`train.num_workers`: .* \(got 'many'\)"):
        parse("train", "--config", config_file, "--num_workers", "many")


def test_a_pipeline_takes_every_section_with_dotted_keys(config_file: str):
    found = parse(None, "--config", config_file, "--train.num_workers", "3", "--mask.batch_size", "2")
    assert (found.train.num_workers, found.mask.batch_size) == (3, 2)


def test_a_pipeline_without_a_file_takes_the_sample(tmp_path: Path):
    found = parse(None, "--root", str(tmp_path))
    assert (found.root, found.ingest.photos) == (str(tmp_path), "sample")


# Mistakes


def test_a_file_without_the_jobs_section_is_refused(config_file: str):
    with pytest.raises(UserError, match=r"config.yml has no `ingest:` section, which this job reads"):
        parse("ingest", "--config", config_file)


def test_an_option_that_is_no_setting_ends_with_status_2(config_file: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("train", "--config", config_file, "--learning_rate", "1")
    assert caught.value.code == 2
    assert "unrecognized arguments: --learning_rate 1" in capsys.readouterr().err


def test_an_option_is_not_guessed_from_its_beginning(config_file: str):
    with pytest.raises(SystemExit):
        parse("train", "--config", config_file, "--num_work", "3")


def test_a_users_mistake_is_one_paragraph_and_status_2(capsys: pytest.CaptureFixture[str]):
    def job() -> None:
        raise UserError("`root`: cannot be written to. Choose another.")

    with pytest.raises(SystemExit) as caught:
        cli.main(job)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: `root`: cannot be written to. Choose another.\n"


def test_our_own_mistake_keeps_its_traceback():
    def job() -> None:
        raise AssertionError("lost a photo")

    with pytest.raises(AssertionError, match="lost a photo"):
        cli.main(job)


def test_a_job_run_with_a_wrong_file_says_so_without_a_traceback(tmp_path: Path):
    command = [sys.executable, str(JOBS / "ingest.py"), "--config", str(tmp_path / "nothing.yml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file")
    assert done.stderr.count("\n") == 1


def test_a_preview_is_no_part_of_a_pipeline():
    command = [sys.executable, str(JOBS / "pipeline.py"), "--mask.preview", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert done.returncode == 2
    assert "`mask.preview` only looks" in done.stderr


# Help


@pytest.mark.parametrize(("job", "section"), SECTIONS.items())
def test_help_shows_the_jobs_page_and_every_setting(job: str, section: str | None, capsys: pytest.CaptureFixture[str]):
    doc = (JOBS / f"{job}.py").read_text().split('"""')[1]
    with pytest.raises(SystemExit) as caught:
        cli.parse_job(doc, section, ["--help"])
    said = capsys.readouterr().out
    kind = Config if section is None else section_type(Config.model_fields[section].annotation)
    assert kind is not None
    assert caught.value.code == 0
    assert doc.strip() in said
    assert all(f"--{key} " in said for key, *_ in cli.list_settings(kind))


def test_every_job_is_covered_here_or_reads_no_section():
    texts = {path.stem: path.read_text() for path in JOBS.glob("*.py")}
    assert {name for name, text in texts.items() if "cli.parse_job(" in text} == set(SECTIONS)


def test_help_gives_defaults_and_says_what_is_required():
    found = {key: default for key, default, _, _ in cli.list_settings(TrainSettings)}
    assert found["name"] == "required"
    assert found["unfrozen.lr"] == 6e-4


def test_an_inherited_explanation_is_found():
    found = {key: text for key, _, _, text in cli.list_settings(TrainSettings)}
    assert found["frozen.batch_size"] == "Photos per step, over all workers together."
