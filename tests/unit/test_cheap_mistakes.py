"""Mistakes that files and settings tell: found before PyTorch, Ray and Detectron2 are loaded, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from carclass.config.schema import TrainSettings
from carclass.data.lease import hold_lease
from carclass.errors import UserError, suggest_beside
from carclass.prediction import predictions
from tests.helpers.runs import FROZEN, begin, finish, publish_dataset

JOBS = Path(__file__).parents[2] / "jobs"
HEAVY = ("torch", "torchvision", "ray", "detectron2", "sklearn", "onnx")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a config file, photos, and a root with a finished run and one that has begun."""
    publish_dataset(tmp_path / "root", "v1", splits={"test": 1})
    for name in ("first", "begun"):
        begin(tmp_path / "root", TrainSettings(name=name, dataset="v1", **FROZEN))
    finish(begin(tmp_path / "root", TrainSettings(name="first", dataset="v1", **FROZEN)))
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    stored = predictions.predictions_uri(str(tmp_path / "root" / "experiments" / "first"), "predictions")
    predictions.begin_predictions(stored, {"photos": "/old"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "car.jpg").touch()
    (tmp_path / "file").touch()
    (tmp_path / "labels.csv").touch()
    sections = "ingest: {photos: photos}\nmask: {}\ntrain: {name: first, dataset: v1}\n"
    (tmp_path / "my.yml").write_text(f"root: root\n{sections}")
    return tmp_path


def error_of(place: Path, job: str, *arguments: str, config: tuple[str, ...] = ("--config", "my.yml")) -> str:
    """Return the error of a job, which has to end without a heavy library."""
    code = (
        f"import runpy, sys; sys.argv = ['{job}.py', *sys.argv[1:]]\n"
        f"try: runpy.run_path({str(JOBS / f'{job}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2\n"
        f"assert not {{*{HEAVY!r}}} & {{*sys.modules}}, {{*{HEAVY!r}}} & {{*sys.modules}}"
    )
    command = [sys.executable, "-c", code, *arguments, *config]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict photos --run frist", "no run `frist` in {}/root. Did you mean `first`?"),
        ("predict photos --run begun", "the run has not finished this stage. Run `python jobs/train.py --config FILE`"),
        ("predict photos --root file", "{}/file is a file, not a folder: correct `root`"),
        ("predict photso", "no photo, folder or archive photso; did you mean `photos`?"),
        ("predict a.jpg photos/car.jpg photos/cra.jpg", "2 of 3 are missing. There is no photo, folder or archive "
         "a.jpg, photos/cra.jpg (did you mean `car.jpg`?). Check the paths."),
        ("predict photos", "/experiments/first/predictions/predictions has the predictions of /old. Give those of "
         "{}/photos another name, e.g. --name photos."),
        ("predict empty", "`predict.photos`: no files in {}/empty"),
        ("predict photos/car.jpg --name x", "`--name` has no effect on photos that are named one by one"),
        ("evaluate --run frist", "no run `frist` in {}/root. Did you mean `first`?"),
        ("evaluate --run first --dataset v2", "no dataset `v2` in {}/root. Available: v1."),
        ("evaluate --run first --split val --root file", "{}/file is a file, not a folder"),
        ("export --run frist", "no run `frist` in {}/root. Did you mean `first`?"),
        ("train --dataset v2", "no dataset `v2` in {}/root. Available: v1."),
        ("train --parent imgenet", "imgenet cannot be read (no such file). Did you mean `imagenet`?"),
        ("mask --source v2", "no dataset `v2` in {}/root. Available: v1."),
        ("mask --detector.weights zo", "zo cannot be read (no such file). Did you mean `zoo`?"),
        ("pipeline --ingest.photos photso", "`ingest.photos`: no folder {}/photso; did you mean `photos`?"),
        ("pipeline --ingest.photos empty", "`ingest.photos`: no files in {}/empty"),
        ("pipeline --ingest.labels label.csv",
         "`ingest.labels`: {}/label.csv cannot be read (no such file); did you mean `labels.csv`? Set it to"),
        ("pipeline --train.parent imgenet", "imgenet cannot be read (no such file). Did you mean `imagenet`?"),
        ("pipeline --mask.detector.weights zo", "zo cannot be read (no such file). Did you mean `zoo`?"),
        ("pipeline --root file", "`root`: {}/file is a file"),
        ("pipeline --root file --train.parent w.pth", "2 problems, all found before the first step"),
    ],
)  # fmt: skip
def test_a_cheap_mistake_is_found_before_heavy_libraries_are_loaded(place: Path, arguments: str, message: str):
    assert message.format(place) in error_of(place, *arguments.split())


def test_of_many_missing_photos_the_first_are_named(place: Path):
    error = error_of(place, "predict", *(f"{i}.jpg" for i in range(12)))
    assert "12 of 12 are missing" in error
    assert "9.jpg and 2 more. Check the paths." in error


def test_an_export_by_a_root_alone_names_no_run(place: Path):
    error = error_of(place, "export", "--root", "root", config=())
    assert error == "error: no run is named. Name the run to export, e.g. --run first.\n"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("photso", "did you mean `photos`?"),
        ("photso/new/car.jpg", "did you mean `photos`?"),
        ("photos/car.jpeg", "did you mean `car.jpg`?"),
        ("file/car.jpg", ""),
        ("photos/car.jpg", ""),
        ("zzz", ""),
    ],
)
def test_the_first_missing_part_of_a_path_is_compared_with_the_names_beside_it(place: Path, path: str, hint: str):
    assert suggest_beside(f"{place}/{path}") == hint


def test_a_place_that_is_not_local_is_compared_with_nothing():
    assert suggest_beside(None) == ""


def test_a_run_in_training_is_named_with_the_job_that_is_at_work(place: Path):
    run = begin(place / "root", TrainSettings(name="begun", dataset="v1", **FROZEN))
    with hold_lease(run.uri, "train"), pytest.raises(UserError, match=r"It is in training: the job `train` \(host "):
        run.select_stage(None)
    with pytest.raises(UserError, match=r"Run `python jobs/train.py --config FILE`"):
        run.select_stage(None)


def test_of_a_run_in_training_a_finished_stage_can_be_used(tmp_path: Path):
    publish_dataset(tmp_path)
    run = begin(tmp_path, TrainSettings(name="both", **{**FROZEN, "unfrozen": {"epochs": 2}}))
    finish(run, stage="frozen")
    with pytest.raises(UserError, match=r"Or use the stage that is finished: --stage frozen\.$"):
        run.select_stage(None)
