"""A small evaluated run on drawn cars, without training and without Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from carclass import storage
from carclass.config.schema import ModelSettings
from carclass.data import dataset, formats, photo, publishing
from carclass.evaluation.calibration import fit_calibration
from carclass.evaluation.metrics import classification_metrics
from carclass.models import architectures
from carclass.runs.calibration_record import write_calibration
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.predictor import Predictor
from carclass.runs.preprocessing_record import record_preprocessing
from carclass.runs.run import Run, find_run
from carclass.runs.saved_model import read_model
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS
from tests.helpers.parts import SETTINGS, publish
from tests.helpers.runs import publish_frozen_run

CLASSES = ["Ardo", "Belmar", "Corvo"]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=64)
READING = {"min_side": 16, "max_pixels": 1_000_000, "max_side": 160, "quality": 92}


def publish_photos(root: Path) -> dataset.Dataset:
    """Publish the dataset v1: three drawn photos of each class in every split."""
    rows: list[dict[str, Any]] = []
    for number, (split, label) in enumerate((s, c) for s in dataset.SPLITS for c in range(3) for _ in range(3)):
        pixels, _ = draw_photo((number, 1), MODELS[label], next(iter(SCENES)))
        image, key = photo.encode(photo.shrink(pixels, 160)), f"{split}/{number:02d}.jpg"
        size = {"width": 160, "height": 120}
        rows.append(
            {
                "key": key,
                "image_id": storage.sha256(image),
                "label": CLASSES[label],
                "split": split,
                "image": image,
                **size,
            }
        )
    uri, settings = dataset.dataset_uri(str(root), "v1"), SETTINGS | READING
    publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), settings)
    return publish(uri, [row["key"] for row in rows], classes=CLASSES, settings=settings)


def publish_evaluated_run(root: Path) -> Run:
    """Publish the run `first` on the dataset v1, with its calibration, an epoch of metrics, and its evaluation."""
    source = publish_photos(root)
    torch.manual_seed(3)
    publish_frozen_run(str(root), source, "first", MODEL, architectures.build(MODEL, len(CLASSES)).eval())
    run = find_run(str(root), "first")
    record_preprocessing(run, source)
    figures = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"), 0.5)
    MetricsLog(run, "frozen", 0).add({"epoch": 1, "time": 0.0, **figures}, [])
    facts = read_model(run.model_uri("frozen"))[1]
    _, labels, probabilities = predict(run, source, "val")
    write_calibration(run.model_uri("frozen"), fit_calibration(labels, probabilities, facts["sha256"]))
    keys, labels, probabilities = predict(run, source, "test")
    names = {"label": labels, "predicted": probabilities.argmax(1)}
    table = pa.table(
        {
            "key": keys,
            **{name: [CLASSES[index] for index in indices] for name, indices in names.items()},
            "confidence": probabilities.max(1),
            "probabilities": pa.array([*probabilities]),
        }
    )
    Path(run.uri, "report").mkdir()
    pq.write_table(table, Path(run.uri, "report", "predictions.parquet"), write_page_checksum=True)
    metrics = {"model_sha256": facts["sha256"], **classification_metrics(labels, probabilities, CLASSES)}
    formats.write(f"{run.uri}/report/metrics.json", "evaluation", metrics)
    return run


def predict(run: Run, source: dataset.Dataset, split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return keys, labels and probabilities of the photos of a split."""
    rows = [row for row in source.read(["key", "label", "split", "image"]).to_pylist() if row["split"] == split]
    probabilities = Predictor(run.model_uri("frozen"), use_gpu=False).probabilities([row["image"] for row in rows])
    return [row["key"] for row in rows], np.array([CLASSES.index(row["label"]) for row in rows]), probabilities
