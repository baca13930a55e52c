"""Benchmark of the frozen stage: cached features against a plain training loop, both without Ray.

The plain loop decodes every photo and runs the frozen backbone in every epoch. One epoch is timed and multiplied by the
number of epochs; the head is then trained for the remaining epochs on the features of the timed one, which are the same
in every epoch without augmentation. carclass decodes, computes features and trains the head for all epochs, all timed.
Photos, size, precision, batch size, learning rates and validation after every epoch are the same; neither side augments
(`views: 1`). The default of two views (each photo and its mirror image) is measured against the same plain loop: there,
a random flip would cost next to nothing. Accuracies are those of the last epoch.
"""

import time
from itertools import pairwise
from pathlib import Path

import torch

from carclass.config.schema import FrozenSettings, ModelSettings, TrainSettings
from carclass.models import architectures, classifier
from carclass.progress import print_line
from carclass.runs.run import Run
from carclass.tools.benchmarks import labelled, plain_training
from carclass.training import feature_cache, loop, pretrained
from carclass.training.dataloader import FeatureLoader, PhotoSamples
from carclass.training.learner import make_learner

COUNTS = {"train": 2_400, "val": 2_400}
"""With 2,400 val photos, one percentage point of accuracy is 24 photos."""
EPOCHS, BATCH_SIZE, LR = 25, 64, 2e-3


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on the GPU, or on all CPUs without one, and return the figures."""
    splits = labelled.choose_photos(photos, COUNTS)
    backbone = labelled.backbone_file(weights)
    labelled.link_class_folders(splits, folder / "plain")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float] = {f"{split}_photos": count for split, count in COUNTS.items()}
    figures |= {"epochs": EPOCHS, "views": 1, "plain_epochs_timed": 1}
    cached = _run_cached(splits, _settings(backbone, 1), device)
    plain = _run_plain(splits, folder / "plain", _settings(backbone, 1), device)
    mirrored = _run_cached(splits, _settings(backbone, 2), device)
    figures |= {"plain_seconds": plain["seconds"], "cached_seconds": cached["seconds"]}
    figures |= {f"cached_{part}_seconds": cached[part] for part in ("decode", "features", "head")}
    figures |= {"val_accuracy_plain": plain["accuracy"], "val_accuracy_cached": cached["accuracy"]}
    figures["cached_vs_plain"] = plain["seconds"] / cached["seconds"]
    figures |= {"val_accuracy_cached_2_views": mirrored["accuracy"], "cached_2_views_seconds": mirrored["seconds"]}
    return figures | {"cached_2_views_vs_plain": plain["seconds"] / mirrored["seconds"]}


def _settings(backbone: Path, views: int) -> TrainSettings:
    """Return the settings of both sides."""
    return TrainSettings(
        name="benchmark",
        parent=str(backbone),
        model=ModelSettings(stride_in_1x1=True),
        frozen=FrozenSettings(epochs=EPOCHS, lr=LR, batch_size=BATCH_SIZE, views=views),
        unfrozen=None,
    )


def _run_cached(splits: labelled.Splits, settings: TrainSettings, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part and in total, and the last epoch's val accuracy."""
    assert settings.frozen is not None
    torch.manual_seed(settings.seed)
    net = architectures.build(settings.model, labelled.num_classes(splits))
    pretrained.load_backbone(net, settings)
    net.to(device).prepare_stage(settings.frozen)
    times = [time.perf_counter()]
    train, val = (
        PhotoSamples(labelled.decode(splits[split], settings.model.image_size), seed=settings.seed)
        for split in ("train", "val")
    )
    times.append(time.perf_counter())
    run = Run("", settings)
    train_features = feature_cache.compute_features(net, train, settings.frozen.views, run, device)
    val_features = feature_cache.compute_features(net, val, 1, run, device)
    times.append(time.perf_counter())
    loader = FeatureLoader(train, val, (train_features, val_features), settings.frozen.batch_size, device)
    learner = make_learner(net.fc, settings.frozen, classifier.autocast("fp32", device), settings.seed)
    state = loop.TrainState()
    loop.train_epochs(learner, loader, state, loop.Callbacks())
    times.append(time.perf_counter())
    print_line(f"carclass, {settings.frozen.views} view(s): {times[-1] - times[0]:.1f} s")
    parts = zip(("decode", "features", "head"), (end - start for start, end in pairwise(times)), strict=True)
    return {**dict(parts), "seconds": times[-1] - times[0], "accuracy": state.val_accuracies[-1]}


def _run_plain(
    splits: labelled.Splits, folder: Path, settings: TrainSettings, device: torch.device
) -> dict[str, float]:
    """Return the seconds of one epoch times EPOCHS, and the val accuracy after all epochs."""
    assert settings.frozen is not None
    torch.manual_seed(settings.seed)
    net = plain_training.build_network(Path(settings.parent), settings.model, labelled.num_classes(splits)).to(device)
    trainer = plain_training.HeadTrainer(net.fc, settings, len(splits["train"]), device)
    size, batch_size = settings.model.image_size, settings.frozen.batch_size
    loaders = {
        split: plain_training.make_loader(folder / split, batch_size, size, augment=False, shuffle=split == "train")
        for split in ("train", "val")
    }
    epoch = plain_training.train_frozen_epoch(net, trainer, loaders)
    print_line(f"plain loop: {epoch.seconds:.1f} s for one of {EPOCHS} epochs")
    trainer.train_remaining(epoch.features["train"], epoch.labels["train"])
    accuracy = trainer.accuracy(epoch.features["val"], epoch.labels["val"])
    return {"seconds": EPOCHS * epoch.seconds, "accuracy": accuracy}
