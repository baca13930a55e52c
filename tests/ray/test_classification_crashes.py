"""Evaluation, prediction and reading for training of photos that crash the process that decodes them.

The crashes are injected in a separate job: this file, run as a script, is its driver.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from carclass.config.schema import EvaluateSettings, IngestSettings, PredictSettings, TrainSettings
from carclass.data import dataset, photo
from carclass.data.crash_guard import MAX_SINGLE_ATTEMPTS
from carclass.errors import UserError, find_user_error
from carclass.evaluation import evaluate
from carclass.ingestion.ingest import ingest_photos
from carclass.prediction import classify
from carclass.prediction.predict import predict_photos
from carclass.runs import predictor
from carclass.training import photo_store
from tests.helpers import runs

BAD = ("test/A/0.png", "test/B/5.png", "train/B/7.png")
"""White photos, which crash the process that decodes them for the network."""


def crash_on_white(log: str, module: Any) -> None:
    """Patch a module's decoding to count white photos and crash the process."""
    decode = module.decode_photos

    def decode_or_crash(images: Sequence[bytes], size: int) -> np.ndarray:
        pixels: np.ndarray = decode(images, size)
        if (white := (pixels.min((1, 2, 3)) == 255)).any():
            with open(log, "a") as file:
                file.write(f"{module.__name__} {white.sum()}\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        return pixels

    module.decode_photos = decode_or_crash


def drive(root: Path) -> None:
    """Ingest, evaluate, predict and read for training; write the errors and rows as JSON."""
    import ray

    log = str(root / "crashes")

    class CrashingRows(evaluate.ClassifyRows):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            crash_on_white(log, predictor)
            super().__init__(*args, **kwargs)

    class CrashingPhotos(classify.ClassifyPhotos):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            crash_on_white(log, predictor)
            super().__init__(*args, **kwargs)

    def to_block_or_crash(*args: Any, **kwargs: Any) -> Any:
        if photo_store.decode_photos.__name__ == "decode_photos":
            crash_on_white(log, photo_store)
        return to_block_columns(*args, **kwargs)

    to_block_columns = photo_store.to_block_columns
    evaluate.ClassifyRows, classify.ClassifyPhotos = CrashingRows, CrashingPhotos  # type: ignore[misc]
    photo_store.to_block_columns = to_block_or_crash
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    source = ingest_photos(str(root), IngestSettings(photos=str(root / "photos"), val_fraction=0.5))
    run = runs.begin(root, TrainSettings(**runs.FROZEN, name="r", dataset="v1"))
    runs.finish(run, classes=source.classes)
    evaluated = partial(evaluate.evaluate_run, str(root), EvaluateSettings(run="r"))
    stored = partial(photo_store.store_split, source, "train", 32)
    errors = {"evaluate": error_of(evaluated), "train": error_of(stored)}
    predicted = predict_photos(str(root), PredictSettings(run="r", photos=str(root / "photos"), max_quarantined=1))
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
    crashes: Counter[str]  # by module


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    root = tmp_path_factory.mktemp("crashed")
    for i in range(16):
        key = f"{'test' if i < 6 else 'train'}/{'AB'[i % 2]}/{i}.png"
        file = root / "photos" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 200, (32 + i, 32, 3), np.uint8)
        file.write_bytes(photo.encode(np.full_like(pixels, 255) if key in BAD else pixels))
    command = [sys.executable, __file__, str(root)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((root / "result.json").read_text())
    crashes = Counter(line.split()[0].rpartition(".")[2] for line in (root / "crashes").read_text().splitlines())
    return Crashed(result["errors"], {row["key"]: row for row in result["rows"]}, crashes)


@pytest.mark.slow  # 60 s with its fixture
def test_photos_that_crash_the_classifier_are_predicted_as_crashed_and_their_neighbours_are_classified(
    crashed: Crashed,
):
    assert [key for key, row in crashed.rows.items() if row["reason"] == "crashed"] == sorted(BAD)
    assert all((row["label"] is None) == (key in BAD) for key, row in crashed.rows.items())
    assert len(crashed.rows) == 16


@pytest.mark.slow  # 60 s with its fixture
@pytest.mark.parametrize(("job", "keys"), [("evaluate", BAD[:2]), ("train", BAD[2:])])
def test_a_photo_that_crashes_a_job_which_cannot_leave_it_out_stops_the_job_with_its_name(
    crashed: Crashed, job: str, keys: tuple[str, ...]
):
    error = crashed.errors[job]
    assert any(error.startswith(f"the photo {key} cannot be used: 3 processes crashed") for key in keys)
    assert "\n" not in error


@pytest.mark.slow  # 60 s with its fixture
def test_no_photo_crashes_more_classifiers_than_it_has_attempts(crashed: Crashed):
    attempts = MAX_SINGLE_ATTEMPTS + 1
    assert crashed.crashes["predictor"] <= attempts * (len(BAD) + 2)
    assert crashed.crashes["photo_store"] <= attempts


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
