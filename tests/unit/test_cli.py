"""Command line of the jobs: typed overrides, help for every setting, mistakes as one paragraph and exit status 2."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli
from carclass.config.schema import Config, TrainSettings
from carclass.config.search import Search
from carclass.config.section import list_settings, section_type
from carclass.errors import UserError

JOBS = Path(__file__).parents[2] / "jobs"
SAMPLE = JOBS / "experiments" / "sample.yml"
SECTIONS = {
    "audit": "audit",
    "ingest": "ingest",
    "mask": "mask",
    "train": "train",
    "evaluate": "evaluate",
    "predict": "predict",
    "pipeline": None,
}
HEAVY = (
    "torch", "torchvision", "ray", "pyarrow", "pandas", "numpy", "scipy", "detectron2", "boto3", "onnx", "jinja2",
    "optuna", "PIL", "sklearn", "matplotlib",
)  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yml"
    path.write_text("root: results\nmask: {}\ntrain: {name: first, unfrozen: null}\n")
    return str(path)


def parse(section: str | None, *argv: str, default: Path | None = None) -> Any:
    return cli.parse_job("A job.", section, list(argv), default=default)


def run_job(*argv: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(JOBS / argv[0]), *argv[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)


# Overrides


def parse_listed(*argv: str) -> Any:
    return cli.parse_job_with_flags("A job.", "predict", {}, list(argv), listed="photos")


@pytest.mark.parametrize(
    "order",
    [
        ["a.jpg", "b.jpg", "--config", "FILE", "--run", "first"],
        ["--config", "FILE", "a.jpg", "b.jpg", "--run", "first"],
        ["--run", "first", "--config", "FILE", "a.jpg", "b.jpg"],
        ["a.jpg", "--config", "FILE", "--run", "first", "b.jpg"],
        ["--config=FILE", "--run", "first", "--", "a.jpg", "b.jpg"],
    ],
)
def test_photos_are_given_without_an_option_in_any_place(config_file: str, order: list[str]):
    config, args = parse_listed(*(argument.replace("FILE", config_file) for argument in order))
    assert args.listed == ["a.jpg", "b.jpg"]
    assert (config.predict.photos, config.predict.run) == (str(Path.cwd() / "a.jpg"), "first")


def test_without_such_photos_the_setting_counts(config_file: str):
    config, args = parse_listed("--config", config_file, "--photos", "new")
    assert (args.listed, config.predict.photos) == ([], str(Path.cwd() / "new"))


def test_photos_that_are_given_with_and_without_the_option_are_refused(config_file: str):
    with pytest.raises(UserError, match=r"`--photos` is given, and a\.jpg without it"):
        parse_listed("a.jpg", "--config", config_file, "--photos", "new")


def test_a_job_without_a_list_refuses_arguments_without_options(config_file: str):
    with pytest.raises(UserError, match=r"unrecognized arguments: a\.jpg"):
        parse("evaluate", "a.jpg", "--config", config_file)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("num_workers", "4", 4),
        ("frozen.lr", "3e-5", 3e-5),
        ("frozen.batch_size", "64", 64),
        ("use_gpu", "false", False),
        ("use_gpu", "null", None),
        ("use_gpu", "Null", None),
        ("unfrozen", "null", None),
        ("unfrozen", "NULL", None),
        ("augmentation.flip", "none", "none"),
        ("name", "7", "7"),
        ("name", "on", "on"),
        ("name", "2024-01-01", "2024-01-01"),
        ("parent", "s3://bucket/a.safetensors", "s3://bucket/a.safetensors"),
    ],
)
def test_a_command_line_value_gets_the_type_of_its_setting(config_file: str, key: str, text: str, value: object):
    parsed = parse("train", "--config", config_file, f"--{key}", text).train
    for step in key.split("."):
        parsed = getattr(parsed, step)
    assert parsed == value
    assert type(parsed) is type(value)


def test_lists_and_mappings_are_written_as_in_the_file(config_file: str):
    argv = ("--cutout.fill", "[1, 2, 3]", "--detector.classes", "{3: car}")
    mask = parse("mask", "--config", config_file, *argv).mask
    assert (mask.cutout.fill, mask.detector.classes) == ((1, 2, 3), {3: "car"})


def test_settings_without_an_option_keep_the_files_values(config_file: str):
    train = parse("train", "--config", config_file, "--name", "second").train
    assert (train.name, train.unfrozen) == ("second", None)


@pytest.mark.parametrize("root", ["/a/{x", "/a/@x", "/a/b #c", "/a: b"])
def test_a_path_may_contain_yaml_syntax(config_file: str, root: str):
    assert parse("train", "--config", config_file, "--root", root).root == root


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("train", ["--num_workers", "many"], r"^`--num_workers`: give one number, .* \(got 'many'\)$"),
        ("train", ["--frozen.lr", "-1"], r"^`--frozen.lr`: must be greater than 0 \(got '-1'\)$"),
        ("predict", ["--photos", "p", "--threshold", "60"], r"^`--threshold`: must be from 0 to 1 \(got '60'\)$"),
        (None, ["--train.name", "a b"], r"^`--train.name`: a name has .* \(got 'a b'\)$"),
        (None, ["--root", "s3:x"], r"^`--root`: an S3 URI is written s3://bucket/prefix \(got 's3:x'\)$"),
        ("train", ["--loggers", "[csvs]"], r"^`--loggers`: `0`: .*'csvs'"),
    ],
)
def test_a_wrong_value_of_the_command_line_is_named_by_its_option(
    config_file: str, section: str | None, options: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        parse(section, "--config", config_file, *options)


def test_a_mistake_in_the_file_is_told_apart_from_one_of_the_command_line(tmp_path: Path):
    path = tmp_path / "my.yml"
    path.write_text("root: r\ntrain: {name: a, seed: x}\n")
    with pytest.raises(UserError, match=r"^`--num_workers`: .*; \S*my\.yml: `train\.seed`: must be an integer"):
        parse("train", "--config", str(path), "--num_workers", "many")


def test_an_option_without_effect_is_named(tmp_path: Path):
    path = tmp_path / "my.yml"
    path.write_text("root: r\ningest: {photos: p}\n")
    with pytest.raises(UserError, match=r"my\.yml: `ingest`: `columns` has no effect: .* \(given: --columns\)$"):
        parse("ingest", "--config", str(path), "--columns", "{name: file}")


def test_photos_without_an_option_are_named_as_such(config_file: str):
    with pytest.raises(UserError, match=r"^`PHOTOS`: an S3 URI is written"):
        cli.parse_job_with_flags("", "predict", {}, ["s3:x", "--config", config_file], listed="photos")


def test_a_pipeline_accepts_all_sections_with_dotted_keys(config_file: str):
    config = parse(None, "--config", config_file, "--train.num_workers", "3", "--mask.batch_size", "2")
    assert (config.train.num_workers, config.mask.batch_size) == (3, 2)


def test_a_pipeline_without_a_file_takes_the_sample(tmp_path: Path):
    config = parse(None, "--root", str(tmp_path), default=SAMPLE)
    assert (config.root, config.ingest.photos) == (str(tmp_path), "sample")


def test_a_job_without_a_default_file_requires_one():
    with pytest.raises(UserError, match="required: --config"):
        parse("train", "--name", "x")


def test_flags_are_returned_apart_from_the_settings(config_file: str):
    flags = {"preview": {"type": int}}
    config, args = cli.parse_job_with_flags("A job.", "mask", flags, ["--config", config_file, "--preview", "3"])
    assert args.preview == 3
    assert config.mask == parse("mask", "--config", config_file).mask


# Mistakes


def test_a_command_without_photos_asks_for_them(config_file: str):
    with pytest.raises(
        UserError, match=r"no photos are given. Name them on the command line, or in .* by a `predict:`"
    ):
        cli.parse_job_with_flags("", "predict", {}, ["--config", config_file], listed="photos")


def test_a_file_without_the_jobs_section_is_refused(config_file: str):
    with pytest.raises(UserError, match=r"config.yml has no `ingest:` section, which this job reads"):
        parse("ingest", "--config", config_file)


@pytest.mark.parametrize(
    ("section", "option", "suggestion"),
    [
        ("train", "--unfrozen.lrr", "did you mean `--unfrozen.lr`?"),
        ("train", "--unfrozen.lrr=3", "did you mean `--unfrozen.lr`?"),
        ("train", "--train.frozen.lr", "did you mean `--frozen.lr`?"),
        ("train", "--train.lr", "did you mean `--frozen.lr` or `--unfrozen.lr`?"),
        ("train", "--model", "did you mean `--model.architecture` or `--model.dropout` or `--model.image_size`?"),
        (None, "--train.lr", "did you mean `--train.frozen.lr` or `--train.unfrozen.lr`?"),
        ("train", "--epochs", "did you mean `--frozen.epochs` or `--unfrozen.epochs`?"),
        ("train", "--lr", "did you mean `--frozen.lr` or `--unfrozen.lr`?"),
        ("train", "--confg", "did you mean `--config`?"),
        ("train", "--num_work", "did you mean `--num_workers`?"),  # abbreviations are not accepted
        (None, "--unfrozen.lr", "did you mean `--train.unfrozen.lr`?"),
        ("train", "--zzz", "see `"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_ones(section: str | None, option: str, suggestion: str):
    name = option.split("=")[0]
    with pytest.raises(UserError, match=rf"^`{name}` is not an option of .*; {re.escape(suggestion)}"):
        parse(section, option, "3")


@pytest.mark.parametrize(
    ("section", "arguments", "suggestion"),
    [
        (None, ["my.yml"], "did you mean `--config my.yml`?"),
        ("train", ["my.yaml"], "did you mean `--config my.yaml`?"),
        ("train", ["--config", "my.yml", "frozen.epochs=5"], "did you mean `--frozen.epochs 5`?"),
        ("train", ["--config", "my.yml", "train.frozen.epochs=5"], "did you mean `--frozen.epochs 5`?"),
        ("evaluate", ["--config", "my.yml", "first"], "did you mean `--run first`?"),
        (None, ["epochs=5"], "did you mean `--train.frozen.epochs 5` or `--train.unfrozen.epochs 5`?"),
        ("train", ["--config", "my.yml", "x"], "see `"),
    ],
)
def test_a_value_without_its_option_is_named_with_the_one_that_was_meant(
    section: str | None, arguments: list[str], suggestion: str
):
    with pytest.raises(UserError, match=rf"; {re.escape(suggestion)}"):
        parse(section, *arguments, default=SAMPLE if section is None else None)


def test_a_config_file_among_photos_is_named_with_its_option():
    with pytest.raises(UserError, match=r"required: --config; did you mean `--config my.yml`\?"):
        parse_listed("car.jpg", "my.yml")


def test_an_option_after_two_dashes_belongs_to_the_command():
    parser = cli.JobParser("A job.")
    parser.add_argument("command", nargs="*")
    assert parser.parse(["--", "python", "--anything"]).command == ["python", "--anything"]


def test_a_user_error_is_one_paragraph_with_status_2(capsys: pytest.CaptureFixture[str]):
    def job() -> None:
        raise UserError("`root`: cannot be written to. Choose another.")

    with pytest.raises(SystemExit) as caught:
        cli.main(job)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: `root`: cannot be written to. Choose another.\n"


def test_names_in_an_error_do_not_control_the_terminal(capsys: pytest.CaptureFixture[str]):
    def job() -> None:
        raise UserError("Citro\udceb\x1b[2Jn.jpg: bad")

    with pytest.raises(SystemExit):
        cli.main(job)
    assert capsys.readouterr().err == "error: Citro\\udceb\\x1b[2Jn.jpg: bad\n"


def test_an_interrupted_job_says_that_it_can_be_resumed(capsys: pytest.CaptureFixture[str]):
    def job() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.main(job)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes\n"


def test_a_programming_error_keeps_its_traceback():
    def job() -> None:
        raise AssertionError("lost a photo")

    with pytest.raises(AssertionError, match="lost a photo"):
        cli.main(job)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ingest.py", "--config", "/nothing.yml"), "error: config file /nothing.yml: No such file"),
        (("train.py", "--config", str(SAMPLE), "--unfrozen.lrr", "3"), "did you mean `--unfrozen.lr`?"),
        (("train.py", "--config", str(SAMPLE), "--num_workers", "0"), "error: `--num_workers`: "),
        (("tune.py", "--num_trails", "3"), "did you mean `--num_trials`?"),
        (("export.py", "--rnu", "first"), "did you mean `--run`?"),
        (("benchmark.py", "ingest", "--photo", "x"), "did you mean `--photos`?"),
        (("benchmark.py", "everything"), "invalid choice: 'everything'"),
        (("submit.py", "--adress", "x"), "did you mean `--address`?"),
        (("submit.py",), "error: no command to submit"),
        (("lineage.py", "tree", "--buget", "tiny"), "did you mean `--budget`?"),
        (
            ("lineage.py", "tree", "--budget", "tinny"),
            r"no budget `tinny` in .*Did you mean `tiny`? Available: cars196",
        ),
        (("lineage.py", "show"), "`show` needs the name of an experiment"),
        (("pipeline.py", "--train.dataset", "v1"), "`compare_unmasked` has no effect"),
        (("mask.py", "--config", str(SAMPLE), "--preview", "0"), "`--preview` is 0"),
        (("mask.py", "--config", str(SAMPLE), "--preview", "many"), "--preview: invalid int value: 'many'"),
        (("mask.py", "--config", str(SAMPLE), "--choice", "surest"), "`surest` was renamed to `highest_score`"),
    ],
)
def test_a_job_reports_a_mistake_in_one_paragraph(argv: tuple[str, ...], message: str):
    done = run_job(*argv)
    assert done.returncode == 2
    assert re.search(message.replace("?", r"\?"), done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_preview_is_no_part_of_a_pipeline():
    done = run_job("pipeline.py", "--mask.preview", "3")
    assert done.returncode == 2
    assert done.stderr == "error: `--mask.preview` is now a flag of jobs/mask.py: --preview 40\n"


# Help


@pytest.mark.parametrize(("job", "section"), SECTIONS.items())
def test_help_shows_the_jobs_page_and_every_setting(job: str, section: str | None, capsys: pytest.CaptureFixture[str]):
    doc = (JOBS / f"{job}.py").read_text().split('"""')[1]
    with pytest.raises(SystemExit) as caught:
        cli.parse_job(doc, section, ["--help"])
    output = capsys.readouterr().out
    kind = Config if section is None else section_type(Config.model_fields[section].annotation)
    assert kind is not None
    assert caught.value.code == 0
    assert doc.strip() in output
    assert all(f"--{setting.key} " in output for setting in list_settings(kind))


def test_every_job_is_covered_here_or_reads_no_section():
    texts = {path.stem: path.read_text() for path in JOBS.glob("*.py")}
    assert {name for name, text in texts.items() if "cli.parse_job" in text} == set(SECTIONS)


@pytest.mark.parametrize("job", [path.name for path in sorted(JOBS.glob("*.py"))])
def test_help_loads_no_heavy_library(job: str):
    code = (
        f"import runpy, sys; sys.argv = ['{job}', '--help']\n"
        f"try: runpy.run_path({str(JOBS / job)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"sys.exit(' '.join({{*{HEAVY!r}}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=JOBS.parent, check=False)
    assert done.stderr.strip() == ""
    assert "usage: " in done.stdout


def test_help_gives_defaults_and_marks_required_settings():
    settings = {setting.key: setting.default for setting in list_settings(TrainSettings)}
    assert settings["name"] == "required"
    assert settings["unfrozen.lr"] == 6e-4


def test_an_inherited_explanation_is_found():
    settings = {setting.key: setting.explanation for setting in list_settings(TrainSettings)}
    assert settings["frozen.batch_size"] == "Photos per step, over all workers together."


@pytest.mark.parametrize(
    ("kind", "key", "type_name", "bounds"),
    [
        (TrainSettings, "num_workers", "int|[int, int]", ""),
        (TrainSettings, "frozen.keep_epochs", "[int, ...]", ""),
        (TrainSettings, "unfrozen.ema_decay", "float", "> 0, < 1"),
        (Search, "scheduler", "asha|hyperband|median|none", ""),
        (Search, "space", "mapping", ""),
    ],
)
def test_types_and_bounds_are_readable(kind: Any, key: str, type_name: str, bounds: str):
    setting = next(setting for setting in list_settings(kind) if setting.key == key)
    assert (setting.type_name, setting.bounds) == (type_name, bounds)
