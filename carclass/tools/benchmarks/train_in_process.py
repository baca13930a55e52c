"""Benchmark of the unfrozen stage in one process without Ray: training steps against a plain script's.

The plain script uses DataLoader, ImageFolder, torchvision's transforms and DDP, decodes in every epoch with one process
per core (at most 16), crops and flips at random, and updates BatchNorm's statistics. carclass decodes once, before the
measurement, as a stage of many epochs does; it flips, rotates, zooms and jitters colours at random, averages the
weights, and keeps BatchNorm's statistics. Photos, size, precision, batch size, optimizer and loss are the same. The
sides alternate, the first steps of every turn are a warm-up, and figures are medians. The share of time outside the
model compares the steps with steps on a batch that is already on the device.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from carclass.config.schema import ModelSettings, TrainSettings, UnfrozenSettings
from carclass.models import architectures, classifier
from carclass.progress import print_line
from carclass.tools.benchmarks import labelled, plain_training
from carclass.tools.benchmarks.timing import WARM_UP, ThroughputClock
from carclass.training import cuda_graphs, loop, pretrained
from carclass.training.dataloader import Batch, PhotoBlock, PhotoLoader, PhotoSamples
from carclass.training.learner import Learner, make_learner

BATCH_SIZE, TURNS = 32, 3
NUM_STEPS = {"cpu": 12, "cuda": 180}
"""Measured steps of a turn."""


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Measure on the GPU, or on all CPUs without one, and return the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = choose_photos(photos, device.type)
    settings = make_settings(labelled.backbone_file(weights))
    num_classes = labelled.num_classes(splits)
    plain_folder = labelled.link_class_folders(splits, folder / "plain") / "train"
    blocks = labelled.decode(splits["train"], settings.model.image_size)
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "on_device": []}
    for _ in range(TURNS):
        plain = plain_training.measure_unfrozen(plain_folder, Path(settings.parent), settings.model_dump(), num_classes)
        rates["plain"].append(plain)
        for side, rate in measure_steps(blocks, settings, num_classes, device).items():
            rates[side].append(rate)
        print_line(", ".join(f"{side} {turns[-1]:.2f} photos/s" for side, turns in rates.items()))
    return summarise(rates, len(splits["train"]), settings)


def choose_photos(photos: Path | None, device: str) -> labelled.Splits:
    """Choose the photos of a turn's steps."""
    return labelled.choose_photos(photos, {"train": (WARM_UP + NUM_STEPS[device]) * BATCH_SIZE})


def make_settings(backbone: Path) -> TrainSettings:
    """Return the settings of both sides."""
    return TrainSettings(
        name="benchmark",
        parent=str(backbone),
        model=ModelSettings(stride_in_1x1=True),
        frozen=None,
        unfrozen=UnfrozenSettings(batch_size=BATCH_SIZE),
    )


def measure_steps(
    blocks: list[PhotoBlock], settings: TrainSettings, num_classes: int, device: torch.device
) -> dict[str, float]:
    """Return the photos per second of the stage's steps, and of the same steps on a batch already on the device."""
    learner = unfrozen_learner(settings, num_classes, device)
    assert settings.unfrozen is not None
    samples = PhotoSamples(blocks, seed=settings.seed)
    photos, rates = PhotoLoader(samples, samples, settings.augmentation, settings.unfrozen, device), {}
    for name, repeat in (("ours", False), ("on_device", True)):
        loader = TimedLoader(photos, repeat, ThroughputClock(device))
        loop.train_epoch(learner, loader, loop.TrainState(), loop.Callbacks())
        rates[name] = loader.clock.rate()
    return rates


def unfrozen_learner(settings: TrainSettings, num_classes: int, device: torch.device) -> Learner:
    """Return the learner at the start of the unfrozen stage."""
    assert settings.unfrozen is not None
    torch.manual_seed(settings.seed)
    net = architectures.build(settings.model, num_classes)
    pretrained.load_backbone(net, settings)
    net.to(device).prepare_stage(settings.unfrozen)
    learner = make_learner(net, settings.unfrozen, classifier.autocast(settings.precision, device), settings.seed)
    size, batch_size = settings.model.image_size, settings.unfrozen.batch_size
    return learner._replace(forward=cuda_graphs.capture_if_faster(net, batch_size, size, settings.precision))


class TimedLoader:
    """A loader that counts its photos on a clock. repeat: yield the first batch in every step."""

    def __init__(self, loader: PhotoLoader, repeat: bool, clock: ThroughputClock) -> None:
        self.loader, self.repeat, self.clock, self.num_steps = loader, repeat, clock, loader.num_steps

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch after its first `start` samples."""
        for batch in self.clock.after_warm_up(self._batches(epoch, start)):
            yield batch
            self.clock.count(len(batch.labels))

    def val(self) -> Iterator[Batch]:
        """Yield nothing: the benchmark does not validate."""
        return iter(())

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        batches = self.loader.train(epoch, start)
        return iter([next(batches)] * self.num_steps) if self.repeat else batches


def summarise(rates: dict[str, list[float]], num_photos: int, settings: TrainSettings) -> dict[str, float]:
    """Return the medians of the rates and of their ratios over the turns."""
    ratios = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    outside = [1 - ours / model for ours, model in zip(rates["ours"], rates["on_device"], strict=True)]
    return {
        "photos": num_photos,
        "image_size": settings.model.image_size,
        "batch_size": BATCH_SIZE,
        "turns": TURNS,
        "plain_images_per_s": median(rates["plain"]),
        "ours_images_per_s": median(rates["ours"]),
        "ours_vs_plain": median(ratios),
        "ours_vs_plain_lowest": min(ratios),
        "ours_vs_plain_highest": max(ratios),
        "share_outside_the_model": median(outside),
    }
