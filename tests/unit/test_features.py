"""The frozen stage on cached features is the frozen stage on photos, only faster."""

from pathlib import Path

import numpy as np
import pytest
import torch

from carclass import config, lineage, model
from carclass.training import features, loop
from carclass.training.feed import Block, FeatureBatches, Feed, PhotoBatches, pixels_of

CPU = torch.device("cpu")
SETTINGS = config.Train(
    name="x",
    parent="sample",
    precision="fp32",
    model=config.Model(architecture="resnet26-narrow", image_size=64),
    augmentation=config.Augmentation(flip="none", rotation=0, zoom_height=0, zoom_width=0),
    frozen=config.Frozen(epochs=5, views=1, batch_size=8),
)


@pytest.fixture(scope="module")
def feeds(photos_folder: Path) -> tuple[Feed, Feed]:
    """Drawn cars: train and val."""
    photos = sorted((photos_folder / "photos").glob("*.jpg"))[:60]
    pixels = pixels_of([path.read_bytes() for path in photos], 64)
    labels, ids = np.arange(len(photos)) % 4, np.arange(len(photos)).astype(np.uint64)
    train, val = (Feed([Block(pixels[i::2], labels[i::2], ids[i::2])], seed=1) for i in range(2))
    return train, val


def epochs(batches: loop.Batches, net: torch.nn.Module, module: torch.nn.Module) -> list[dict[str, float]]:
    """The metrics of a whole stage."""
    assert SETTINGS.frozen is not None
    told: list[loop.Finished | None] = []
    trained = loop.make_trained(module, SETTINGS.frozen)
    trainee = loop.Trainee(trained, module, SETTINGS.frozen, model.autocast("fp32", CPU), seed=1)
    loop.run(trainee, batches, loop.State(), loop.Keeping(lambda state, finished, must: told.append(finished)))
    return [finished.metrics for finished in told if finished is not None]


def test_the_stage_on_cached_features_equals_the_one_on_photos(feeds: tuple[Feed, Feed]):
    assert SETTINGS.frozen is not None
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = model.build(SETTINGS.model, 4)
        model.load_parent(net, SETTINGS)
        model.prepare_stage(net, "frozen")
        nets.append(net)
    run = lineage.Run("", SETTINGS)
    found = tuple(features.compute(nets[0], feed, 1, run, CPU) for feed in feeds)
    cached = epochs(FeatureBatches(*feeds, found, 8, CPU), nets[0], nets[0].fc)
    plain = epochs(PhotoBatches(*feeds, SETTINGS.augmentation, 8, CPU), nets[1], nets[1])
    for ours, theirs in zip(cached, plain, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
