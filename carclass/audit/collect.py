"""Photos of a dataset as an audit compares them: features, thumbnails and measures."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from carclass.audit.near_duplicates import SIDE
from carclass.audit.photo_measures import PhotoMeasures, measure_photo, thumbnail
from carclass.config.schema import TrainSettings
from carclass.data import dataset, photo
from carclass.data.dataset import Dataset
from carclass.models import classifier
from carclass.models.classifier import Classifier
from carclass.models.preprocessing import to_network_input
from carclass.progress import Progress

BATCH_SIZE = 32
COLUMNS = ("key", "label", "split", "image")


class AuditedPhotos(NamedTuple):
    """All photos of a dataset, ordered by their key. The photos themselves are not kept."""

    classes: list[str]
    keys: list[str]
    splits: list[str]
    labels: np.ndarray  # int64 (N,), indices of classes
    features: np.ndarray  # float16 (N,D)
    thumbnails: np.ndarray  # uint8 (N,SIDE,SIDE)
    measures: np.ndarray  # float32 (N,len(PhotoMeasures._fields))


def read_photos(source: Dataset, net: Classifier, settings: TrainSettings) -> AuditedPhotos:
    """Return the features and measures of all photos of a dataset. net: on its device."""
    net.eval()
    number, rows = source.manifest["rows"], list[dict[str, Any]]()
    features = np.zeros((number, net.num_features), np.float16)
    thumbnails = np.zeros((number, SIDE, SIDE), np.uint8)
    measures = np.zeros((number, len(PhotoMeasures._fields)), np.float32)
    progress = Progress("audit", total=number)
    for batch in _batches(source):
        pixels = [photo.decode_stored(row.pop("image")) for row in batch]
        place = slice(len(rows), len(rows) + len(batch))
        features[place] = _features(net, pixels, settings)
        thumbnails[place] = [thumbnail(each) for each in pixels]
        measures[place] = [measure_photo(each) for each in pixels]
        rows += batch
        progress.add(len(batch))
    order = np.argsort(np.array([row["key"] for row in rows]), kind="stable")
    columns = {name: [rows[i][name] for i in order] for name in ("key", "label", "split")}
    labels = dataset.class_indices(pa.array(columns["label"]), source.classes)
    arrays = (labels, features[order], thumbnails[order], measures[order])
    return AuditedPhotos(source.classes, columns["key"], columns["split"], *arrays)


def _batches(source: Dataset) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a dataset, a part in memory at a time."""
    for table in source.read_parts(COLUMNS):
        for start in range(0, table.num_rows, BATCH_SIZE):
            yield table.slice(start, BATCH_SIZE).to_pylist()


@torch.inference_mode()
def _features(net: Classifier, pixels: list[np.ndarray], settings: TrainSettings) -> np.ndarray:
    size = settings.model.image_size
    squares = np.stack([photo.resize(each, size, size) for each in pixels])
    with classifier.autocast(settings.precision, net.device):
        return net.features(to_network_input(squares, net.device, net.normalisation)).half().cpu().numpy()
