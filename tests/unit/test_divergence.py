"""Record of a stage that diverged: written when training ends, shown by the tree, gone once the stage is trained."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from carclass.config.schema import TrainSettings
from carclass.data.dataset import Dataset
from carclass.errors import find_user_error
from carclass.experiments import tree_view
from carclass.experiments.tree import Budget, Experiment, Tree
from carclass.runs.divergence_record import divergence_text, record_divergence
from carclass.runs.run import Run, begin_run
from carclass.training import feature_cache
from carclass.training.loop import DivergedError
from carclass.training.train import TrainResources, load_run_inputs, train_stages
from tests.helpers.runs import FROZEN, MODEL, publish_dataset

WIDTH, PHOTOS = 512, 12


def begin(root: Path, **frozen: Any) -> tuple[Run, Dataset]:
    """Begin a run whose features are cached."""
    source = publish_dataset(root, splits={"train": PHOTOS, "val": PHOTOS, "test": 1})
    stage = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "optimizer": "sgd", **frozen}
    settings = TrainSettings(name="first", **{**FROZEN, "model": MODEL, "frozen": stage}, loggers=[])
    run = begin_run(Run(str(root), settings), source, load_run_inputs(str(root), settings)[1])
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for split in ("train", "val"):
        views = run.settings.frozen.views if run.settings.frozen and split == "train" else 1
        tensors[split] = torch.rand(views, PHOTOS, WIDTH, generator=generator).half()
        tensors[f"{split}_labels"] = torch.arange(PHOTOS) % len(source.classes)
        tensors[f"{split}_ids"] = torch.arange(PHOTOS)
    path = Path(feature_cache.cache_uri(run, source.digest))
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return run, source


def train(run: Run, source: Dataset) -> None:
    resources = TrainResources(use_gpu=False, devices_per_worker=1, in_process=True, verbose=False)
    train_stages(run, source, dict, resources, run.unfinished_stages)


def show(run: Run) -> str:
    experiment = Experiment("first.yml", run.settings)
    return tree_view.draw_tree(Tree(Budget(root=run.root, experiments="exp_*.yml"), [experiment]))


def test_a_run_that_diverged_is_shown_with_the_epoch_and_the_step(tmp_path: Path):
    run, source = begin(tmp_path, lr=1e30)
    assert "begun" in show(run)
    with pytest.raises(DivergedError):
        train(run, source)
    assert "diverged  (frozen epoch 1, step 3: loss not finite)" in show(run)


def test_a_stage_that_is_trained_to_its_end_has_not_diverged(tmp_path: Path):
    run, source = begin(tmp_path, lr=1e-3)
    record_divergence(run, "frozen", 2, 7, "val loss")
    assert divergence_text(run) == "frozen epoch 2, step 7: val loss not finite"
    train(run, source)
    assert divergence_text(run) is None
    assert not Path(run.uri, "frozen", "diverged.json").exists()
    assert "finished" in show(run)


def test_the_place_of_a_divergence_survives_a_worker():
    error = pickle.loads(pickle.dumps(DivergedError("training diverged", 3, 7, "weights")))
    assert (str(error), error.epoch, error.step, error.quantity) == ("training diverged", 3, 7, "weights")
    assert find_user_error(error) is error
