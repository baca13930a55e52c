"""A run and a dataset → a report: every photo of a split once, through the same preprocessing as in training."""

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from carclass import capacity, cluster, config, dataset, lineage, model, storage
from carclass.errors import UserError
from carclass.evaluation import metrics
from carclass.evaluation.report import MaskingSample, Mistake, Report, render
from carclass.training import checkpoint
from carclass.training.feed import pixels_of, to_device

log = logging.getLogger(__name__)
NUM_MISTAKES, NUM_MASKING_SAMPLES = 24, 12


class Outcome(NamedTuple):
    """What an evaluation found."""

    accuracy: float
    metrics: dict[str, Any]
    report_uri: str


class PredictPhotos:
    """A predictor process: rows with an image → key, label and probabilities."""

    def __init__(self, model_uri: str, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        state, facts = checkpoint.read_model(model_uri)
        self.settings = config.Model.model_validate(facts["model"])
        self.precision = facts["precision"]
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.net = model.build(self.settings, len(facts["classes"]))
        self.net.load_state_dict(state)
        self.net.eval().to(self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        column = pa.array(list(self.probabilities(batch["image"].to_pylist())), pa.list_(pa.float32()))
        return pa.table({"key": batch["key"], "label": batch["label"], "probabilities": column})

    @torch.inference_mode()
    def probabilities(self, images: Sequence[bytes], batch_size: int = 0) -> np.ndarray:
        """float32 (N,C) of N encoded photos.

        batch_size: fewer photos than that are filled up with black ones, so that the network's arithmetic, which
        depends on the size of its input, is always the same.
        """
        pixels = pixels_of(images, self.settings.image_size)
        missing = max(0, batch_size - len(pixels))
        photos = to_device(np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))), self.device)
        with model.autocast(self.precision, self.device):
            logits = self.net(photos)
        return logits.float().softmax(1).cpu().numpy()[: len(pixels)]


def run(root: str, settings: config.Evaluate) -> Outcome:
    """Writes `<run>/report/`; UserError when run, dataset and classes don't fit."""
    if settings.run is None:
        raise UserError("`evaluate.run` is missing: name the run to judge, e.g. --run sample.")
    this = lineage.load(root, settings.run)
    model_uri = this.best(this.stages[-1])
    _, facts = checkpoint.read_model(model_uri)
    source = dataset.load(root, settings.dataset or this.settings.dataset)
    if source.classes != facts["classes"]:
        raise UserError(
            f"run `{settings.run}` knows {len(facts['classes'])} classes, dataset `{source.name}` has "
            f"{len(source.classes)} or others. Evaluate on the dataset it was trained on, or one masked from it."
        )
    if not source.manifest["splits"][settings.split]:
        raise UserError(f"dataset `{source.name}` has no {settings.split} photos. Choose another `evaluate.split`.")
    cluster.connect()
    predictions = predict(source, settings, model_uri)
    labels, probabilities = to_arrays(predictions, source.classes)
    found = metrics.classification_metrics(labels, probabilities, source.classes)
    uri = _report_place(this, source, settings)
    page = render(_report(this, source, settings, facts, found, predictions))
    sink = pa.BufferOutputStream()
    pq.write_table(predictions, sink)
    storage.write_bytes(storage.join(uri, "predictions.parquet"), sink.getvalue().to_pybytes())
    storage.write_bytes(storage.join(uri, "metrics.json"), json.dumps(found, indent=1, ensure_ascii=False).encode())
    storage.write_bytes(storage.join(uri, "report.html"), page.encode())
    return Outcome(found["accuracy"], found, storage.join(uri, "report.html"))


def predict(source: dataset.Dataset, settings: config.Evaluate, model_uri: str) -> pa.Table:
    """key, label, predicted, confidence and probabilities of every photo of the split, in the order of keys."""
    use_gpu = capacity.gpus(None, 1, "evaluate", None)
    capacity.check_cpus(1, "evaluate")
    count = capacity.room("GPU" if use_gpu else "CPU", 1)
    rows = cluster.stream(source, ["key", "label", "image"], settings.split)
    predicted = rows.map_batches(
        PredictPhotos,
        fn_constructor_kwargs={"model_uri": model_uri, "use_gpu": use_gpu},
        compute=ray.data.ActorPoolStrategy(size=count),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        num_cpus=cluster.TASK_CPUS,
        num_gpus=1 if use_gpu else 0,
    )
    table = pa.concat_tables(ray.get(predicted.to_arrow_refs())).sort_by("key")
    expected = source.read(["key", "split"]).filter(pc.field("split") == settings.split)["key"].to_pylist()
    assert table["key"].to_pylist() == sorted(expected), "a photo was classified twice or not at all"
    probabilities = np.stack(table["probabilities"].to_numpy())
    names = np.array(source.classes)[probabilities.argmax(1)]
    table = table.add_column(2, "predicted", pa.array(names.tolist()))
    return table.add_column(3, "confidence", pa.array(probabilities.max(1)))


def to_arrays(predictions: pa.Table, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(int64 (N,) labels, float32 (N,C) probabilities) of a predictions table."""
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[label] for label in predictions["label"].to_pylist()])
    return labels, np.stack(predictions["probabilities"].to_numpy())


def _report_place(this: lineage.Run, source: dataset.Dataset, settings: config.Evaluate) -> str:
    usual = source.name == this.settings.dataset and settings.split == "test"
    return storage.join(this.uri, "report" if usual else f"report-{source.name}-{settings.split}")


def _report(
    this: lineage.Run,
    source: dataset.Dataset,
    settings: config.Evaluate,
    facts: dict[str, Any],
    found: dict[str, Any],
    predictions: pa.Table,
) -> Report:
    labels, probabilities = to_arrays(predictions, source.classes)
    history: dict[str, list[dict[str, Any]]] = {}
    for row in this.metrics():
        history.setdefault(row["stage"], []).append(row)
    return Report(
        title=f"{this.settings.name} on {source.name} {settings.split}",
        facts=_facts(this, source, settings, facts),
        metrics=found,
        class_names=source.classes,
        confusion=metrics.confusion_matrix(labels, probabilities.argmax(1), len(source.classes)),
        history=history,
        masking=_masking_samples(source, settings.split),
        mistakes=_mistakes(source, predictions),
        quarantined=source.manifest["reasons"] or _parent(source).manifest["reasons"],
    )


def _facts(
    this: lineage.Run, source: dataset.Dataset, settings: config.Evaluate, facts: dict[str, Any]
) -> list[tuple[str, str]]:
    origin = this.lineage()
    return [
        ("Run", this.settings.name),
        ("Model", f"{this.settings.model.architecture}, {this.settings.model.image_size} px"),
        ("Checkpoint", f"{facts['stage']} epoch {facts['epoch']}, val accuracy {facts['val_accuracy']:.3f}"),
        ("Parent", f"{origin['parent']} (sha256 {origin['parent_sha256'][:12]}…)"),
        ("Trained on", f"{this.settings.dataset} (sha256 {origin['dataset_digest'][:12]}…)"),
        ("Evaluated on", f"{source.name}, {settings.split}: {source.manifest['splits'][settings.split]:,} photos"),
        ("Seed", str(this.settings.seed)),
        ("Code", origin["code"]),
    ]


def _mistakes(source: dataset.Dataset, predictions: pa.Table) -> list[Mistake]:
    """The wrong answers given with most confidence, with their photos."""
    wrong = predictions.filter(pc.not_equal(predictions["label"], predictions["predicted"]))
    rows = wrong.drop(["probabilities"]).sort_by([("confidence", "descending")]).slice(0, NUM_MISTAKES).to_pylist()
    photos = {row["key"]: row["image"] for row in source.rows([row["key"] for row in rows], ["image"])}
    return [
        Mistake(
            photo=photos[row["key"]],
            key=row["key"],
            label=row["label"],
            predicted=row["predicted"],
            confidence=row["confidence"],
        )
        for row in rows
    ]


def _parent(source: dataset.Dataset) -> dataset.Dataset:
    """The dataset that a masked one was made from; an unmasked one itself."""
    name = source.manifest["settings"].get("source")
    return dataset.load(source.uri.rsplit("/", 2)[0], name) if name else source


def _masking_samples(source: dataset.Dataset, split: str) -> list[MaskingSample]:
    """Photos before and after masking, chosen by content; none for an unmasked dataset."""
    if source.manifest["kind"] != "masked":
        return []
    index = source.read(["image_id", "key", "split"]).filter(pc.field("split") == split).sort_by("image_id")
    keys = index["key"].to_pylist()[:NUM_MASKING_SAMPLES]
    before = {row["key"]: row["image"] for row in _parent(source).rows(keys, ["image"])}
    columns = ["image", "outcome", "vehicle_class", "score"]
    return [
        MaskingSample(caption=_caption(row), before=before[row["key"]], after=row["image"])
        for row in source.rows(keys, columns)
    ]


def _caption(row: dict[str, Any]) -> str:
    if row["outcome"] == "no_vehicle":
        return f"{row['key']}: no vehicle found"
    return f"{row['key']}: {row['vehicle_class']}, score {row['score']:.2f}"
