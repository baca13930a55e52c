"""Evaluation, prediction and reading for training of photos that crash the process that decodes them.

The crashes are injected in a separate job: this file, run as a script, is its driver.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from carclass.config.schema import EvaluateSettings, IngestSettings, PredictSettings, TrainSettings
from carclass.data import dataset, photo
from carclass.data.crash_guard import MAX_SINGLE_ATTEMPTS
from carclass.errors import UserError, find_user_error
from carclass.evaluation import classification, evaluate
from carclass.ingestion.ingest import ingest_photos
from carclass.prediction import classify
from carclass.prediction.predict import predict_photos
from carclass.training import photo_store
from tests.helpers import runs

BAD = ("test/A/0.png", "train/B/7.png")
"""White photos, which crash the process that decodes them for the network."""


def crash_on_white(log: str, job: str) -> None:
    """Patch decoding to log white photos with the job, and crash the process."""
    decode = photo.decode_stored

    def decode_or_crash(data: bytes) -> np.ndarray:
        pixels = decode(data)
        if pixels.min() == 255:
            with open(log, "a") as file:
                file.write(f"{job}\n")
            signal.raise_signal(signal.SIGSEGV)  # in this thread, which must not go on meanwhile
        return pixels

    photo.decode_stored = decode_or_crash


def drive(root: Path) -> None:
    """Ingest, evaluate, predict and read for training; write the errors and rows as JSON."""
    import ray

    log = str(root / "crashes")

    class CrashingRows(classification.ClassifyRows):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            crash_on_white(log, "evaluate")
            super().__init__(*args, **kwargs)

    class CrashingPhotos(classify.ClassifyPhotos):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            crash_on_white(log, "predict")
            super().__init__(*args, **kwargs)

    def to_block_or_crash(*args: Any, **kwargs: Any) -> Any:
        if photo.decode_stored.__name__ == "decode_stored":
            crash_on_white(log, "train")
        return to_block_columns(*args, **kwargs)

    to_block_columns = photo_store.to_block_columns
    classification.ClassifyRows, classify.ClassifyPhotos = CrashingRows, CrashingPhotos  # type: ignore[misc]
    photo_store.to_block_columns = to_block_or_crash
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    source = ingest_photos(str(root), IngestSettings(photos=str(root / "photos")))
    run = runs.begin(root, TrainSettings(**runs.FROZEN, name="r", dataset="v1"))
    runs.finish(run, classes=source.classes)
    evaluated = partial(evaluate.evaluate_run, str(root), EvaluateSettings(run="r"))
    stored = partial(photo_store.store_split, source, "train", 32)
    errors = {"evaluate": error_of(evaluated), "train": error_of(stored)}
    predicted = predict_photos(
        str(root), PredictSettings(run="r", photos=str(root / "photos" / "test"), max_quarantined=1)
    )
    rows = dataset.read_part(f"{predicted.uri}/predictions.parquet", ["key", "label", "reason", "detail"]).to_pylist()
    (root / "result.json").write_text(json.dumps({"errors": errors, "rows": rows}))


def error_of(job: Callable[[], Any]) -> str:
    """Return the text of the UserError that a job ends with."""
    try:
        job()
    except UserError as error:
        return str(find_user_error(error))
    return ""


class Crashed(NamedTuple):
    """Results of jobs in which some photos crash the process that decodes them."""

    errors: dict[str, str]
    rows: dict[str, dict[str, Any]]  # of predictions, by key
    crashes: Counter[str]  # by job


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    root = tmp_path_factory.mktemp("crashed")
    for i in range(16):
        key = f"{'test' if i < 6 else 'train' if i < 12 else 'val'}/{'AB'[i % 2]}/{i}.png"
        file = root / "photos" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 200, (32 + i, 32, 3), np.uint8)
        file.write_bytes(photo.encode(np.full_like(pixels, 255) if key in BAD else pixels))
    command = [sys.executable, __file__, str(root)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    result = json.loads((root / "result.json").read_text())
    crashes = Counter((root / "crashes").read_text().split())
    return Crashed(result["errors"], {row["key"]: row for row in result["rows"]}, crashes)


@pytest.mark.nightly  # 120 s with its fixture
def test_photos_that_crash_the_classifier_are_predicted_as_crashed_and_their_neighbours_are_classified(
    crashed: Crashed,
):
    assert {key: row["reason"] for key, row in crashed.rows.items() if row["label"] is None} == {"A/0.png": "crashed"}
    assert len(crashed.rows) == 6


@pytest.mark.nightly  # 120 s with its fixture
@pytest.mark.parametrize(("job", "key"), [("evaluate", BAD[0]), ("train", BAD[1])])
def test_a_photo_that_crashes_a_job_which_cannot_leave_it_out_stops_the_job_with_its_name(
    crashed: Crashed, job: str, key: str
):
    assert crashed.errors[job].startswith(f"the photo {key} cannot be used: 3 processes crashed")
    assert "\n" not in crashed.errors[job]


@pytest.mark.nightly  # 120 s with its fixture
def test_no_photo_crashes_more_processes_than_it_has_attempts(crashed: Crashed):
    assert crashed.crashes == dict.fromkeys(("evaluate", "train", "predict"), MAX_SINGLE_ATTEMPTS + 1)


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
