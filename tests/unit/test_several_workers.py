"""Training by several workers: the losses and weights of one, as rows are sharded and gradients are averaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from carclass.config.schema import AugmentationSettings, ModelSettings, UnfrozenSettings
from carclass.models import architectures, classifier
from carclass.training import loop
from carclass.training.dataloader import PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import make_learner
from carclass.training.preemption import StepCheck, WorkerContext
from carclass.training.worker import DDP

CPU = torch.device("cpu")
SIDE, CLASSES, PHOTOS = 32, 4, 29
STAGE = UnfrozenSettings(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=1, ema_decay=0.9)


def train(rank: int, num_workers: int) -> tuple[list[float], list[torch.Tensor]]:
    """Return the losses of all steps and the averaged weights after two epochs, whose last steps have five photos."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = architectures.build(ModelSettings(architecture="resnet26-narrow", image_size=SIDE, dropout=0.3), CLASSES)
    net.prepare_stage(STAGE)
    learner = make_learner(net, STAGE, classifier.autocast("fp32", CPU), seed=1)
    if num_workers > 1:
        learner = learner._replace(forward=DistributedDataParallel(net, **DDP))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PHOTOS, SIDE, SIDE, 3), np.uint8)
    block = PhotoBlock(pixels, rng.integers(0, CLASSES, PHOTOS), rng.integers(0, 2**63, PHOTOS, np.uint64))
    samples = PhotoSamples([block], seed=1, rank=rank, num_workers=num_workers)
    loader = PhotoLoader(samples, samples, AugmentationSettings(), STAGE, CPU)
    losses: list[float] = []
    check = StepCheck(WorkerContext(rank, num_workers, CPU, lambda: False))
    callbacks = loop.Callbacks(
        on_epoch_end=lambda _state, _metrics, steps: losses.extend(row["loss"] for row in steps), after_step=check
    )
    assert loop.train_epochs(learner, loader, loop.TrainState(), callbacks)
    return losses, [tensor.detach() for tensor in learner.eval_module.parameters()]


def train_in_group(rank: int, num_workers: int, file: str, results: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=num_workers)
    losses, weights = train(rank, num_workers)
    results.put((rank, losses, [tensor.numpy() for tensor in weights]))
    distributed.destroy_process_group()


@pytest.mark.slow  # 30 s: four processes import PyTorch
def test_four_workers_have_the_losses_and_weights_of_one(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (4, str(tmp_path / "group"), results)
    processes = [context.Process(target=train_in_group, args=(rank, *arguments)) for rank in range(4)]
    for process in processes:
        process.start()
    found = {rank: (losses, weights) for rank, losses, weights in (results.get(timeout=300) for _ in processes)}
    for process in processes:
        process.join()
    threads = torch.get_num_threads()
    expected_losses, expected_weights = train(0, 1)
    torch.set_num_threads(threads)
    for losses, weights in found.values():
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for tensor, expected in zip(weights, expected_weights, strict=True):
            # As a whole: Adam amplifies the rounding of gradients near zero.
            assert np.linalg.norm(tensor - expected.numpy()) < 1e-3 * np.linalg.norm(expected.numpy())
