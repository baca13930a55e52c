"""Classification of all photos of a split, with the preprocessing of training: by Ray Data, or few in this process."""

import logging
import math
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from carclass.cluster import connection, resources
from carclass.config.schema import EvaluateSettings
from carclass.data import dataset, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.formatting import count_text
from carclass.progress import Progress
from carclass.runs.predictor import Predictor

log = logging.getLogger(__name__)
FEW_PHOTOS = 1000
"""Photos that one process classifies before other processes have started and caught up, on the CPUs of one machine."""
COLUMNS = ["key", "label", "image", "image_id"]


def predict_split(
    source: dataset.Dataset, settings: EvaluateSettings, model_uri: str, trained_on_gpu: bool | None = None
) -> pa.Table:
    """Return key, label, predicted, confidence, probabilities and image_id of every photo of a split, by key.

    trained_on_gpu: `train.use_gpu` of the run; False: CPUs are used here too, otherwise GPUs if the cluster has any.
    """
    use_gpu = False if trained_on_gpu is False else None
    has_gpu = use_gpu is None and torch.cuda.is_available()
    num_photos = source.manifest["splits"][settings.split]
    if num_photos <= FEW_PHOTOS and not has_gpu and connection.is_local():
        table = classify_here(source, settings, model_uri)
    else:
        table = classify_on_cluster(source, settings, model_uri, use_gpu)
    table = table.sort_by("key")
    expected = source.read(["key", "split"]).filter(pc.field("split") == settings.split).sort_by("key")
    assert table["key"].equals(expected["key"]), "a photo was classified twice or not at all"
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in table["probabilities"].chunks])
    probabilities = values.reshape(len(table), -1)
    names = pa.array(source.classes, pa.string()).take(pa.array(probabilities.argmax(1)))
    table = table.add_column(2, "predicted", names)
    return table.add_column(3, "confidence", pa.array(probabilities.max(1)))


def classify_here(source: dataset.Dataset, settings: EvaluateSettings, model_uri: str) -> pa.Table:
    """Return columns of ClassifyRows for every photo of a split, classified on the CPUs of this process."""
    predictor, classified = Predictor(model_uri, use_gpu=False), []
    progress = Progress("evaluate", total=source.manifest["splits"][settings.split])
    for part in source.parts:
        rows = part.read(COLUMNS, pc.field("split") == settings.split)
        for batch in rows.to_batches(max_chunksize=settings.batch_size):
            probabilities = predictor.probabilities(batch["image"].to_pylist())
            classified.append(with_probabilities(pa.table(batch), probabilities))
            progress.add(len(batch))
    return pa.concat_tables(classified)


def classify_on_cluster(
    source: dataset.Dataset, settings: EvaluateSettings, model_uri: str, use_gpu: bool | None = None
) -> pa.Table:
    """Return columns of ClassifyRows for every photo of a split, classified by an actor pool.

    use_gpu: None: if available.
    """
    connection.connect({"root": source.uri})
    use_gpu = resources.decide_gpus(use_gpu, 1, "evaluate", None)
    resources.check_cpus(1, "evaluate")
    num_batches = math.ceil(source.manifest["splits"][settings.split] / settings.batch_size)
    count = min(resources.count_slots("GPU" if use_gpu else "CPU", 1), num_batches)
    log.info("evaluate: starting %s", count_text(count, "classifier"))
    rows = streaming.stream_rows(source, COLUMNS, settings.split)
    predicted = rows.map_batches(
        ClassifyRows,
        fn_constructor_kwargs={"model_uri": model_uri, "crash_guard": CrashGuard(), "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
    )
    return streaming.join_blocks(ray.get(predicted.to_arrow_refs()))


class ClassifyRows:
    """A classifier actor: rows with an encoded image → key, label, class probabilities and image_id."""

    def __init__(self, model_uri: str, crash_guard: CrashGuard, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        self.predictor, self.crash_guard = Predictor(model_uri, use_gpu=use_gpu), crash_guard

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Classify rows of `key`, `label`, `image` and `image_id`. Raise UserError for a photo that crashes workers."""
        images = batch["image"].to_pylist()
        probabilities = self.crash_guard.run_strictly(
            "classify",
            batch["key"].to_pylist(),
            lambda indices: self.predictor.probabilities([images[i] for i in indices]),
        )
        return with_probabilities(batch, probabilities)


def with_probabilities(batch: pa.Table, probabilities: Iterable[np.ndarray]) -> pa.Table:
    """Return key, label, probabilities and image_id of classified rows of COLUMNS."""
    column = pa.array([*probabilities], pa.list_(pa.float32()))
    columns = {"key": batch["key"], "label": batch["label"], "probabilities": column}
    return pa.table({**columns, "image_id": batch["image_id"]})
