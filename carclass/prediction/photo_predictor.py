"""Prediction of photos in this process, by the steps of jobs/predict.py: read, mask, resize, classify, calibrate."""

import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image, ImageFile

from carclass import storage
from carclass.data import photo
from carclass.data.quarantine import PhotoError
from carclass.errors import UserError
from carclass.evaluation import calibration
from carclass.formatting import count_text
from carclass.ingestion.reading import failed_row, to_row
from carclass.masking.detection import detection_columns
from carclass.masking.writer import DETECTED, cut_rows
from carclass.prediction.detector_weights import mask_settings
from carclass.prediction.predictions import PREDICTION, prediction_columns
from carclass.progress import Progress
from carclass.runs.calibration_record import require_calibration
from carclass.runs.predictor import Predictor
from carclass.runs.preprocessing_record import load_preprocessing
from carclass.runs.run import Run

log = logging.getLogger(__name__)
Row = dict[str, Any]
PhotoSource = str | os.PathLike[str] | Image.Image
"""A photo to predict: a path, a URI, or an image of PIL."""
BATCH_SIZE = 64
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of PIL that PNG stores without a loss."""
ALPHA_MODES = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
PHOTO_MODES = (*PNG_MODES, *ALPHA_MODES, "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""All modes of photos; those that PNG lacks are converted, to RGB unless ALPHA_MODES has another one."""
ORIENTATION = 0x0112
"""EXIF's tag."""


class PhotoPredictor:
    """All that predicts photos with a run's model, loaded once, on a GPU if there is one and `train.use_gpu` allows it.

    Raise UserError if the preprocessing of the run's photos cannot be repeated, or the model is not calibrated.
    """

    def __init__(self, run: Run, model_uri: str, detector_weights: str | None = None) -> None:
        device = "cuda" if run.settings.use_gpu is not False and torch.cuda.is_available() else "cpu"
        preprocessing = load_preprocessing(run)
        self.reading = preprocessing.ingest_settings(run.uri)  # the place is not used
        self.mask = mask_settings(preprocessing, run.root, detector_weights)
        log.info("predict: loading the classifier of run %s", run.settings.name)
        self.classifier = Predictor(model_uri, use_gpu=device == "cuda")
        self.calibration = require_calibration(run, model_uri, self.classifier.sha256)
        self.detector = None
        if self.mask is not None:
            log.info("predict: loading the detector %s", self.mask.detector.model)
            from carclass.masking.detector import Detector  # imported late: it needs Detectron2

            self.detector = Detector(self.mask.detector, self.mask.choice, device)

    def __call__(self, photos: PhotoSource | Iterable[PhotoSource]) -> pa.Table:
        """Return rows of PREDICTION without `rejected`, in the order of the photos."""
        sources: list[Any] = [photos]
        if isinstance(photos, Iterable) and not isinstance(photos, str | bytes | os.PathLike | Image.Image):
            sources = [*photos]
        check_sources(sources)
        verb = "classifying" if self.detector is None else "masking and classifying"
        log.info("predict: %s %s", verb, count_text(len(sources), "photo"))
        rows, progress = list[Row](), Progress("predict", total=len(sources))
        for start in range(0, len(sources), BATCH_SIZE):
            prepared = []
            for row in load_sources(sources[start : start + BATCH_SIZE], start):
                prepared.append(self._prepare(row))
                progress.add(1)
            rows += self._classify(prepared)
        return pa.Table.from_pylist(rows, PREDICTION).drop(["rejected"])

    def _prepare(self, source: Row) -> Row:
        """Convert a row of archive.LOADED to a row of classify.CLASSIFIER_INPUT."""
        try:
            row = to_row(source, self.reading) | {"reason": None, "detail": None, "attempts": None}
            return row if self.detector is None else self._remove_background(row)
        except PhotoError as error:
            return failed_row(source, error)

    def _remove_background(self, row: Row) -> Row:
        assert self.detector is not None
        assert self.mask is not None
        pixels = photo.decode_stored(row["image"])
        (detection,) = self.detector([pixels])
        size = {"source_height": pixels.shape[0], "source_width": pixels.shape[1]}
        detected = {**row, **size, **detection_columns(detection, self.mask.detector.classes)}
        (cut,) = cut_rows(pa.Table.from_pylist([detected], DETECTED), self.mask)
        return cut

    def _classify(self, rows: Sequence[Row]) -> list[Row]:
        valid = [row for row in rows if row["reason"] is None]
        if valid:
            probabilities = self.classifier.probabilities([row["image"] for row in valid])
            calibrated = calibration.apply_temperature(probabilities, self.calibration.temperature)
            for row, columns in zip(valid, prediction_columns(calibrated, self.classifier.classes, 0.0), strict=True):
                row |= columns
        return list(rows)


def check_sources(sources: Sequence[Any]) -> None:
    """Raise UserError for the first one that is no path, URI or image, or a reduced image."""
    for number, item in enumerate(sources):
        if not isinstance(item, str | os.PathLike | Image.Image):
            raise UserError(
                f"photo {number} is of type {type(item).__name__}: give paths, URIs or PIL images. `run.model` takes "
                "tensors, of photos that are masked and resized already."
            )
        if not isinstance(item, Image.Image) and os.path.isdir(item):
            raise UserError(
                f"{os.fspath(item)} is a folder: give a list of its photos, or predict it by `carclass predict`."
            )
        if isinstance(item, Image.Image) and item.mode not in PHOTO_MODES:
            raise UserError(f"photo {number} has PIL's mode {item.mode}, whose range is unknown: convert it to RGB.")
        if isinstance(item, ImageFile.ImageFile) and _is_reduced(item):
            raise UserError(
                f"photo {number} has another size or mode than its file: PIL's `draft` or `thumbnail` reduced it "
                f"to {item.width} x {item.height} {item.mode}, so its prediction is not that of the file. Give the "
                "path, an image that is not reduced, or its `copy()` to predict the reduced pixels."
            )


def _is_reduced(image: ImageFile.ImageFile) -> bool:
    """Return True if a loaded image was reduced in place. One that is not loaded is read as its file."""
    if image.tile or image.tell() != 0:
        return False
    scale, *_ = getattr(image, "decoderconfig", None) or (1,)
    try:
        with Image.open(image.filename) as file:
            is_same_mode = file.mode == image.mode or image.format != "JPEG"  # others' modes may change as they load
            is_same_size = sorted(file.size) == sorted(image.size)  # turned in place by EXIF, it is not reduced
            return scale > 1 or not is_same_size or not is_same_mode
    except photo.PIL_ERRORS:  # of an image from memory, or whose file is gone
        return bool(scale > 1)


def load_sources(sources: Sequence[PhotoSource], start: int = 0) -> Iterator[Row]:
    """Yield rows of archive.LOADED. start: number of the first photo, for the keys of images without a file name."""
    read = storage.read_many(os.fspath(item) for item in sources if not isinstance(item, Image.Image))
    for number, item in enumerate(sources, start):
        if isinstance(item, Image.Image):
            key, content = getattr(item, "filename", "") or f"photo {number}", encode_image(item)
        else:
            key, content = os.fspath(item), next(read)
        data, error = (None, str(content)) if isinstance(content, Exception) else (content, None)
        yield {"key": key, "label": None, "subset": "test", "fingerprint": None, "data": data, "error": error}


def encode_image(image: Image.Image) -> bytes | Exception:
    """Return the bytes of an image's file if it has the image's pixels, else a PNG of its pixels and orientation.

    Return the error of an image that cannot be loaded any more, as its file is closed or damaged.
    """
    try:
        return _encode_image(image)
    except photo.PIL_ERRORS as error:
        return error


def _encode_image(image: Image.Image) -> bytes:
    file = getattr(image, "fp", None)
    if getattr(image, "tile", None) and file is not None and not file.closed and image.tell() == 0:
        position = file.tell()
        file.seek(0)
        data = bytes(file.read())
        file.seek(position)
        return data
    if isinstance(image, ImageFile.ImageFile) and (unchanged := _read_unchanged(image)) is not None:
        return unchanged
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    if image.mode not in PNG_MODES:
        image = image.convert(ALPHA_MODES.get(image.mode, "RGB"))
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def _read_unchanged(image: ImageFile.ImageFile) -> bytes | None:
    """Return the bytes of a loaded image's file; None if it cannot be read, or the image was changed since."""
    try:
        data = Path(os.fsdecode(image.filename)).read_bytes()
        with Image.open(io.BytesIO(data)) as original:
            original.load()
            is_same = original == image and original.getexif().get(ORIENTATION) == image.getexif().get(ORIENTATION)
            return data if is_same else None
    except photo.PIL_ERRORS:
        return None
