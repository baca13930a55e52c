"""Prediction of a few photos in the job's own process, by the steps of classify.py: a cluster takes longer to start.

A photo that crashes the process ends the job. A file marks the attempt, so that the same command, run again, predicts
on a cluster, where such photos are set aside.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import torch

from carclass import storage
from carclass.cluster import connection
from carclass.data.crash_guard import NoCrashGuard
from carclass.data.draft import Draft
from carclass.formatting import count_text
from carclass.ingestion import archive
from carclass.prediction import classify
from carclass.prediction.classify import KEY_ROWS, ClassifyPhotos, DetectNewPhotos, PredictionJob
from carclass.progress import Progress

log = logging.getLogger(__name__)
FEW_PHOTOS, FEW_MASKED = 1000, 20
"""Photos that one process predicts before others have started and caught up, on the CPUs of one machine."""
ATTEMPT = "attempt"
"""File that exists during an attempt."""


def can_predict_here(draft: Draft, job: PredictionJob) -> bool:
    """Return True if no other process would help, and an attempt in a single process has not crashed before."""
    few = FEW_PHOTOS if job.mask is None else FEW_MASKED
    has_gpu = job.use_gpu is not False and torch.cuda.is_available()
    if draft.inventory.count_pending() > few or has_gpu or not connection.is_local():
        return False
    if not storage.exists(storage.join(draft.uri, ATTEMPT)):
        return True
    log.warning("predict: the last attempt was cut off; on a cluster, photos that crash their process are set aside")
    storage.delete(storage.join(draft.uri, ATTEMPT))
    return False


def predict_here(draft: Draft, job: PredictionJob) -> Iterator[pa.Table]:
    """Yield rows of PREDICTED for the pending photos, in tables of at most `part_rows` rows."""
    steps = PhotoSteps.load(job, draft.inventory.count_pending())
    with _mark_attempt(draft.uri):
        tables: list[pa.Table] = []
        for batch in _read_pending(draft, job):
            tables += [steps.classifier(rows) for rows in steps.prepare(batch)]
            if sum(map(len, tables)) >= job.settings.part_rows:
                yield pa.concat_tables(tables)
                tables = []
        if tables:
            yield pa.concat_tables(tables)


class PhotoSteps(NamedTuple):
    """The networks of a job, on all CPUs."""

    job: PredictionJob
    detector: DetectNewPhotos | None
    classifier: ClassifyPhotos
    masked: Progress

    @classmethod
    def load(cls, job: PredictionJob, num_photos: int) -> "PhotoSteps":
        log.info("predict: loading the classifier%s", "" if job.mask is None else " and the detector")
        threads = torch.get_num_threads()
        detector = None if job.mask is None else DetectNewPhotos(job.mask, NoCrashGuard(), use_gpu=False)
        classifier = ClassifyPhotos(job, NoCrashGuard(), use_gpu=False)
        torch.set_num_threads(threads)  # the actors of a cluster have a CPU each
        verb = "classifying" if detector is None else "masking and classifying"
        log.info("predict: %s %s", verb, count_text(num_photos, "photo"))
        return cls(job, detector, classifier, Progress("predict", "photos masked", num_photos))

    def prepare(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield rows of CLASSIFIER_INPUT for rows of INPUT or LOADED."""
        for rows in classify.read_batch(batch, NoCrashGuard(), self.job.reading):
            if self.job.mask is None:
                yield classify.select_input(rows, self.job.shown_share)
            else:
                detected = pa.concat_tables(self._detect(rows.slice(i, 1)) for i in range(len(rows)))
                yield from classify.cut_photos(detected, self.job.mask, self.job.shown_share)

    def _detect(self, row: pa.Table) -> pa.Table:
        """Convert one row of READ to DETECTED, and count it: a photo takes up to seconds."""
        assert self.detector is not None
        detected = self.detector(classify.decode_valid(row, NoCrashGuard()))
        self.masked.add(1)
        return detected


def _read_pending(draft: Draft, job: PredictionJob) -> Iterator[pa.Table]:
    """Yield the pending photos: rows of INPUT, or LOADED from an archive, one batch of the classifier at a time."""
    photos, batch_rows = job.settings.photos, job.settings.batch_size
    if not archive.is_archive(photos):
        return draft.inventory.pending(batch_rows)
    listing = pa.concat_tables(draft.inventory.pending(KEY_ROWS, hash_order=False))
    return archive.read_photos(photos, listing, batch_rows, "predict.photos")


@contextmanager
def _mark_attempt(uri: str) -> Iterator[None]:
    """Keep the file of an attempt while it lasts, also if it ends with an error, but not with the process."""
    storage.write_bytes(storage.join(uri, ATTEMPT), b"")
    try:
        yield
    finally:
        storage.delete(storage.join(uri, ATTEMPT))
