"""Small runs for tests, written by the same functions as in training, without training."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from carclass import storage
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.data import dataset, publishing
from carclass.models import architectures
from carclass.runs.checkpoint_index import WEIGHTS, checkpoint_name
from carclass.runs.metrics_log import MetricsLog
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model
from carclass.training import checkpoint

CLASSES = ["bus", "car", "truck"]
MODEL = {"architecture": "resnet26-narrow", "image_size": 32}
FROZEN: dict[str, Any] = {"model": MODEL, "frozen": {"epochs": 5}, "unfrozen": None, "parent": "sample"}


def publish_dataset(
    root: Path, name: str = "v2", classes: list[str] = CLASSES, seed: int = 1, splits: dict[str, int] | None = None
) -> dataset.Dataset:
    """Publish a dataset without photos. splits: the numbers of photos that it claims."""
    rows = sum((splits or {}).values())
    counts = {"inputs": rows, "rows": rows, "quarantined": 0, "splits": splits or {}, "reasons": {}}
    manifest = {"classes": classes, "kind": "photos", "settings": {"seed": seed}, "parts": [], **counts}
    complete = dataset.Dataset(dataset.dataset_uri(str(root), name), manifest)
    return publishing.publish_manifest(complete, dataset.find_dataset(str(root), name))


def begin(root: Path, settings: TrainSettings, parent_sha256: str = "0" * 64) -> Run:
    """Begin a run."""
    source = dataset.load_dataset(str(root), settings.dataset)
    return begin_run(Run(str(root), settings), source, parent_sha256)


def finish(
    run: Run,
    epochs: int = 5,
    kept: tuple[int, ...] = (2, 5),
    classes: list[str] = CLASSES,
    stage: str | None = None,
    scale: int = 10,
) -> None:
    """Finish a stage of a run, the last one by default; the classifier's bias is the number of the epoch.

    scale: the val accuracy of an epoch is its number divided by it.
    """
    stage = stage or run.stages[-1]
    torch.manual_seed(0)
    net = architectures.build(run.settings.model, len(classes))
    module = checkpoint.trained_module(net, stage)
    log = MetricsLog(run, stage, 0)
    for epoch in range(1, epochs + 1):
        torch.nn.init.constant_(net.fc[1].bias, epoch)
        figures = dict.fromkeys(
            ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"), epoch / scale
        )
        log.add({"epoch": epoch, "time": 1e9, **figures}, [])
        if epoch in kept:
            state = {"epoch": epoch, "val_accuracies": [n / scale for n in range(1, epoch + 1)]}
            snapshot = checkpoint.Snapshot(checkpoint_name(epoch), {WEIGHTS: module.state_dict()}, state)
            checkpoint.write_checkpoint(storage.join(run.uri, stage), snapshot)
    facts = {"run": run.settings.name, "stage": stage, "epoch": epochs, "val_accuracy": epochs / scale}
    facts |= {"classes": classes, "model": run.settings.model.model_dump(), "precision": run.settings.precision}
    publish_model(run.model_uri(stage), net, facts)


def publish_frozen_run(root: str, source: dataset.Dataset, name: str, model: ModelSettings, net: nn.Module) -> Run:
    """Publish a network as a run of a frozen stage on a dataset, and return the run."""
    settings = TrainSettings(name=name, dataset=source.name, parent="sample", model=model, unfrozen=None)
    run = begin_run(Run(root, settings), source, "0" * 64)
    facts = {"stage": "frozen", "epoch": 1, "val_accuracy": 0.5, "classes": source.classes, "precision": "fp32"}
    publish_model(run.model_uri("frozen"), net, {**facts, "model": model.model_dump()})
    return run
