"""Benchmark of listing and ingest from an S3 server: throughput and peak memory over 10,000 to a million keys."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import numpy as np
from botocore.exceptions import BotoCoreError, ClientError

from carclass import s3
from carclass.cluster import connection
from carclass.data import dataset, photo
from carclass.data.formats import json_text
from carclass.errors import UserError
from carclass.ingestion import listing
from carclass.progress import print_line
from carclass.tools.benchmarks import memory

COUNTS = (10_000, 100_000, 1_000_000)
PROJECTED = 100_000_000
NUM_CLASSES, FOLDER_PHOTOS = 200, 500
NUM_IMAGES = 200
"""Distinct images; photos differ by a JPEG comment."""
SERVER = Path(sys.executable).with_name("rclone")
FIRST_PORT = 9000
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def run(photos: Path | None, weights: Path | None, folder: Path, jobs: Path) -> dict[str, float]:
    """Return the rates of listing and ingest, its peak memory in MB, and the projected hours for 100 million photos.

    Photos are tiny, 16 to 32 pixels, because the number of keys is measured. They are in a local folder that a server
    exposes as a bucket; labels name photos by the ends of their keys. jobs: folder of the jobs.
    """
    if photos is not None or weights is not None:
        raise UserError(
            "--photos and --weights have no effect on the benchmark `scale`, which generates its photos. Omit them."
        )
    if not SERVER.exists():
        raise UserError(f"the benchmark `scale` needs the S3 server {SERVER}: install requirements-dev.lock.")
    figures: dict[str, float] = {}
    for count in COUNTS:
        root = folder / str(count)
        write_photos(root, count)
        with serve_s3(root / "buckets"):
            results = {"list_keys_per_s": _measure_listing(count), **_measure_ingest(root, count, jobs)}
        print_line(f"{count:,} keys: " + ", ".join(f"{name} {value:,.0f}" for name, value in results.items()))
        figures |= {f"{name}_{count}": value for name, value in results.items()}
    return figures | {
        "memory_largest_vs_smallest": figures[f"together_mb_{COUNTS[-1]}"] / figures[f"together_mb_{COUNTS[0]}"],
        "list_hours_of_100_million": PROJECTED / figures[f"list_keys_per_s_{COUNTS[-1]}"] / 3600,
        "ingest_hours_of_100_million": PROJECTED / figures[f"ingest_photos_per_s_{COUNTS[-1]}"] / 3600,
    }


def write_photos(root: Path, count: int) -> None:
    """Write labels.csv and buckets/photos/class_<class>/<folder>/<number>.jpg."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 33, (NUM_IMAGES, 2))
    images = [photo.encode(rng.integers(0, 256, (height, width, 3), np.uint8)) for height, width in sizes]
    root.mkdir()
    with (root / "labels.csv").open("w") as labels:
        labels.write("img_name,class,subset\n")
        for i in range(count):
            row, column = divmod(i, NUM_CLASSES)
            path = root / f"buckets/photos/class_{column}/{row // FOLDER_PHOTOS:02d}/{i:08d}.jpg"
            if row % FOLDER_PHOTOS == 0:
                path.parent.mkdir(parents=True)
            image = images[i % NUM_IMAGES]
            path.write_bytes(image[:2] + b"\xff\xfe\x00\x0a" + f"{i:08d}".encode() + image[2:])  # a comment of 8 bytes
            labels.write(f"{path.name},class {column},{'test' if row % 5 == 0 else 'train'}\n")


@contextmanager
def serve_s3(buckets: Path) -> Iterator[None]:
    """Run an S3 server with a bucket per folder and point the AWS environment variables at it."""
    port = connection.free_port(FIRST_PORT)
    keys = f"--auth-key={CREDENTIALS['AWS_ACCESS_KEY_ID']},{CREDENTIALS['AWS_SECRET_ACCESS_KEY']}"
    options = [f"--addr=127.0.0.1:{port}", keys, "--etag-hash=", "--buffer-size=0", "--dir-cache-time=24h", "--quiet"]
    server = subprocess.Popen([SERVER, "serve", "s3", *options, buckets])  # noqa: S603
    environment = dict(os.environ)
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    s3.reset()
    try:
        _wait_for(server)
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        s3.reset()
        server.kill()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers. Raise TimeoutError after ten seconds."""
    client = boto3.Session().client("s3")
    for _ in range(100):
        assert server.poll() is None, "the S3 server exited"
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the S3 server does not answer")


def _measure_listing(count: int) -> float:
    """Return the keys per second of listing alone."""
    started = time.perf_counter()
    assert sum(map(len, listing.list_pages("s3://photos"))) == count
    return count / (time.perf_counter() - started)


def _measure_ingest(root: Path, count: int, jobs: Path) -> dict[str, float]:
    """Run the ingest job and return its photos per second and peak memory in MB."""
    settings = {"photos": "s3://photos", "labels": str(root / "labels.csv")}
    (root / "ingest.yml").write_text(json_text({"root": str(root), "ingest": settings}))
    started = time.perf_counter()
    peaks = memory.measure_peaks(
        [sys.executable, str(jobs / "ingest.py"), "--config", str(root / "ingest.yml")], root / "log.txt"
    )
    seconds = time.perf_counter() - started
    manifest = dataset.load_dataset(str(root), "v1").manifest
    assert (manifest["inputs"], manifest["rows"]) == (count, count), manifest["reasons"]
    return {"ingest_photos_per_s": count / seconds, **{f"{name}_mb": value for name, value in peaks.items()}}
