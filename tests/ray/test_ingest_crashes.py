"""Ingestion of photos that crash the process that reads them.

The crashes are injected in a separate job: this file, run as a script, is its driver.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from carclass.config.schema import IngestSettings
from carclass.data import dataset, photo, publishing
from carclass.data.crash_guard import MAX_SINGLE_ATTEMPTS
from carclass.ingestion import ingest
from carclass.ingestion.ingest import ingest_photos, write_photos

POISON = b"ends its reader"
"""Metadata of a photo that crashes the process that reads it."""
BAD = ("A/03.jpg", "A/04.jpg", "B/17.jpg")


def crash_on_poison(log: str) -> None:
    """Patch decoding to log photos with the poison and crash the process."""
    reencode = photo.reencode

    def reencode_or_crash(data: bytes, **more: Any) -> tuple[bytes, int, int]:
        if POISON in data:
            with open(log, "a") as file:
                file.write(data[data.index(POISON) + len(POISON) :].split(b";")[0].decode() + "\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        return reencode(data, **more)

    photo.reencode = reencode_or_crash


def drive(root: str, log: str) -> None:
    """Run an ingestion job with crashing tasks."""
    import ray

    def write_or_crash(*args: Any, **kwargs: Any) -> Any:
        if photo.reencode.__name__ == "reencode":
            crash_on_poison(log)
        return write_photos(*args, **kwargs)

    ingest.write_photos = write_or_crash
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    ingest_photos(root, settings(Path(root)))


def settings(root: Path) -> IngestSettings:
    return IngestSettings(photos=str(root / "photos"), val_fraction=0, part_rows=8, max_quarantined=1)


class Poisoned(NamedTuple):
    """A dataset of 24 photos, three of which crash their reader, and the keys of these photos by crash."""

    published: dataset.Dataset
    quarantine: list[dict[str, Any]]
    crashes: list[str]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    root = tmp_path_factory.mktemp("poisoned")
    for i in range(24):
        key = f"{'AB'[i // 12]}/{i:02}.jpg"
        file = root / "photos" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)
        file.write_bytes(photo.encode(pixels) + (POISON + f"{key};".encode() if key in BAD else b""))
    command = [sys.executable, __file__, str(root), str(root / "crashes")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    published = dataset.load_dataset(str(root), "v1")
    rows = publishing.read_written(published.uri, "quarantine", dataset.QUARANTINE.names).to_pylist()
    return Poisoned(published, rows, (root / "crashes").read_text().split())


@pytest.mark.slow  # 40 s with its fixture
def test_photos_that_crash_their_reader_are_quarantined_and_their_neighbours_are_rows(poisoned: Poisoned):
    rows = [(row["key"], row["reason"], row["attempts"]) for row in poisoned.quarantine]
    assert sorted(rows) == [(key, "crashed", MAX_SINGLE_ATTEMPTS + 1) for key in BAD]
    assert poisoned.published.manifest["rows"] == 24 - len(BAD)


@pytest.mark.slow  # 40 s with its fixture
def test_no_photo_crashes_more_readers_than_it_has_attempts(poisoned: Poisoned):
    assert max(Counter(poisoned.crashes).values()) <= MAX_SINGLE_ATTEMPTS + 1


if __name__ == "__main__":
    drive(*sys.argv[1:])
