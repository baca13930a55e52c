"""Predictions for new photos through jobs/predict's machinery, against the original's way: one photo at a time.

Twice: for a run on photos that the real Mask R-CNN masked, and for one on photos as they are. Ours reads strictly,
hashes, detects, cuts, classifies, calibrates and writes every photo with its five likeliest classes. The plain loop
decodes with PIL, asks DefaultPredictor, crops, resizes and asks ResNet50 in float32, in one process with all cores.

Ours takes all the photos (NUM_PHOTOS at most), and two rates are taken of it: of the whole job, in which starting
processes and loading weights counts, and from the times at which its parts appeared, in which it doesn't. The plain
loop, whose loading never counts, needs seconds for each photo: NUM_PLAIN of them, spread evenly over the others, give
its rate when it masks, NUM_PLAIN_WHOLE when it doesn't; half of them come before ours and half after, so that a drift
of the machine's speed falls on both. The classifiers are ResNet50 with the backbone given and an untrained head, as
their answers take the same time.
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
from carclass.ingestion.ingest import ingest_photos
from carclass.masking import mask as masking
from carclass.models import resnet, weights
from carclass.prediction.predict import calibrate_run, predict_photos
from carclass.progress import say
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model, read_model
from carclass.tools.benchmarks import plain_prediction
from carclass.tools.benchmarks.labelled import backbone_file
from carclass.tools.benchmarks.plain_masking import detector_file, save_checkpoint, settings

NUM_PHOTOS, NUM_PLAIN, NUM_PLAIN_WHOLE = 2000, 60, 300
NUM_RUN = 24
"""Photos of the dataset that the runs are said to be trained on: enough to be calibrated."""
WARM_UP = 64
"""Photos that come out before the clock of the second rate starts."""
MODEL = ModelSettings(stride_in_1x1=True, image_size=plain_prediction.SIDE)


class Rates(NamedTuple):
    """Photos per second."""

    job: float
    steady: float


def run(photos: Path | None, weights_folder: Path | None, folder: Path) -> dict[str, float]:
    """Figures of both comparisons, on CPUs or GPUs, whichever the machine has.

    photos: a folder of .jpg; weights_folder: one with both networks' weights; folder: room to work in.
    """
    files = _choose(photos)
    weights_file, net = detector_file(weights_folder), _network(backbone_file(weights_folder))
    connection.connect()
    _publish_runs(files[:: len(files) // NUM_RUN][:NUM_RUN], weights_file, net, folder)
    (folder / "new").mkdir()
    for path in files:
        (folder / "new" / path.name).symlink_to(path.resolve())
    figures: dict[str, float] = {"photos": len(files)}
    plain_checkpoint = save_checkpoint(weights_file, folder)
    for name, known, count in (("masked", plain_checkpoint, NUM_PLAIN), ("whole", None, NUM_PLAIN_WHOLE)):
        predict = plain_prediction.PlainPredictor(PhotoClassifier(net), known)
        some = files[:: max(1, len(files) // count)][:count]
        before = plain_prediction.loop(predict, some[::2])
        ours = _ours(folder, name)
        plain = 2 / (1 / before + 1 / plain_prediction.loop(predict, some[1::2]))
        say(f"{name}: plain loop {plain:.2f}, carclass {ours.job:.2f} (job), {ours.steady:.2f} (steady) photos/s")
        figures |= {f"{name}_plain_photos_per_s": plain, f"{name}_job_photos_per_s": ours.job}
        figures |= {f"{name}_steady_photos_per_s": ours.steady, f"{name}_job_vs_plain": ours.job / plain}
        figures |= {f"{name}_steady_vs_plain": ours.steady / plain}
    return figures


def _choose(photos: Path | None) -> list[Path]:
    """NUM_PHOTOS of a folder, evenly spread over its names, or all of them."""
    files = sorted(photos.glob("*.jpg")) if photos else []
    if len(files) < 2 * WARM_UP:
        raise UserError(f"--photos: {photos} holds {len(files)} .jpg files; give a folder with at least {2 * WARM_UP}.")
    return files[:: max(1, len(files) // NUM_PHOTOS)][:NUM_PHOTOS]


def _network(backbone: Path) -> nn.Module:
    """A ResNet50 of two classes, its head untrained."""
    torch.manual_seed(1)
    net = resnet.build(MODEL, 2)
    state, _ = weights.load(str(backbone), None, sample="", key="--weights")
    own = net.state_dict()
    net.load_state_dict({**own, **{name: value.float() for name, value in state.items() if name in own}})
    return net.eval()


def _publish_runs(files: list[Path], weights_file: Path, net: nn.Module, folder: Path) -> None:
    """Runs `masked` and `whole`, with the datasets they stand on."""
    (folder / "known").mkdir()
    for path in files:
        (folder / "known" / path.name).symlink_to(path.resolve())
    rows = [f"{path.name},{'even' if i % 2 else 'odd'},train" for i, path in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["img_name,class,subset", *rows]))
    root, labels = str(folder), str(folder / "labels.csv")
    whole = ingest_photos(root, IngestSettings(photos=str(folder / "known"), labels=labels, val_fraction=0.5))
    masked = masking.mask_dataset(root, MaskSettings(detector=settings(weights_file, "fast")))
    for name, source in (("masked", masked), ("whole", whole)):
        this = Run(root, TrainSettings(name=name, dataset=source.name, model=MODEL, unfrozen=None))
        begin_run(this, source, "0" * 64)
        facts = {"model": MODEL.model_dump(), "classes": source.classes, "precision": "bf16"}
        publish_model(this.best("frozen"), net, facts)
        calibrate_run(this, read_model(this.best("frozen"))[1], batch_size=64)


def _ours(folder: Path, name: str) -> Rates:
    started = time.perf_counter()
    found = predict_photos(str(folder), PredictSettings(run=name, photos=str(folder / "new")))
    seconds = time.perf_counter() - started
    assert not found.counts.reasons, found.counts
    return Rates(found.counts.photos / seconds, _steady(Path(found.uri, "parts")))


def _steady(parts: Path) -> float:
    """Photos per second after WARM_UP photos, from the times at which parts appeared."""
    files = sorted(parts.iterdir(), key=lambda path: path.stat().st_mtime)
    done = np.cumsum([pq.read_metadata(path).num_rows for path in files])
    first = int(np.searchsorted(done, WARM_UP))
    return float((done[-1] - done[first]) / (files[-1].stat().st_mtime - files[first].stat().st_mtime))
