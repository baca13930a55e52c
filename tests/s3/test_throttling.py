"""An S3 that says SlowDown: what was asked is asked again, later, and nothing is lost or doubled.

A proxy before the S3 server refuses the first few requests for each object, or a share of all at random, as a throttled
S3 does. This file, run as a module, is the job whose processes all speak to the proxy.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carclass import storage
from carclass.config.schema import DetectorSettings, IngestSettings, MaskSettings
from carclass.data import dataset
from carclass.ingestion.ingest import ingest_photos
from carclass.masking.mask import mask_dataset
from tests.helpers.busy_s3 import Proxy

Rows = list[dict[str, Any]]
MASK = MaskSettings(
    detector=DetectorSettings(model="sample", weights="sample", short_side=96, num_proposals=10),
    num_actors=1,
    part_rows=16,
)

CONTENT = bytes(10_000)  # larger than an answer that says no, which a reader gets in its place


def test_a_request_that_is_refused_is_made_again(proxy: Proxy, bucket: str):
    proxy.first = 2
    uri = f"s3://{bucket}/a/b.bin"
    storage.write_bytes(uri, CONTENT)
    assert storage.read_bytes(uri) == CONTENT
    assert storage.list_files(f"s3://{bucket}/a") == ["b.bin"]
    assert proxy.refused >= 6


def test_the_time_between_attempts_grows(proxy: Proxy, bucket: str):
    proxy.first = 5
    storage.write_bytes(f"s3://{bucket}/b.bin", CONTENT)
    (times,) = [times for request, times in proxy.times.items() if "b.bin" in request and request.startswith("PUT")]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(waits) == 5
    # Drawn at random below a limit that doubles: the last two are longer than the first two all but always.
    assert sum(waits[-2:]) > sum(waits[:2])


def job(root: str, photos: str) -> None:
    """Ingest and masking in a cluster of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False)
    ingest_photos(root, IngestSettings(photos=f"{photos}/photos", labels=f"{photos}/labels.csv"))
    mask_dataset(root, MASK)


def test_a_throttled_job_makes_the_dataset_of_an_undisturbed_one(
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
    house = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert proxy.refused > 20
    proxy.share = 0.0
    for found, wanted in zip(
        contents(dataset.load_dataset(f"s3://{bucket}/out", "v2")), contents(expected), strict=True
    ):
        assert [a["key"] for a, b in zip(found, wanted, strict=True) if a != b] == []


if __name__ == "__main__":
    job(*sys.argv[1:])
