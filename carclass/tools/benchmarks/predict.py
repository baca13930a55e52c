"""Benchmark of prediction: the job on new photos against a plain loop over single photos.

It is measured for a run on masked photos (Mask R-CNN) and for a run on whole photos. The job validates, hashes,
detects, crops, classifies, calibrates and writes every photo with its five most probable classes. The plain loop
decodes with PIL, runs DefaultPredictor, crops, resizes and runs ResNet50 in float32, in one process with all cores.

The job takes up to NUM_PHOTOS photos. Its throughput is measured over the whole job, with process start and loading of
weights, and in steady state, from the modification times of its parts. The plain loop, without loading of weights,
takes seconds per photo: it runs on a subset, NUM_PLAIN photos with masking and NUM_PLAIN_WHOLE without, half before and
half after the job, so that a drift of the machine's speed affects both. The classifiers are ResNet50 with an untrained
head, which takes the same time.
"""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from carclass.cluster import connection
from carclass.config.schema import IngestSettings, MaskSettings, ModelSettings, PredictSettings, TrainSettings
from carclass.errors import UserError
from carclass.evaluation.calibrate import calibrate_run
from carclass.ingestion.ingest import ingest_photos
from carclass.masking import mask as masking
from carclass.models import architectures, weights
from carclass.models.classifier import Classifier
from carclass.prediction.predict import predict_photos
from carclass.progress import print_line
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model
from carclass.tools.benchmarks import plain_prediction
from carclass.tools.benchmarks.labelled import backbone_file
from carclass.tools.benchmarks.plain_masking import detector_file, detector_settings, save_checkpoint

NUM_PHOTOS, NUM_PLAIN, NUM_PLAIN_WHOLE = 2000, 60, 300
NUM_RUN = 24
"""Photos in the datasets of the runs, enough for calibration."""
WARM_UP = 64
"""Photos before the steady-state measurement."""
MODEL = ModelSettings(stride_in_1x1=True, image_size=plain_prediction.SIDE)


class Rates(NamedTuple):
    """Photos per second of the whole job and in steady state."""

    job: float
    steady: float


def run(photos: Path | None, weights_folder: Path | None, folder: Path) -> dict[str, float]:
    """Measure on GPUs, or on CPUs without any, and return the figures.

    photos: a folder of .jpg files; weights_folder: weights of both networks; folder: for temporary files.
    """
    files = _choose_photos(photos)
    weights_file, net = detector_file(weights_folder), _network(backbone_file(weights_folder))
    connection.connect()
    _publish_runs(files[:: len(files) // NUM_RUN][:NUM_RUN], weights_file, net, folder)
    (folder / "new").mkdir()
    for path in files:
        (folder / "new" / path.name).symlink_to(path.resolve())
    figures: dict[str, float] = {"photos": len(files)}
    plain_checkpoint = save_checkpoint(weights_file, folder)
    for name, checkpoint, count in (("masked", plain_checkpoint, NUM_PLAIN), ("whole", None, NUM_PLAIN_WHOLE)):
        predict = plain_prediction.PlainPredictor(PhotoClassifier(net), checkpoint)
        subset = files[:: max(1, len(files) // count)][:count]
        before = plain_prediction.run_loop(predict, subset[::2])
        ours = _run_job(folder, name)
        plain = 2 / (1 / before + 1 / plain_prediction.run_loop(predict, subset[1::2]))
        print_line(
            f"{name}: plain loop {plain:.2f}, carclass {ours.job:.2f} (job), {ours.steady:.2f} (steady) photos/s"
        )
        figures |= {f"{name}_plain_photos_per_s": plain, f"{name}_job_photos_per_s": ours.job}
        figures |= {f"{name}_steady_photos_per_s": ours.steady, f"{name}_job_vs_plain": ours.job / plain}
        figures |= {f"{name}_steady_vs_plain": ours.steady / plain}
    return figures


def _choose_photos(photos: Path | None) -> list[Path]:
    """Return NUM_PHOTOS of a folder, evenly spread over its names, or all. Raise UserError if there are too few."""
    files = sorted(photos.glob("*.jpg")) if photos else []
    if len(files) < 2 * WARM_UP:
        raise UserError(f"--photos: {photos} holds {len(files)} .jpg files; give a folder with at least {2 * WARM_UP}.")
    return files[:: max(1, len(files) // NUM_PHOTOS)][:NUM_PHOTOS]


def _network(backbone: Path) -> Classifier:
    """Return a ResNet50 with two classes and an untrained head."""
    torch.manual_seed(1)
    net = architectures.build(MODEL, 2)
    state, _ = weights.load_weights(str(backbone), None, sample="", key="--weights")
    initial = net.state_dict()
    net.load_state_dict({**initial, **{name: value.float() for name, value in state.items() if name in initial}})
    return net.eval()


def _publish_runs(files: list[Path], weights_file: Path, net: nn.Module, folder: Path) -> None:
    """Publish the runs `masked` and `whole` with their datasets."""
    (folder / "labelled").mkdir()
    for path in files:
        (folder / "labelled" / path.name).symlink_to(path.resolve())
    rows = [f"{path.name},{'even' if i % 2 else 'odd'},train" for i, path in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["img_name,class,subset", *rows]))
    root, labels = str(folder), str(folder / "labels.csv")
    whole = ingest_photos(root, IngestSettings(photos=str(folder / "labelled"), labels=labels, val_fraction=0.5))
    masked = masking.mask_dataset(root, MaskSettings(detector=detector_settings(weights_file, "fast")))
    for name, source in (("masked", masked), ("whole", whole)):
        run = Run(root, TrainSettings(name=name, dataset=source.name, model=MODEL, unfrozen=None))
        begin_run(run, source, "0" * 64)
        facts = {
            "stage": "frozen",
            "epoch": 1,
            "val_accuracy": 0.5,
            "model": MODEL.model_dump(),
            "classes": source.classes,
            "precision": "bf16",
        }
        publish_model(run.model_uri("frozen"), net, facts)
        calibrate_run(run, run.model_uri("frozen"), run.model_facts("frozen"), batch_size=64)


def _run_job(folder: Path, name: str) -> Rates:
    """Predict the new photos with a run and return the rates."""
    started = time.perf_counter()
    prediction = predict_photos(str(folder), PredictSettings(run=name, photos=str(folder / "new")))
    seconds = time.perf_counter() - started
    assert not prediction.counts.reasons, prediction.counts
    return Rates(prediction.counts.files / seconds, _steady_rate(Path(prediction.uri, "parts")))


def _steady_rate(parts: Path) -> float:
    """Return the photos per second after WARM_UP photos from the modification times of the parts."""
    files = sorted(parts.iterdir(), key=lambda path: path.stat().st_mtime)
    done = np.cumsum([pq.read_metadata(path).num_rows for path in files])
    first = int(np.searchsorted(done, WARM_UP))
    return float((done[-1] - done[first]) / (files[-1].stat().st_mtime - files[first].stat().st_mtime))
