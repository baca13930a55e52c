"""Photos of a split, for training and evaluation."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml

from carclass.config.schema import EvaluateSettings, TrainSettings
from carclass.data import dataset, photo, publishing
from carclass.evaluation.classification import classify_here, classify_on_cluster, predict_split
from carclass.runs.run import Run
from carclass.training.dataloader import PhotoSamples
from carclass.training.photo_store import get_blocks, open_block, store_split, store_split_here
from tests.helpers import parts, runs
from tests.helpers.clusters import start

SIZE = 48
Store = Callable[[dataset.Dataset, str, int | None], list[ray.ObjectRef]]


def load_samples(source: dataset.Dataset, size: int | None, store: Store = store_split) -> PhotoSamples:
    blocks = ray.get(store(source, "train", size))
    return PhotoSamples([open_block(block, SIZE) for block in blocks], seed=1)


def assert_same_epochs(first: PhotoSamples, second: PhotoSamples) -> None:
    for one, other in zip(first.steps(1, 16), second.steps(1, 16), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(first.labels[one.positions], second.labels[other.positions])
        np.testing.assert_array_equal(first.pixels(one.positions), second.pixels(other.positions))


@pytest.mark.slow  # 5 s
def test_encoded_and_decoded_photos_give_the_same_epochs(ingested: dataset.Dataset):
    encoded = load_samples(ingested, None)
    assert len(encoded) == ingested.manifest["splits"]["train"]
    assert_same_epochs(encoded, load_samples(ingested, SIZE))


@pytest.mark.slow  # 5 s
@pytest.mark.parametrize("size", [None, SIZE])
def test_photos_read_in_this_process_give_the_same_epochs(ingested: dataset.Dataset, size: int | None):
    assert_same_epochs(load_samples(ingested, size), load_samples(ingested, size, store_split_here))


@pytest.fixture(scope="module")
def grown(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    """Publish a dataset whose val photos are all in one of eight parts, as after an update."""
    uri = str(tmp_path_factory.mktemp("grown") / "datasets" / "v1")
    image = photo.encode(np.full((SIZE, SIZE, 3), 128, np.uint8))
    for i in range(8):
        split = "train" if i else "val"
        rows = [parts.row(f"{i}{label}", label=label, split=split, image=image) for label in "ab"]
        publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), parts.SETTINGS)
    return parts.publish(uri, [f"{i}{label}" for i in range(8) for label in "ab"])


@pytest.mark.slow  # 10 s
@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("store", [store_split, store_split_here])
def test_parts_without_photos_of_a_split_are_skipped_in_training(
    grown: dataset.Dataset, size: int | None, store: Store
):
    (blocks,) = get_blocks({"val": store(grown, "val", size)}, SIZE)
    assert sum(len(block.ids) for block in blocks) == 2


EVALUATE = EvaluateSettings(run="r", split="val", batch_size=1)


@pytest.fixture(scope="module")
def run(grown: dataset.Dataset) -> Run:
    run = runs.begin(Path(grown.uri).parents[1], TrainSettings(**runs.FROZEN, name="r", dataset="v1"))
    runs.finish(run, classes=grown.classes)
    return run


@pytest.mark.slow  # 10 s
def test_parts_without_photos_of_a_split_are_skipped_in_evaluation(grown: dataset.Dataset, run: Run):
    table = predict_split(grown, EVALUATE, run.model_uri("frozen"))
    assert table["key"].to_pylist() == ["0a", "0b"]


@pytest.mark.slow  # 5 s
def test_a_process_alone_classifies_as_a_cluster_does(grown: dataset.Dataset, run: Run):
    model_uri = run.model_uri("frozen")
    tables = [classify(grown, EVALUATE, model_uri) for classify in (classify_here, classify_on_cluster)]
    assert tables[0].sort_by("key").equals(tables[1].sort_by("key"))


@pytest.mark.slow  # 10 s
def test_few_photos_are_evaluated_without_a_cluster(grown: dataset.Dataset, run: Run, tmp_path: Path):
    config_file = tmp_path / "evaluate.yml"
    config_file.write_text(yaml.safe_dump({"root": run.root, "evaluate": {"run": "r", "split": "val"}}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    job = start("evaluate.py", config_file, environment)
    job.end()
    assert "val accuracy" in job.log.read_text()
    assert "Ray" not in job.log.read_text()
