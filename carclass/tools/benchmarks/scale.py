"""Listing and ingest of ever more keys from an S3 server: keys a second, and memory, which should not grow."""

import json
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

from carclass.cluster import connection
from carclass.data import dataset, photo
from carclass.errors import UserError
from carclass.ingestion import listing
from carclass.progress import say
from carclass.tools.benchmarks import memory

COUNTS = (10_000, 100_000, 1_000_000)
PROJECTED = 100_000_000
NUM_CLASSES, FOLDER_PHOTOS = 200, 500
NUM_IMAGES = 200
"""Photos that are drawn; the others are these with another comment inside, and so other bytes."""
SERVER = Path(sys.executable).with_name("rclone")
FIRST_PORT = 9000
ACCESS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Rates of the listing and of the whole ingest, its peak memory in MB, and what 100 million photos would take.

    Photos are tiny, 16 to 32 pixels, as it is the number of keys that counts. They lie in a local folder that a server
    shows as a bucket, the dataset in another folder, and labels name photos by the ends of their keys.
    """
    if photos is not None or weights is not None:
        raise UserError("--photos and --weights have no effect on the benchmark `scale`, which makes its own photos.")
    if not SERVER.exists():
        raise UserError("the benchmark `scale` needs an S3 server: install requirements-dev.lock.")
    figures: dict[str, float] = {}
    for count in COUNTS:
        room = folder / str(count)
        write_photos(room, count)
        with served(room / "buckets"):
            found = {"list_keys_per_s": _list(count), **_ingest(room, count)}
        say(f"{count:,} keys: " + ", ".join(f"{name} {value:,.0f}" for name, value in found.items()))
        figures |= {f"{name}_{count}": value for name, value in found.items()}
    return figures | {
        "memory_largest_vs_smallest": figures[f"together_mb_{COUNTS[-1]}"] / figures[f"together_mb_{COUNTS[0]}"],
        "list_hours_of_100_million": PROJECTED / figures[f"list_keys_per_s_{COUNTS[-1]}"] / 3600,
        "ingest_hours_of_100_million": PROJECTED / figures[f"ingest_photos_per_s_{COUNTS[-1]}"] / 3600,
    }


def write_photos(room: Path, count: int) -> None:
    """Makes labels.csv, and buckets/photos/ with class_0/00/00000000.jpg and so on."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(16, 33, (NUM_IMAGES, 2))
    images = [photo.encode(rng.integers(0, 256, (height, width, 3), np.uint8)) for height, width in sizes]
    room.mkdir()
    with (room / "labels.csv").open("w") as labels:
        labels.write("img_name,class,subset\n")
        for i in range(count):
            row, column = divmod(i, NUM_CLASSES)
            path = room / f"buckets/photos/class_{column}/{row // FOLDER_PHOTOS:02d}/{i:08d}.jpg"
            if row % FOLDER_PHOTOS == 0:
                path.parent.mkdir(parents=True)
            image = images[i % NUM_IMAGES]
            path.write_bytes(image[:2] + b"\xff\xfe\x00\x0a" + f"{i:08d}".encode() + image[2:])  # a comment of 8 bytes
            labels.write(f"{path.name},class {column},{'test' if row % 5 == 0 else 'train'}\n")


@contextmanager
def served(buckets: Path) -> Iterator[None]:
    """A server that shows each folder as a bucket; the environment sends everyone there."""
    port = connection.free_port(FIRST_PORT)
    keys = f"--auth-key={ACCESS['AWS_ACCESS_KEY_ID']},{ACCESS['AWS_SECRET_ACCESS_KEY']}"
    options = [f"--addr=127.0.0.1:{port}", keys, "--etag-hash=", "--buffer-size=0", "--dir-cache-time=24h", "--quiet"]
    server = subprocess.Popen([SERVER, "serve", "s3", *options, buckets])  # noqa: S603
    before = dict(os.environ)
    os.environ.update(ACCESS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        _wait_for(server)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes]) -> None:
    client = boto3.Session().client("s3")
    for _ in range(100):
        assert server.poll() is None, "the S3 server ended at once"
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the S3 server doesn't answer")


def _list(count: int) -> float:
    """Keys a second of the listing alone, held nowhere."""
    started = time.perf_counter()
    assert sum(map(len, listing.pages("s3://photos"))) == count
    return count / (time.perf_counter() - started)


def _ingest(room: Path, count: int) -> dict[str, float]:
    """The job, in processes of its own."""
    settings = {"photos": "s3://photos", "labels": str(room / "labels.csv")}
    (room / "ingest.yml").write_text(json.dumps({"root": str(room), "ingest": settings}))
    job = Path(__file__).parents[2] / "jobs" / "ingest.py"
    started = time.perf_counter()
    peaks = memory.watch([sys.executable, str(job), "--config", str(room / "ingest.yml")], room / "log.txt")
    seconds = time.perf_counter() - started
    manifest = dataset.load_dataset(str(room), "v1").manifest
    assert (manifest["inputs"], manifest["rows"]) == (count, count), manifest["reasons"]
    return {"ingest_photos_per_s": count / seconds, **{f"{name}_mb": value for name, value in peaks.items()}}
