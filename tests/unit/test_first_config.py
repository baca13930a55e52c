"""Comments and log lines of the first config file of own photos."""

import logging
import shutil
from pathlib import Path

import pytest

from carclass.config.schema import Config, IngestSettings, MaskSettings, ModelSettings, TrainSettings
from carclass.data import photo
from carclass.errors import UserError
from carclass.experiments import first_config, survey_text
from carclass.experiments.machine import Machine
from carclass.ingestion.survey import Survey, survey_source
from tests.helpers.photos import scene


def write_photos(folder: Path, *names: str) -> None:
    """Write different photos of these names."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.encode(scene(60, 100)) + bytes([i]))


def test_the_comment_on_the_size_stands_above_it():
    model = ModelSettings(stride_in_1x1=True, image_size=128)
    settings = Config(
        root="/r",
        ingest=IngestSettings(photos="/p"),
        mask=MaskSettings(),
        train=TrainSettings(name="first", parent="imagenet", model=model, frozen={"batch_size": 16}),
    )
    lines = first_config.render_config(settings, []).splitlines()
    index = lines.index("    image_size: 128")
    assert lines[index - 1] == "    # Side of the network's input in pixels: 224 is usual, 128 fits here."
    assert lines[index - 3 : index - 1] == ["  model:", "    stride_in_1x1: true"]


def test_folders_that_all_photos_share_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_photos(tmp_path / "p", *(f"cars/{name}/{i}.jpg" for name in ("audi", "bmw") for i in range(9)))
    with caplog.at_level(logging.INFO, "carclass"):
        survey = survey_source(str(tmp_path / "results"), str(tmp_path / "p"), None)
    assert survey.layout == "one folder per class, below cars"
    assert caplog.messages.count("ingest: the folders of classes are looked for in cars") == 1
    assert len(caplog.messages) == len({*caplog.messages})


def test_the_makes_of_a_table_are_the_classes(tmp_path: Path):
    write_photos(tmp_path / "p", *(f"{i}.jpg" for i in range(9)))
    rows = [f"{i}.jpg,{('Audi', 'BMW')[i % 2]},x" for i in range(9)]
    (tmp_path / "p" / "cars.csv").write_text("\n".join(["file,make,seller", *rows]))
    survey = survey_source(str(tmp_path / "results"), str(tmp_path / "p"), None)
    assert survey.settings.columns == {"name": "file", "class": "make"}
    assert survey.class_sizes == {"Audi": 5, "BMW": 4}


# Few photos


def survey_classes(folder: Path, **numbers: int) -> Survey:
    """Return the survey of a folder per class, with a number of photos in each."""
    write_photos(folder / "p", *(f"{name}/{i}.jpg" for name, number in numbers.items() for i in range(number)))
    return survey_source(str(folder / "results"), str(folder / "p"), None)


def test_three_photos_of_each_class_are_enough_for_all_splits(tmp_path: Path):
    survey = survey_classes(tmp_path, audi=3, bmw=3)
    assert survey.splits == {"train": 2, "val": 2, "test": 2}
    assert survey_text.find_obstacle(survey) is None
    ingest = first_config.choose_settings("/r", survey, Machine(2, 24_000_000_000)).ingest
    assert ingest is not None
    assert (ingest.test_fraction, ingest.val_fraction) == (0.2, 0.25)


@pytest.mark.parametrize(("number", "splits"), [(1, "val and test"), (2, "val and test")])
def test_photos_come_first_where_they_are_too_few_for_all_splits(number: int, splits: str, tmp_path: Path):
    survey = survey_classes(tmp_path, audi=number, bmw=number)
    assert survey.shares == {"test": 0.2, "val": 0.2}
    assert survey_text.find_obstacle(survey) == (
        f"add photos: none is in {splits}, and a class needs at least 4 to be in all splits"
    )


@pytest.mark.parametrize(
    ("subsets", "obstacle"),
    [
        ({"audi": {"train": 9, "val": 9}, "bmw": {"train": 9}}, "add photos: none is in test"),
        ({"audi": {"train": 9, "val": 9, "test": 9}, "bmw": {"val": 9}}, "add train photos of a second class"),
        ({"audi": {"train": 9, "val": 9, "test": 1}, "bmw": {"train": 1}}, None),
    ],
)
def test_what_a_pipeline_refuses_is_known_before(
    subsets: dict[str, dict[str, int]], obstacle: str | None, tmp_path: Path
):
    survey = survey_classes(tmp_path, audi=4, bmw=4)._replace(subsets=subsets, shares={})
    found = survey_text.find_obstacle(survey)
    assert found == obstacle if obstacle is None else found is not None and found.startswith(obstacle)


def test_classes_with_too_few_photos_for_all_splits_are_named(tmp_path: Path):
    survey = survey_classes(tmp_path, audi=25, bmw=25, kia=1, opel=3)
    warning = survey_text.list_warnings(survey, Machine(2, 24_000_000_000))[0]
    assert warning.startswith("2 of 4 classes lack photos in a split (no val, no test: kia; no val: opel).")
    assert "a class needs at least 4 for all splits" in warning


# Folders and tables


def log_of(photos: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Return the log lines of a survey."""
    with caplog.at_level(logging.INFO, "carclass"):
        survey_source(str(photos.parent / "results"), str(photos), None)
    return caplog.text


def test_folders_without_photos_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_photos(tmp_path / "p", *(f"{name}/{i}.jpg" for name in ("audi", "bmw") for i in range(9)))
    for name in ("kia", "vw/a/b", ".git/refs", "results/datasets/v1"):
        (tmp_path / "p" / name).mkdir(parents=True)
    (tmp_path / "p" / "kia" / ".DS_Store").write_text("x")
    with caplog.at_level(logging.INFO, "carclass"):
        survey_source(str(tmp_path / "p" / "results"), str(tmp_path / "p"), None)
    assert "folders without photos, which make no classes: 2: 'kia', 'vw'\n" in caplog.text


def write_table(file: Path) -> None:
    file.write_text("file,make\n" + "".join(f"{i}.jpg,{('Audi', 'BMW')[i % 2]}\n" for i in range(9)))


def test_a_table_that_is_read_instead_of_a_single_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_photos(tmp_path / "p", *(f"audi/{i}.jpg" for i in range(9)))
    write_table(tmp_path / "cars.csv")
    (tmp_path / "p" / "kia").mkdir()
    text = log_of(tmp_path / "p", caplog)
    assert f"the labels are read from {tmp_path}/cars.csv, as the folders cannot be the classes: " in text
    assert "only one class (audi)" in text
    assert "without photos" not in text  # of the layout that is not used


def test_a_table_beside_folders_of_classes_is_named_with_its_option(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_photos(tmp_path / "p", *(f"{name}/{i}.jpg" for name in ("audi", "bmw") for i in range(9)))
    write_table(tmp_path / "p" / "cars.csv")
    assert f"to read labels from a table: --labels {tmp_path}/p/cars.csv\n" in log_of(tmp_path / "p", caplog)


def test_lines_on_folders_are_shown_if_they_are_used_or_nothing_else_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_photos(tmp_path / "p", *(f"{name}/{i}.jpg" for name in ("audi", "bmw") for i in range(9)))
    (tmp_path / "p" / "kia").mkdir()
    assert "without photos, which make no classes: 1: 'kia'" in log_of(tmp_path / "p", caplog)
    caplog.clear()
    shutil.rmtree(tmp_path / "p" / "bmw")
    with pytest.raises(UserError, match=r"only one class \(audi\)"):
        log_of(tmp_path / "p", caplog)
    assert "without photos, which make no classes: 1: 'kia'" in caplog.text
