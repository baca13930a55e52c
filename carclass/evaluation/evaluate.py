"""Evaluation job: classify every photo of a split once, with the preprocessing of training, and write a report."""

import logging
import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from carclass import storage
from carclass.cluster import connection, resources
from carclass.config.schema import EvaluateSettings
from carclass.data import dataset, formats, streaming
from carclass.data.crash_guard import CrashGuard
from carclass.data.lease import hold_lease
from carclass.errors import UserError
from carclass.evaluation.collect import collect_report, report_uri, to_arrays
from carclass.evaluation.metrics import classification_metrics
from carclass.evaluation.report import render
from carclass.runs.predictor import Predictor
from carclass.runs.run import find_run
from carclass.runs.saved_model import read_model

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Metrics of an evaluation and the URI of its report."""

    accuracy: float
    metrics: dict[str, Any]
    report_uri: str


def evaluate_run(root: str, settings: EvaluateSettings) -> Evaluation:
    """Write `<run>/report/`. Raise UserError if run, dataset and classes do not match."""
    if settings.run is None:
        raise UserError("`evaluate.run` is missing: name the run to evaluate, e.g. --run sample.")
    run = find_run(root, settings.run)
    model_uri = run.model_uri(run.stages[-1])
    _, model_facts = read_model(model_uri)
    source = dataset.load_dataset(root, settings.dataset or run.settings.dataset)
    if source.classes != model_facts["classes"]:
        raise UserError(
            f"run `{settings.run}` and dataset `{source.name}` have different classes ({len(model_facts['classes'])} "
            f"and {len(source.classes)}). Evaluate on the run's training dataset, or on one masked from it."
        )
    if not source.manifest["splits"][settings.split]:
        raise UserError(f"dataset `{source.name}` has no {settings.split} photos. Choose another `evaluate.split`.")
    connection.connect({"root": root})
    uri = report_uri(run, source, settings)
    with hold_lease(uri, "evaluate") as lease:
        predictions = predict_split(source, settings, model_uri)
        labels, probabilities = to_arrays(predictions, source.classes)
        metrics = classification_metrics(labels, probabilities, source.classes)
        html = render(collect_report(run, source, settings, model_facts, metrics, predictions))
        sink = pa.BufferOutputStream()
        pq.write_table(predictions, sink, write_page_checksum=True)
        lease.check()
        storage.write_bytes(storage.join(uri, "predictions.parquet"), sink.getvalue().to_pybytes())
        formats.write(storage.join(uri, "metrics.json"), "evaluation", metrics)
        storage.write_bytes(storage.join(uri, "report.html"), html.encode())
    return Evaluation(metrics["accuracy"], metrics, storage.join(uri, "report.html"))


def predict_split(source: dataset.Dataset, settings: EvaluateSettings, model_uri: str) -> pa.Table:
    """Return key, label, predicted, confidence and probabilities of every photo of a split, ordered by key."""
    use_gpu = resources.decide_gpus(None, 1, "evaluate", None)
    resources.check_cpus(1, "evaluate")
    num_batches = math.ceil(source.manifest["splits"][settings.split] / settings.batch_size)
    count = min(resources.count_slots("GPU" if use_gpu else "CPU", 1), num_batches)
    rows = streaming.stream_rows(source, ["key", "label", "image"], settings.split)
    predicted = rows.map_batches(
        ClassifyRows,
        fn_constructor_kwargs={"model_uri": model_uri, "crash_guard": CrashGuard(), "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        num_cpus=streaming.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
    )
    table = pa.concat_tables(ray.get(predicted.to_arrow_refs())).sort_by("key")
    expected = source.read(["key", "split"]).filter(pc.field("split") == settings.split)["key"].to_pylist()
    assert table["key"].to_pylist() == sorted(expected), "a photo was classified twice or not at all"
    probabilities = np.stack(table["probabilities"].to_numpy())
    names = np.array(source.classes)[probabilities.argmax(1)]
    table = table.add_column(2, "predicted", pa.array(names.tolist()))
    return table.add_column(3, "confidence", pa.array(probabilities.max(1)))


class ClassifyRows:
    """A classifier actor: rows with an encoded image → key, label and class probabilities."""

    def __init__(self, model_uri: str, crash_guard: CrashGuard, *, use_gpu: bool) -> None:
        self.predictor, self.crash_guard = Predictor(model_uri, use_gpu=use_gpu), crash_guard

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Classify rows of `key`, `label` and `image`. Raise UserError for a photo that crashes workers."""
        images = batch["image"].to_pylist()
        probabilities = self.crash_guard.run_strictly(
            "classify",
            batch["key"].to_pylist(),
            lambda indices: self.predictor.probabilities([images[i] for i in indices]),
        )
        column = pa.array(probabilities, pa.list_(pa.float32()))
        return pa.table({"key": batch["key"], "label": batch["label"], "probabilities": column})
