"""The unfrozen stage in one process and without Ray: our steps against a plain script's, in photos per second.

The plain script has DataLoader, ImageFolder, torchvision's transforms and DDP, decodes in every epoch with as many
processes as there are cores (at most 16), crops and flips at random, and learns BatchNorm's statistics. Ours decodes
once, before the clock starts, as a stage of many epochs does; it flips, turns, zooms and changes colours at random,
averages the weights, and keeps BatchNorm's statistics, as the unfrozen stage does. Photos, size, precision,
batch size, optimizer and loss are the same. The sides take turns, the first steps of every turn are not counted, and
figures are medians. The share of time outside the model is what our steps take longer than steps on a batch that is on
the device already.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from carclass.config.schema import ModelSettings, TrainSettings, UnfrozenSettings
from carclass.models import resnet
from carclass.progress import say
from carclass.tools.benchmarks import labelled, plain_training
from carclass.tools.benchmarks.timing import WARM_UP, Clock
from carclass.training import cuda_graphs, loop, pretrained
from carclass.training.dataloader import Batch, PhotoBlock, PhotoLoader, PhotoSamples

BATCH_SIZE, ROUNDS = 32, 3
NUM_STEPS = {"cpu": 12, "cuda": 180}
"""Counted in a turn."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison on the GPU, if there is one, else on all CPUs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose(photos, device.type)
    given = settings(labelled.backbone_file(weights))
    classes = labelled.num_classes(chosen)
    plain_folder = labelled.lay_out(chosen, folder / "plain") / "train"
    blocks = labelled.decode(chosen["train"], given.model.image_size)
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "on_device": []}
    for _ in range(ROUNDS):
        plain = plain_training.unfrozen_rate(plain_folder, Path(given.parent), given.model_dump(), classes)
        rates["plain"].append(plain)
        for side, rate in ours(blocks, given, classes, device).items():
            rates[side].append(rate)
        say(", ".join(f"{side} {found[-1]:.2f} photos/s" for side, found in rates.items()))
    return figures(rates, len(chosen["train"]), given)


def choose(photos: Path | None, device: str) -> dict[str, list[labelled.Photo]]:
    """Enough for the steps of a turn."""
    return labelled.choose(photos, {"train": (WARM_UP + NUM_STEPS[device]) * BATCH_SIZE})


def settings(file: Path) -> TrainSettings:
    """Of both sides."""
    return TrainSettings(
        name="benchmark",
        parent=str(file),
        model=ModelSettings(stride_in_1x1=True),
        frozen=None,
        unfrozen=UnfrozenSettings(batch_size=BATCH_SIZE),
    )


def ours(blocks: list[PhotoBlock], given: TrainSettings, num_classes: int, device: torch.device) -> dict[str, float]:
    """Photos per second of our steps, and of the same steps on a batch that is on the device already."""
    trainee = trainee_of(given, num_classes, device)
    assert given.unfrozen is not None
    feed = PhotoSamples(blocks, seed=given.seed)
    photos, rates = PhotoLoader(feed, feed, given.augmentation, given.unfrozen, device), {}
    for name, repeat in (("ours", False), ("on_device", True)):
        batches = Timed(photos, repeat, Clock(device))
        loop.train_epoch(trainee, batches, loop.TrainState(), loop.Callbacks())
        rates[name] = batches.clock.rate()
    return rates


def trainee_of(given: TrainSettings, num_classes: int, device: torch.device) -> loop.Trainee:
    """The unfrozen stage at its start."""
    assert given.unfrozen is not None
    torch.manual_seed(given.seed)
    net = resnet.build(given.model, num_classes)
    pretrained.load_backbone(net, given)
    resnet.prepare_stage(net.to(device), "unfrozen")
    trained = loop.make_trained(net, given.unfrozen)
    forward = cuda_graphs.capture_if_faster(net, given.unfrozen.batch_size, given.model.image_size, given.precision)
    return loop.Trainee(trained, forward, given.unfrozen, resnet.autocast(given.precision, device), given.seed)


class Timed:
    """Batches on a clock. repeat: the first one over and over."""

    def __init__(self, batches: PhotoLoader, repeat: bool, clock: Clock) -> None:
        self.batches, self.repeat, self.clock, self.num_steps = batches, repeat, clock, batches.num_steps

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's steps after its first `start` samples."""
        for batch in self.clock.after_warm_up(self._batches(epoch, start)):
            yield batch
            self.clock.count(len(batch.labels))

    def val(self) -> Iterator[Batch]:
        """Nothing is validated here."""
        return iter(())

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        batches = self.batches.train(epoch, start)
        return iter([next(batches)] * self.num_steps) if self.repeat else batches


def figures(rates: dict[str, list[float]], num_photos: int, given: TrainSettings) -> dict[str, float]:
    """Medians over the turns, and of the turns' ratios."""
    ratios = [mine / plain for mine, plain in zip(rates["ours"], rates["plain"], strict=True)]
    outside = [1 - mine / model for mine, model in zip(rates["ours"], rates["on_device"], strict=True)]
    return {
        "photos": num_photos,
        "image_size": given.model.image_size,
        "batch_size": BATCH_SIZE,
        "turns": ROUNDS,
        "plain_images_per_s": median(rates["plain"]),
        "ours_images_per_s": median(rates["ours"]),
        "ours_vs_plain": median(ratios),
        "ours_vs_plain_lowest": min(ratios),
        "ours_vs_plain_highest": max(ratios),
        "share_outside_the_model": median(outside),
    }
