"""Retries of throttled S3 requests (SlowDown).

A proxy in front of the S3 server refuses the first few requests for each object, or a random share of all requests.
Executed as a module, this file is the job whose processes connect to the proxy.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carclass import storage
from carclass.config.schema import DetectorSettings, IngestSettings, MaskSettings
from carclass.data import dataset
from carclass.ingestion.ingest import ingest_photos
from carclass.masking.mask import mask_dataset
from tests.helpers.faulty_s3 import Proxy

Rows = list[dict[str, Any]]
MASK = MaskSettings(
    detector=DetectorSettings(model="sample", weights="sample", short_side=96, num_proposals=10),
    num_actors=1,
    part_rows=16,
)

CONTENT = bytes(10_000)  # larger than an error response, which replaces it


@pytest.mark.slow  # 7 s
def test_throttled_requests_of_storage_are_retried(proxy: Proxy, bucket: str):
    proxy.first = 2
    uri = f"s3://{bucket}/a/b.bin"
    storage.write_bytes(uri, CONTENT)
    assert storage.read_bytes(uri) == CONTENT
    assert storage.list_files(f"s3://{bucket}/a") == ["b.bin"]
    assert proxy.refused >= 6


@pytest.mark.slow  # 20 s
def test_the_time_between_attempts_increases(proxy: Proxy, bucket: str):
    proxy.first = 5
    storage.write_bytes(f"s3://{bucket}/b.bin", CONTENT)
    (times,) = [times for request, times in proxy.times.items() if "b.bin" in request and request.startswith("PUT")]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(waits) == 5
    # Waits are random below a limit that doubles: the last two are almost always longer than the first two.
    assert sum(waits[-2:]) > sum(waits[:2])


def job(root: str, photos: str) -> None:
    """Run ingestion and masking in a local cluster."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    ingest_photos(root, IngestSettings(photos=f"{photos}/photos", labels=f"{photos}/labels.csv"))
    mask_dataset(root, MASK)


@pytest.mark.nightly  # 40 s
def test_a_throttled_job_makes_the_same_dataset(
    proxy: Proxy,
    s3: Any,
    bucket: str,
    ingested: dataset.Dataset,
    photos_folder: Path,
    contents: Callable[[dataset.Dataset], tuple[Rows, Rows]],
):
    expected = mask_dataset(ingested.uri.rsplit("/", 2)[0], MASK.model_copy(update={"dataset": "unthrottled"}))
    for path in photos_folder.rglob("*.*"):
        s3.put_object(Bucket=bucket, Key=f"cars/{path.relative_to(photos_folder)}", Body=path.read_bytes())
    proxy.share = 0.15
    command = [sys.executable, "-m", "tests.s3.test_throttling", f"s3://{bucket}/out", f"s3://{bucket}/cars"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    repository = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert proxy.refused > 20
    proxy.share = 0.0
    for rows, expected_rows in zip(
        contents(dataset.load_dataset(f"s3://{bucket}/out", "v2")), contents(expected), strict=True
    ):
        assert [a["key"] for a, b in zip(rows, expected_rows, strict=True) if a != b] == []


if __name__ == "__main__":
    job(*sys.argv[1:])
