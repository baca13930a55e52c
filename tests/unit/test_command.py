"""The command `carclass`, in a checkout and from a wheel in an empty folder: it runs the jobs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.wheels import REPO, unpack_wheel

JOBS = sorted((REPO / "jobs").glob("*.py"))
SOURCES = [
    path.relative_to(REPO).as_posix()
    for folder in ("carclass", "jobs")
    for path in sorted((REPO / folder).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]


BIN = Path(sys.executable).parent


def run(
    *command: str | Path, site: Path = REPO, cwd: Path = Path("/"), path: str = f"{BIN}:/usr/bin:/bin"
) -> "subprocess.CompletedProcess[str]":
    """Run Python with the package in a folder. path: the variable PATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CARCLASS", "CARS196"))}
    env |= {"PYTHONPATH": str(site), "PATH": path}
    command = (sys.executable, *command)
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def carclass(*arguments: str, site: Path = REPO, cwd: Path = Path("/")) -> "subprocess.CompletedProcess[str]":
    return run("-m", "carclass", *arguments, site=site, cwd=cwd)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_every_job_is_listed_with_the_first_line_of_its_page(arguments: tuple[str, ...]):
    done = carclass(*arguments)
    assert done.returncode == 0
    lines = {path.stem: path.read_text(encoding="utf-8").split('"""')[1].split("\n")[0] for path in JOBS}
    assert {name: line for name, line in lines.items() if f"  {name:<10} {line}\n" not in done.stdout} == {}


def test_the_list_of_commands_loads_neither_settings_nor_heavy_libraries():
    code = (
        "import sys; from carclass import __main__; sys.argv = ['carclass']; __main__.main(); "
        "sys.exit(' '.join({'pydantic', 'yaml', 'numpy', 'torch', 'ray'} & {*sys.modules}))"
    )
    assert run("-c", code).stderr.strip() == ""


def test_a_reader_that_closes_the_output_ends_the_command_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "carclass", "--help"]
    done = subprocess.run(command, cwd=REPO, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_version_is_printed():
    assert re.fullmatch(r"carclass \d+\.\d+\.\d+\n", carclass("--version").stdout)


def test_an_unknown_command_is_compared_with_the_known_ones():
    done = carclass("trian", "--config", "my.yml")
    assert done.returncode == 2
    assert done.stderr == "error: `trian` is not a command of carclass; did you mean `train`?\n"


def test_a_command_ends_as_its_job_does():
    arguments = ("--config", "no-such-file.yml")
    by_path, by_name = run(REPO / "jobs" / "train.py", *arguments), carclass("train", *arguments)
    assert (by_name.returncode, by_name.stderr) == (2, by_path.stderr)
    assert by_name.stderr.startswith("error: config file no-such-file.yml")


def test_help_shows_the_commands_that_one_types():
    help_text = carclass("train", "--help").stdout
    assert help_text.startswith("usage: carclass train --config FILE")
    assert "\n  carclass train --config FILE --name second" in help_text
    assert "jobs/" not in help_text


def test_errors_name_commands_as_one_types_them(tmp_path: Path):
    done = carclass("lineage", "run", "--budget", "tiny", "--root", str(tmp_path))
    assert done.returncode == 2
    assert "as listed by `carclass lineage tree`" in done.stderr


@pytest.mark.parametrize(("cwd", "command"), [(BIN.parent, "bin/carclass"), (Path("/usr"), f"{BIN}/carclass")])
def test_errors_name_the_path_of_the_command_if_it_is_not_on_path(cwd: Path, command: str, tmp_path: Path):
    arguments = ("lineage", "run", "--budget", "tiny", "--root", str(tmp_path))
    done = run("-m", "carclass", *arguments, cwd=cwd, path="/usr/bin:/bin")
    assert f"as listed by `{command} lineage tree`" in done.stderr


def test_a_path_that_ends_like_a_job_is_not_taken_for_a_command(tmp_path: Path):
    done = carclass("train", "--config", str(tmp_path / "jobs" / "train.py"))
    assert f"config file {tmp_path}/jobs/train.py: No such file" in done.stderr


# The wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return unpack_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_of_the_package_and_of_the_jobs(site: Path):
    inside = {name if name.startswith("carclass") else f"carclass/{name}" for name in SOURCES}
    assert {name for name in inside if not (site / name).is_file()} == set()


def test_the_wheel_installs_one_package_and_one_command(site: Path):
    (metadata,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"carclass", metadata.name}
    assert "carclass = carclass.__main__:main" in (metadata / "entry_points.txt").read_text()


def test_an_installed_package_runs_the_sample_by_default(site: Path, tmp_path: Path):
    """Up to the first check after the settings are read; the flag is one that the sample's settings contradict."""
    done = carclass("pipeline", "--train.dataset", "v1", site=site, cwd=tmp_path)
    assert done.returncode == 2
    assert "`compare_unmasked` has no effect" in done.stderr


@pytest.mark.parametrize(
    "config",
    [
        "jobs/experiments/sample.yml",
        pytest.param("jobs/experiments/cars196.yml", id="with photos beside the checkout"),
    ],
)
def test_an_installed_package_has_the_experiment_files(site: Path, tmp_path: Path, config: str):
    code = (
        "import sys; from carclass.config import cli\n"
        f"settings = cli.parse_job('', None, ['--config', {config!r}])\n"
        "print(settings.root, settings.ingest.photos)"
    )
    root, photos = run("-c", code, site=site, cwd=tmp_path / "").stdout.split()
    assert root == str(tmp_path / "results")
    assert photos in ("sample", str(tmp_path.parent / "shared" / "cars196" / "photos"))


def test_a_file_of_the_working_directory_comes_before_the_packages_own(site: Path, tmp_path: Path):
    own = tmp_path / "jobs" / "experiments" / "sample.yml"
    own.parent.mkdir(parents=True)
    own.write_text("root: here\nmask: {batch: 1}\n")
    done = carclass("mask", "--config", "jobs/experiments/sample.yml", site=site, cwd=tmp_path)
    assert "`mask.batch` is not a setting" in done.stderr


def test_an_installed_package_lists_its_tree_of_experiments(site: Path, tmp_path: Path):
    done = carclass("lineage", "tree", "--budget", "tiny", site=site, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "exp_016: imagenet  v1  missing" in done.stdout


@pytest.mark.slow  # 7 s
def test_the_results_of_an_installed_package_lie_in_the_working_directory(site: Path, tmp_path: Path):
    done = carclass("evaluate", "--config", "jobs/experiments/sample.yml", "--run", "none", site=site, cwd=tmp_path)
    assert done.returncode == 2
    assert f"no run `none` in {tmp_path}/results. Available: none. There is no folder {tmp_path}/results" in done.stderr


@pytest.mark.slow  # 6 s: pip and the build
def test_pip_installs_the_command(tmp_path: Path):
    target = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(target)]
    (wheel,) = (unpack_wheel(tmp_path).parent / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True, timeout=120)
    done = run(target / "bin" / "carclass", "train", "--help", site=target, cwd=tmp_path)
    assert done.stdout.startswith("usage: carclass train --config FILE")
