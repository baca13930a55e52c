"""The frozen stage on cached features, against the loop that everyone writes, without Ray on either side.

The plain loop decodes every photo and runs the frozen backbone in every epoch. One of its epochs is timed and taken
times the number of epochs; its head is trained for all of them: as nothing is augmented, the backbone gives the same
features in every epoch, and the untimed epochs use those that the timed one has seen. Ours decodes, computes features
and trains the head for all epochs, and all of it is timed. Both sides have the same photos, size, precision, batch
size and learning rates, and validate after every epoch; neither augments (`views: 1`). What the default of two views
(each photo and its mirror image) takes is a figure of its own, against the same plain loop: a random flip in there
costs next to nothing, and a second view costs us a second pass. Accuracies are those of the last epoch.
"""

import time
from itertools import pairwise
from pathlib import Path

import torch

from carclass.config.schema import FrozenSettings, ModelSettings, TrainSettings
from carclass.models import resnet
from carclass.progress import say
from carclass.runs.run import Run
from carclass.tools.benchmarks import labelled, plain_training
from carclass.training import feature_cache, loop, pretrained
from carclass.training.dataloader import FeatureLoader, PhotoSamples

COUNTS = {"train": 2_400, "val": 2_400}
"""Many for val: with 2,400 photos a point of accuracy is 24 of them."""
EPOCHS, BATCH_SIZE, LR = 25, 64, 2e-3


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on the GPU, if there is one, else on all CPUs."""
    chosen = labelled.choose(photos, COUNTS)
    file = labelled.backbone_file(weights)
    labelled.lay_out(chosen, folder / "plain")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float] = {f"{split}_photos": count for split, count in COUNTS.items()}
    figures |= {"epochs": EPOCHS, "views": 1, "plain_epochs_timed": 1}
    cached = _cached(chosen, settings(file, 1), device)
    plain = _plain(chosen, file, folder / "plain", settings(file, 1), device)
    mirrored = _cached(chosen, settings(file, 2), device)
    figures |= {"plain_seconds": plain["seconds"], "cached_seconds": cached["seconds"]}
    figures |= {f"cached_{part}_seconds": cached[part] for part in ("decode", "features", "head")}
    figures |= {"val_accuracy_plain": plain["accuracy"], "val_accuracy_cached": cached["accuracy"]}
    figures["cached_vs_plain"] = plain["seconds"] / cached["seconds"]
    figures |= {"val_accuracy_cached_2_views": mirrored["accuracy"], "cached_2_views_seconds": mirrored["seconds"]}
    return figures | {"cached_2_views_vs_plain": plain["seconds"] / mirrored["seconds"]}


def settings(file: Path, views: int) -> TrainSettings:
    """Of both sides."""
    return TrainSettings(
        name="benchmark",
        parent=str(file),
        model=ModelSettings(stride_in_1x1=True),
        frozen=FrozenSettings(epochs=EPOCHS, lr=LR, batch_size=BATCH_SIZE, views=views),
        unfrozen=None,
    )


def _cached(chosen: dict[str, list[labelled.Photo]], ours: TrainSettings, device: torch.device) -> dict[str, float]:
    """Seconds of each part and of all, and the last epoch's val accuracy."""
    assert ours.frozen is not None
    torch.manual_seed(ours.seed)
    net = resnet.build(ours.model, labelled.num_classes(chosen))
    pretrained.load_backbone(net, ours)
    resnet.prepare_stage(net.to(device), "frozen")
    times = [time.perf_counter()]
    feeds = [
        PhotoSamples(labelled.decode(chosen[split], ours.model.image_size), seed=ours.seed)
        for split in ("train", "val")
    ]
    times.append(time.perf_counter())
    run_of = Run("", ours)
    found = [
        feature_cache.compute_features(net, feed, n, run_of, device)
        for feed, n in zip(feeds, (ours.frozen.views, 1), strict=True)
    ]
    times.append(time.perf_counter())
    batches = FeatureLoader(feeds[0], feeds[1], (found[0], found[1]), ours.frozen.batch_size, device)
    trained = loop.make_trained(net.fc, ours.frozen)
    trainee = loop.Trainee(trained, net.fc, ours.frozen, resnet.autocast("fp32", device), ours.seed)
    state = loop.TrainState()
    loop.train_epochs(trainee, batches, state, loop.Callbacks())
    times.append(time.perf_counter())
    say(f"carclass, {ours.frozen.views} view(s): {times[-1] - times[0]:.1f} s")
    parts = zip(("decode", "features", "head"), (end - start for start, end in pairwise(times)), strict=True)
    return {**dict(parts), "seconds": times[-1] - times[0], "accuracy": state.val_accuracies[-1]}


def _plain(
    chosen: dict[str, list[labelled.Photo]], file: Path, folder: Path, given: TrainSettings, device: torch.device
) -> dict[str, float]:
    """Seconds of one epoch times EPOCHS, and the val accuracy after all of them."""
    assert given.frozen is not None
    torch.manual_seed(given.seed)
    net = plain_training.network(file, given.model, labelled.num_classes(chosen)).to(device)
    trainer = plain_training.HeadTrainer(net.fc, given, len(chosen["train"]), device)
    size, batch_size = given.model.image_size, given.frozen.batch_size
    loaders = {
        split: plain_training.loader(folder / split, batch_size, size, changed=False, shuffle=split == "train")
        for split in ("train", "val")
    }
    epoch = plain_training.frozen_epoch(net, trainer, loaders)
    say(f"plain loop: {epoch.seconds:.1f} s for one of {EPOCHS} epochs")
    trainer.go_on(epoch.features["train"], epoch.labels["train"])
    accuracy = trainer.accuracy(epoch.features["val"], epoch.labels["val"])
    return {"seconds": EPOCHS * epoch.seconds, "accuracy": accuracy}
