"""Baseline of the training benchmarks: torchvision, ImageFolder, DataLoader and DDP, without Ray.

Both stages read photos from class folders. The frozen stage decodes and runs the backbone in every epoch; the unfrozen
stage decodes in every epoch and updates BatchNorm's statistics, the default of train().
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings, TrainSettings
from carclass.models import classifier, preprocessing
from carclass.tools.benchmarks.timing import ThroughputClock
from carclass.training.learner import step_rate

MAX_DATALOADER_WORKERS = 16
"""Or the number of cores, if lower."""


class FrozenEpoch(NamedTuple):
    """Time, features and labels of one epoch of the frozen stage."""

    seconds: float
    features: dict[str, Tensor]  # by split: float (N,2048) in the epoch's order
    labels: dict[str, Tensor]


def build_network(weights: Path, settings: ModelSettings, num_classes: int) -> ResNet:
    """Return torchvision's resnet50 with weights from a file and a new classifier."""
    net = resnet50()
    for block in net.modules():
        if isinstance(block, Bottleneck) and settings.stride_in_1x1:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    state = {name: value for name, value in load_file(weights).items() if not name.startswith("fc.")}
    net.load_state_dict(state, strict=False)
    net.fc = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(2048, num_classes))
    return net


def make_loader(folder: Path, batch_size: int, size: int, augment: bool, shuffle: bool) -> DataLoader:
    """Return a loader of class folders. augment: random crop and flip instead of a plain resize."""
    resize = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    steps = [*(resize if augment else [transforms.Resize((size, size))]), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(*preprocessing.IMAGENET)])
    return DataLoader(
        ImageFolder(str(folder), transform, allow_empty=True),  # small splits may lack photos of a class
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=min(MAX_DATALOADER_WORKERS, os.cpu_count() or 1),
        pin_memory=torch.cuda.is_available(),
    )


class HeadTrainer:
    """The classifier with its optimizer and the frozen stage's hyperparameters."""

    def __init__(self, head: nn.Module, settings: TrainSettings, num_photos: int, device: torch.device) -> None:
        assert settings.frozen is not None
        self.head, self.stage, self.device, self.precision = head, settings.frozen, device, settings.precision
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=self.stage.lr, weight_decay=self.stage.weight_decay)
        self.steps_per_epoch = -(-num_photos // self.stage.batch_size)
        self.steps = 0

    def step(self, features: Tensor, labels: Tensor) -> None:
        """Update the classifier on a batch."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = step_rate(self.stage, self.steps, self.steps_per_epoch)
        self.head.train()
        loss = functional.cross_entropy(self.head(features), labels, label_smoothing=self.stage.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def train_remaining(self, features: Tensor, labels: Tensor) -> None:
        """Train the remaining epochs on float (N,D) features, shuffled in each.

        Without augmentation the frozen backbone returns the same features in every epoch.
        """
        while self.steps < self.stage.epochs * self.steps_per_epoch:
            for batch in torch.randperm(len(features)).split(self.stage.batch_size):
                self.step(features[batch].to(self.device), labels[batch].to(self.device))

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of correct predictions."""
        predicted = self.head.eval()(features.to(self.device)).argmax(1).cpu()
        return float((predicted == labels).float().mean())


def train_frozen_epoch(net: ResNet, trainer: HeadTrainer, loaders: dict[str, DataLoader]) -> FrozenEpoch:
    """Run the first epoch of the frozen stage with validation: decode, backbone, one step of the head per batch."""
    net.fc = nn.Identity()
    net.eval()
    features: dict[str, list[Tensor]] = {split: [] for split in loaders}
    labels: dict[str, list[Tensor]] = {split: [] for split in loaders}
    started = time.perf_counter()
    for split, batches in loaders.items():
        for photos, targets in batches:
            with torch.no_grad(), classifier.autocast(trainer.precision, trainer.device):
                outputs = net(photos.to(trainer.device)).float()
            if split == "train":
                trainer.step(outputs, targets.to(trainer.device))
            else:
                trainer.accuracy(outputs, targets)
            features[split].append(outputs.cpu())
            labels[split].append(targets)
    seconds = time.perf_counter() - started
    tensors = [{split: torch.cat(parts) for split, parts in lists.items()} for lists in (features, labels)]
    return FrozenEpoch(seconds, *tensors)


def measure_unfrozen(folder: Path, weights: Path, values: dict[str, Any], num_classes: int) -> float:
    """Return the photos per second of the unfrozen stage after the warm-up, in a process group of one.

    values: TrainSettings as plain data, so that they can be sent to another process.
    """
    settings = TrainSettings.model_validate(values)
    stage = settings.unfrozen
    assert stage is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as rendezvous:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{rendezvous}/file", rank=0, world_size=1)
        net = DistributedDataParallel(build_network(weights, settings.model, num_classes).to(device))
        optimizer = torch.optim.AdamW(net.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
        loader = make_loader(folder, stage.batch_size, settings.model.image_size, augment=True, shuffle=True)
        clock = ThroughputClock(device)
        net.train()
        for photos, labels in clock.after_warm_up(loader):
            photos, labels = photos.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with classifier.autocast(settings.precision, device):
                loss = functional.cross_entropy(net(photos), labels, label_smoothing=stage.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.count(len(labels))
        rate = clock.rate()
        distributed.destroy_process_group()
    return rate
