"""Actor pools of masking and prediction on nodes with a GPU each, which join and leave while a job runs.

The GPUs exist for Ray only, and networks run on CPUs: this file, run as a script, is the driver of such a job. Actors
log their nodes, and wait for seconds in each batch, so that a job outlasts the changes of its cluster.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from carclass.config import cli
from carclass.config.schema import Config, ModelSettings
from carclass.data import dataset
from carclass.evaluation.calibrate import calibrate_run
from carclass.models import architectures
from carclass.prediction import predictions
from carclass.runs.run import find_run
from carclass.sample.generate import write_sample
from tests.helpers.clusters import Cluster, Job, start, wait_for
from tests.helpers.own_cluster import treated_as_own
from tests.helpers.runs import publish_frozen_run

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # 290 s
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=32)
CONFIG = """
root: {folder}/root
ingest: {{photos: {folder}/photos, labels: {folder}/labels.csv}}
mask:
  detector: {{model: sample, weights: sample, short_side: 96, num_proposals: 10}}
  batch_size: 1
  part_rows: 16
predict: {{run: first, photos: {folder}/photos, part_rows: 16, batch_size: 16}}
"""
Rows = list[dict[str, Any]]


# The driver


def drive(job: str, config: str, name: str, log: str, pace: str) -> None:
    """Run a job whose actors take simulated GPUs, log their nodes, and wait `pace` seconds per batch."""
    import pyarrow as pa
    import ray

    from carclass.cluster import connection, resources
    from carclass.masking import mask
    from carclass.prediction import classify, predict

    class Logged:
        def __init__(self, *args: Any, use_gpu: bool, **kwargs: Any) -> None:
            assert use_gpu
            super().__init__(*args, use_gpu=False, **kwargs)

        def __call__(self, batch: pa.Table) -> Any:
            with open(log, "a") as file:
                file.write(f"{ray.get_runtime_context().get_node_id()}\n")
            time.sleep(float(pace))
            return super().__call__(batch)  # type: ignore[misc]

    mask.DetectPhotos = type("Detector", (Logged, mask.DetectPhotos), {})  # type: ignore[misc]
    both = type("Both", (Logged, classify.DetectAndClassifyPhotos), {})
    classify.DetectAndClassifyPhotos = both  # type: ignore[misc]
    connection.connect()
    resources._known_gpu_bytes[ray.get_runtime_context().gcs_address, resources.MASK] = 10**10
    settings = cli.load_config(Path(config), {"mask.dataset": name, "predict.name": name}, Config)
    if job == "mask":
        mask.mask_dataset(settings.root, settings.mask)  # type: ignore[arg-type]
    else:
        predict.predict_photos(settings.root, settings.predict)  # type: ignore[arg-type]


class GrowingCluster:
    """A cluster, a config file, and an ingested dataset that is masked by one detector."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cluster = folder, Cluster(folder, gpus=1)
        self.config = folder / "config.yml"
        self.config.write_text(CONFIG.format(folder=folder))

    @property
    def root(self) -> str:
        return str(self.folder / "root")

    def start(self, job: str, name: str, pace: float = 0) -> Job:
        log = self.folder / f"{job}-{name}.log"
        module = f"tests.ray.{Path(__file__).stem}"
        command = [sys.executable, "-m", module, job, self.config, name, self.nodes_log(job, name), str(pace)]
        with log.open("w") as out:
            options: dict[str, Any] = {"env": self.cluster.environment, "cwd": REPO, "stdout": out, "stderr": out}
            return Job(subprocess.Popen(command, **options), log)

    def nodes_log(self, job: str, name: str) -> Path:
        return self.folder / f"{job}-{name}.nodes"

    def batches_by_node(self, job: str, name: str) -> Counter[str]:
        """Return the number of batches that the actors of each node have begun."""
        log = self.nodes_log(job, name)
        return Counter(log.read_text().split() if log.exists() else ())

    def wait_for_nodes(self, number: int, job: str, name: str, running: Job) -> None:
        wait_for(lambda: len(self.batches_by_node(job, name)) >= number, running.process, running.log)

    def predicted(self, name: str) -> Rows:
        uri = predictions.predictions_uri(find_run(self.root, "first").uri, name)
        return pq.read_table(Path(uri, predictions.TABLE)).to_pylist()


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrowingCluster]:
    """A cluster of a node, with a dataset masked by one detector, and a run on it."""
    growing = GrowingCluster(tmp_path_factory.mktemp("growing"))
    try:
        write_sample(growing.folder, train_per_class=30, test_per_class=10)
        start("ingest.py", growing.config, growing.cluster.environment).end()
        growing.start("mask", "v2").end()
        torch.manual_seed(0)
        source = dataset.load_dataset(growing.root, "v2")
        run = publish_frozen_run(growing.root, source, "first", MODEL, architectures.build(MODEL, len(source.classes)))
        with treated_as_own():  # in this process: an evaluation would use a GPU
            calibrate_run(run, run.model_uri("frozen"), run.model_facts("frozen"), batch_size=16)
        yield growing
    finally:
        growing.cluster.stop()


def test_a_node_that_joins_gets_a_detector_and_one_that_leaves_is_done_without(
    growing: GrowingCluster, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]
):
    grown = growing.start("mask", "grown", pace=1)
    growing.wait_for_nodes(1, "mask", "grown", grown)
    growing.cluster.add_node()
    growing.wait_for_nodes(2, "mask", "grown", grown)
    grown.end()
    shrunk = growing.start("mask", "shrunk", pace=1)
    growing.wait_for_nodes(2, "mask", "shrunk", shrunk)
    growing.cluster.lose_node()
    shrunk.end()
    expected = contents(dataset.load_dataset(growing.root, "v2"))
    for name in ("grown", "shrunk"):
        assert contents(dataset.load_dataset(growing.root, name)) == expected


def test_prediction_has_one_actor_per_gpu_also_of_a_node_that_joins(growing: GrowingCluster):
    growing.start("predict", "alone").end()
    grown = growing.start("predict", "grown", pace=12)  # batches of 64
    growing.wait_for_nodes(1, "predict", "grown", grown)
    growing.cluster.add_node()
    growing.wait_for_nodes(2, "predict", "grown", grown)
    grown.end()
    assert growing.predicted("grown") == growing.predicted("alone")


if __name__ == "__main__":
    drive(*sys.argv[1:])
