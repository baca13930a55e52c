"""Python packages that are missing: reported in one paragraph with the command that installs them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from carclass.config.installation import MissingPackageReport
from carclass.errors import UserError
from tests.helpers.runs import publish_dataset

REPO = Path(__file__).parents[2]


class TaskError(ModuleNotFoundError):
    """An error of a remote task: an instance of its cause's class without the cause's attributes, as Ray's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause


def report(error: Exception) -> str:
    """Return the text of the UserError that replaces an error."""
    with pytest.raises(UserError) as caught, MissingPackageReport():
        raise error
    return str(caught.value)


def test_detectron2_is_reported_with_the_command_that_builds_it():
    text = report(ModuleNotFoundError("No module named 'detectron2'", name="detectron2.config"))
    path, *command = shlex.split(text.partition(" once: ")[2])
    assert text.startswith("Detectron2 is missing, which finds the vehicles in photos.")
    assert (Path(path.removeprefix("PYTHONPATH=")) / "torch" / "utils" / "cpp_extension.py").is_file()
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert Path(command[-1]).read_text().count("pb1-detectron2==") == 1


def test_the_command_for_detectron2_is_that_of_the_image():
    text = report(ModuleNotFoundError("No module named 'detectron2'", name="detectron2"))
    options = re.findall(r"--[a-z-]+", text)
    script = (REPO / "cluster" / "image" / "install.sh").read_text().partition("torch_stub")[2]
    assert options == [option for option in re.findall(r"--[a-z-]+", script) if option != "--quiet"]


def test_a_missing_package_is_reported_with_a_command():
    text = report(ModuleNotFoundError("No module named 'absent'", name="absent.part"))
    assert text == (
        "the Python package `absent` is missing. Install what carclass needs: "
        f"{shlex.quote(sys.executable)} -m pip install absent"
    )


@pytest.mark.parametrize("wrap", [TaskError, lambda cause: TaskError(TaskError(cause))], ids=["task", "nested task"])
def test_a_package_that_a_worker_lacks_is_reported(wrap):
    assert "the Python package `absent` is missing" in report(wrap(ModuleNotFoundError("…", name="absent")))


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ModuleNotFoundError("…", name="carclass.gone"), id="a module of our own"),
        pytest.param(ImportError("…", name="numpy"), id="a package that is damaged"),
        pytest.param(KeyError("detectron2"), id="another error"),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception):
    with pytest.raises(type(error)) as caught, MissingPackageReport():
        raise error
    assert caught.value is error


WITHOUT_DETECTRON2 = "import runpy, sys; sys.modules['detectron2'] = None; sys.argv = sys.argv[1:]\n"


def run_without_detectron2(code: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", f"{WITHOUT_DETECTRON2}{code}", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow  # 15 s: PyTorch and Ray are imported
@pytest.mark.parametrize("job", ["mask", "pipeline"])
def test_a_job_that_masks_names_the_command_before_any_work(job: str, tmp_path: Path):
    config = tmp_path / "my.yml"
    config.write_text("root: results\ningest: {photos: sample}\nmask: {}\ntrain: {name: first}\n")
    publish_dataset(tmp_path / "results", "v1")
    run_job = f"runpy.run_path({str(REPO / 'jobs' / job)!r} + '.py', run_name='__main__')"
    done = run_without_detectron2(run_job, job, "--config", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: Detectron2 is missing.* run this once: PYTHONPATH=\S+ .*\n", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"my.yml", "results"}
    assert [path.name for path in (tmp_path / "results" / "datasets").iterdir()] == ["v1"]


@pytest.mark.slow  # 10 s: PyTorch and Ray are imported
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "import_verbs = runpy.run_path('jobs/pipeline.py')['import_verbs']\n"
            "from carclass.config.schema import Config; import_verbs(Config(root='/r'))",
            id="a pipeline without masks",
        ),
        pytest.param("import carclass.prediction.predict, carclass.prediction.photo_predictor", id="predictions"),
    ],
)
def test_work_without_masks_needs_no_detectron2(code: str):
    done = run_without_detectron2(code, "pipeline")
    assert done.returncode == 0, done.stderr
