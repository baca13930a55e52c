"""Comments and log lines of the first config file of own photos."""

import logging
from pathlib import Path

import pytest

from carclass.config.schema import Config, IngestSettings, MaskSettings, ModelSettings, TrainSettings
from carclass.data import photo
from carclass.experiments import first_config
from carclass.ingestion.survey import survey_source
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
