"""Training as one would write it in an afternoon: torchvision, ImageFolder, DataLoader and DDP. No Ray here.

Both stages on photos in a folder per class: the frozen one decodes and runs the backbone in every epoch, and the
unfrozen one decodes in every epoch and learns BatchNorm's statistics, as a call of train() does by default.
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
from carclass.models import preprocessing, resnet
from carclass.tools.benchmarks.timing import Clock
from carclass.training.loop import learning_rate

MAX_DECODERS = 16
"""Decoding processes at most; fewer where there are fewer cores."""


class FrozenEpoch(NamedTuple):
    """What one epoch of the frozen stage took and saw."""

    seconds: float
    features: dict[str, Tensor]  # by split: float (N,2048) in the order of the epoch
    labels: dict[str, Tensor]


def network(weights: Path, settings: ModelSettings, num_classes: int) -> ResNet:
    """torchvision's resnet50 with the file's weights and a new classifier."""
    net = resnet50()
    for block in net.modules():
        if isinstance(block, Bottleneck) and settings.stride_in_1x1:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    state = {name: value for name, value in load_file(weights).items() if not name.startswith("fc.")}
    net.load_state_dict(state, strict=False)
    net.fc = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(2048, num_classes))
    return net


def loader(folder: Path, batch_size: int, size: int, changed: bool, shuffle: bool) -> DataLoader:
    """Photos of a folder per class. changed: a random crop and flip, else resized alone."""
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()] if changed else []
    steps = [*(steps or [transforms.Resize((size, size))]), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(preprocessing.MEAN, preprocessing.STD)])
    return DataLoader(
        ImageFolder(str(folder), transform, allow_empty=True),  # a class may have no photo in a small choice
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=min(MAX_DECODERS, os.cpu_count() or 1),
        pin_memory=torch.cuda.is_available(),
    )


class HeadTrainer:
    """The classifier with its optimizer and the stage's recipe."""

    def __init__(self, head: nn.Module, settings: TrainSettings, num_photos: int, device: torch.device) -> None:
        assert settings.frozen is not None
        self.head, self.stage, self.device, self.precision = head, settings.frozen, device, settings.precision
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=self.stage.lr, weight_decay=self.stage.weight_decay)
        self.steps_per_epoch = -(-num_photos // self.stage.batch_size)
        self.steps = 0

    def step(self, features: Tensor, labels: Tensor) -> None:
        """One update."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, self.steps / self.steps_per_epoch)
        self.head.train()
        loss = functional.cross_entropy(self.head(features), labels, label_smoothing=self.stage.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def go_on(self, features: Tensor, labels: Tensor) -> None:
        """The remaining epochs on kept features, float (N,D), shuffled anew in each: without augmentation the frozen
        backbone would give the same ones again."""
        while self.steps < self.stage.epochs * self.steps_per_epoch:
            for batch in torch.randperm(len(features)).split(self.stage.batch_size):
                self.step(features[batch].to(self.device), labels[batch].to(self.device))

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of hits."""
        found = self.head.eval()(features.to(self.device)).argmax(1).cpu()
        return float((found == labels).float().mean())


def frozen_epoch(net: ResNet, trainer: HeadTrainer, loaders: dict[str, DataLoader]) -> FrozenEpoch:
    """The first epoch of the frozen stage, with its validation: decode, backbone, a step of the head for each batch."""
    net.fc = nn.Identity()
    net.eval()
    features: dict[str, list[Tensor]] = {split: [] for split in loaders}
    labels: dict[str, list[Tensor]] = {split: [] for split in loaders}
    started = time.perf_counter()
    for split, batches in loaders.items():
        for photos, truth in batches:
            with torch.no_grad(), resnet.autocast(trainer.precision, trainer.device):
                seen = net(photos.to(trainer.device)).float()
            if split == "train":
                trainer.step(seen, truth.to(trainer.device))
            else:
                trainer.accuracy(seen, truth)
            features[split].append(seen.cpu())
            labels[split].append(truth)
    seconds = time.perf_counter() - started
    together = [{split: torch.cat(parts) for split, parts in found.items()} for found in (features, labels)]
    return FrozenEpoch(seconds, *together)


def unfrozen_rate(folder: Path, weights: Path, values: dict[str, Any], num_classes: int) -> float:
    """Photos per second of the unfrozen stage, after the clock's warm-up, in a process group of one.

    values: settings of config.Train; plain data, as the process that trains may be another one.
    """
    settings = TrainSettings.model_validate(values)
    stage = settings.unfrozen
    assert stage is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as meeting:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{meeting}/meet", rank=0, world_size=1)
        net = DistributedDataParallel(network(weights, settings.model, num_classes).to(device))
        optimizer = torch.optim.AdamW(net.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
        batches = loader(folder, stage.batch_size, settings.model.image_size, changed=True, shuffle=True)
        clock = Clock(device)
        net.train()
        for photos, labels in clock.after_warm_up(batches):
            photos, labels = photos.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with resnet.autocast(settings.precision, device):
                loss = functional.cross_entropy(net(photos), labels, label_smoothing=stage.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.count(len(labels))
        rate = clock.rate()
        distributed.destroy_process_group()
    return rate
