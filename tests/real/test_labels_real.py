"""Parsers of labels on the original files of Stanford Cars, if ../shared is present."""

from collections import Counter
from pathlib import Path

import pytest

from carclass.ingestion.devkit import parse_devkit
from carclass.ingestion.label_table import parse_table
from carclass.ingestion.labels import Label

CARS = Path(__file__).parents[3] / "shared" / "cars196"

pytestmark = pytest.mark.skipif(not CARS.is_dir(), reason="needs ../shared/cars196")


def read_csv(name: str) -> list[Label]:
    with (CARS / name).open("rb") as stream:
        return [label for _, label in parse_table(stream, source=name)]


def test_the_original_csv_has_all_16185_photos():
    labels = read_csv("car_dataset_labels.csv")
    assert Counter(label.subset for label in labels) == {"train": 8144, "test": 8041}
    assert len({label.label for label in labels}) == 196


def test_the_devkit_agrees_with_the_csv_on_every_class_count():
    annos, meta = ((CARS / "devkit" / f"cars_{name}.mat").read_bytes() for name in ("train_annos", "meta"))
    devkit = [label for _, label in parse_devkit(annos, meta, subset="train", source="cars_train_annos.mat")]
    csv = read_csv("car_dataset_labels.csv")
    counts = Counter(label.label for label in csv if label.subset == "train")
    # The CSV writes the slash of "Ram C/V Cargo Van Minivan 2012" as a hyphen.
    assert Counter(label.label.replace("/", "-") for label in devkit) == counts


def test_the_shared_labels_match_the_shared_photos():
    labels = read_csv("labels.csv")
    assert {label.key for label in labels} == {path.name for path in (CARS / "photos").iterdir()}
