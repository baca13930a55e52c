"""Jobs in front of a misbehaving S3: they finish correctly, or stop with one paragraph and resume once S3 is healthy.

Executed as a module, this file is a job whose processes connect to the proxy.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from carclass import storage
from carclass.config import cli
from carclass.config.schema import (
    DetectorSettings,
    IngestSettings,
    MaskSettings,
    ModelSettings,
    PredictSettings,
)
from carclass.data import dataset
from carclass.models import architectures
from carclass.prediction import predictions
from tests.helpers.faulty_s3 import RESET, TRUNCATED, Fault, Proxy
from tests.helpers.runs import publish_frozen_run

Rows = list[dict[str, Any]]
MASK = MaskSettings(
    detector=DetectorSettings(model="sample", weights="sample", short_side=96, num_proposals=10),
    num_actors=1,
    part_rows=16,
)
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)
RESULTS = {
    "ingest": "datasets/v1",
    "mask": "datasets/v2",
    "predict": "experiments/sample/predictions/predictions",
}
FINISHED = ("manifest.json", predictions.TABLE)
PHOTO = r"GET /[^/]+/cars/photos/.*\.jpg"
PART = r"GET /[^/]+/out/datasets/v1/parts/"
STOPS = {
    "another region": (Fault(301), "The bucket is in another region"),
    "forbidden": (Fault(403), "The credentials lack a permission"),
    "expired": (Fault(400, after=10), "Renew the credentials"),
}
PASSING = (429, 502, RESET, TRUNCATED)


def ingest(root: str, photos: str) -> None:
    from carclass.ingestion.ingest import ingest_photos

    ingest_photos(root, IngestSettings(photos=f"{photos}/photos", labels=f"{photos}/labels.csv", part_rows=8))


def mask(root: str, _: str) -> None:
    from carclass.masking.mask import mask_dataset

    mask_dataset(root, MASK)


def predict(root: str, photos: str) -> None:
    from carclass.prediction.predict import predict_photos

    predict_photos(root, PredictSettings(run="sample", photos=f"{photos}/photos", batch_size=8, part_rows=8))


def job(name: str, root: str, photos: str) -> None:
    """Run a job in a local cluster, as its script does."""
    import ray

    from carclass.cluster import connection

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    connection.connect()
    cli.main(lambda: {"ingest": ingest, "mask": mask, "predict": predict}[name](root, photos))


def run(name: str, bucket: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.s3.test_faults_s3", name, f"s3://{bucket}/out", f"s3://{bucket}/cars"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300
    )


def assert_stopped(result: subprocess.CompletedProcess[str], message: str) -> None:
    """Check that a job ended with one paragraph."""
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert "Traceback" not in output
    (paragraph,) = result.stderr.split("error: ")[1:]
    assert len(paragraph.strip().splitlines()) == 1
    assert message in paragraph


@pytest.fixture
def cars(s3: Any, bucket: str, photos_folder: Path) -> str:
    """Upload the small sample, and return its bucket."""
    for path in photos_folder.rglob("*.*"):
        s3.put_object(Bucket=bucket, Key=f"cars/{path.relative_to(photos_folder)}", Body=path.read_bytes())
    return bucket


@pytest.fixture
def prepare(cars: str) -> Callable[[str], None]:
    """Return a function that makes what a job reads: the dataset, and for predictions a run with random weights."""

    def prepare(name: str) -> None:
        if name == "ingest":
            return
        assert run("ingest", cars).returncode == 0
        root = f"s3://{cars}/out"
        source = dataset.load_dataset(root, "v1")
        torch.manual_seed(1)
        publish_frozen_run(root, source, "sample", MODEL, architectures.build(MODEL, len(source.classes)))

    return prepare


def result_of(name: str, bucket: str, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]) -> Any:
    """Return all rows that a job has written."""
    if name == "predict":
        uri = f"s3://{bucket}/out/experiments/sample/predictions/predictions/{predictions.TABLE}"
        return pq.read_table(pa.BufferReader(storage.read_bytes(uri))).to_pylist()
    return contents(dataset.load_dataset(f"s3://{bucket}/out", RESULTS[name].rsplit("/", 1)[1]))


def check_resumed(name: str, bucket: str, contents: Callable[[dataset.Dataset], tuple[Rows, Rows]]) -> None:
    """Check that the resumed job has the same result as an undisturbed one."""
    assert (done := run(name, bucket)).returncode == 0, done.stderr
    resumed = result_of(name, bucket, contents)
    storage.delete_folder(f"s3://{bucket}/out/{RESULTS[name]}")
    assert run(name, bucket).returncode == 0
    assert resumed == result_of(name, bucket, contents)


@pytest.mark.nightly  # 60 to 150 s each: three to five jobs
@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault in STOPS for name in RESULTS])
def test_a_job_stops_with_a_remedy_and_is_resumed(
    name: str,
    fault: str,
    proxy: Proxy,
    cars: str,
    prepare: Callable[[str], None],
    contents: Callable[[dataset.Dataset], tuple[Rows, Rows]],
):
    prepare(name)
    proxy.faults = [replace(STOPS[fault][0], pattern=PART if name == "mask" else PHOTO)]
    assert_stopped(run(name, cars), STOPS[fault][1])
    assert not [path for path in storage.list_files(f"s3://{cars}/out/{RESULTS[name]}") if path in FINISHED]
    proxy.faults = []
    check_resumed(name, cars, contents)


@pytest.mark.nightly  # 50 to 80 s each: three or four jobs
@pytest.mark.parametrize("name", RESULTS)
def test_a_job_outlasts_passing_faults(
    name: str,
    proxy: Proxy,
    cars: str,
    prepare: Callable[[str], None],
    contents: Callable[[dataset.Dataset], tuple[Rows, Rows]],
):
    prepare(name)
    proxy.faults = [Fault(kind, PART if name == "mask" else PHOTO, first=1) for kind in PASSING]
    check_resumed(name, cars, contents)
    assert proxy.refused >= 4


if __name__ == "__main__":
    job(*sys.argv[1:])
