"""Refit of a run: once more from its parent, on train and val photos together, for as many epochs as were best on val.

The stages are those of a run of its own, `<run>/refit`, whose last epoch is published as the model of the refit. Their
val accuracies are of photos that they were trained on; the refit is described by that of the model that was chosen.
"""

import logging

from carclass.config.schema import StageSettings, TrainSettings
from carclass.data import dataset
from carclass.runs.run import REFIT, Run, begin_run
from carclass.runs.saved_model import load_network, publish_model
from carclass.training.photo_store import BlockRefs

log = logging.getLogger(__name__)


def begin_refit(run: Run, source: dataset.Dataset) -> Run:
    """Begin the run of a refit, or resume it. run: finished but for its refit."""
    again = Run(run.root, refit_settings(run), f"{run.folder}/{run.settings.name}")
    epochs = ", ".join(f"{stage} {getattr(again.settings, stage).epochs}" for stage in again.stages)
    log.info("train: refit of run %s on train and val photos; epochs: %s", run.settings.name, epochs)
    return begin_run(again, source, run.lineage()["parent_sha256"])


def refit_settings(run: Run) -> TrainSettings:
    """Return the settings of a refit: all stages up to that of the best epoch, each for as many epochs as were best."""
    last = run.stages.index(run.best_stage)
    stages: dict[str, StageSettings | None] = dict.fromkeys(run.stages[last + 1 :])
    for stage in run.stages[: last + 1]:
        settings, epochs = getattr(run.settings, stage), run.model_facts(stage)["epoch"]
        changes = {"epochs": epochs, "warmup_epochs": min(settings.warmup_epochs, epochs / 2)}
        stages[stage] = settings.model_copy(update={**changes, "patience": None, "keep_epochs": ()})
    return run.settings.model_copy(update={**stages, "name": REFIT, "refit": False, "loggers": ()})


def join_splits(photos: BlockRefs) -> BlockRefs:
    """Return the photos of a refit, whose train split has the val photos too."""
    return {"train": [*photos["train"], *photos["val"]], "val": photos["val"]}


def publish_refit(run: Run, again: Run) -> None:
    """Publish the last epoch of a refit as the model of a run."""
    chosen = run.model_facts(run.best_stage)
    net, facts = load_network(again.model_uri(again.stages[-1]))
    facts = {key: facts[key] for key in ("classes", "model", "precision", "epoch")}
    facts |= {"run": run.settings.name, "stage": REFIT, "val_accuracy": chosen["val_accuracy"]}
    publish_model(run.model_uri(REFIT), net, {**facts, "chosen": {key: chosen[key] for key in ("stage", "epoch")}})
