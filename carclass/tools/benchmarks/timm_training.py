"""Opponent of the training benchmarks: timm's loader, network, optimizer and loss at its script's usual settings.

RandAugment, random resized crops, bfloat16 in channels_last, AdamW, label smoothing; one loader process per core but
one. An epoch validates and saves a checkpoint of weights and optimizer, as timm's script does.
"""

import os
import time
from pathlib import Path

import timm
import timm.data
import timm.loss
import timm.optim
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from carclass.config.schema import TrainSettings
from carclass.models import classifier

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


class TimmTraining:
    """timm's training of a ResNet50 on class folders.

    folder: train/ and val/ with class folders. compiled: by torch.compile.
    """

    def __init__(self, folder: Path, settings: TrainSettings, num_classes: int, *, compiled: bool) -> None:
        assert settings.unfrozen is not None
        self.stage, self.folder = settings.unfrozen, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net = build_network(Path(settings.parent), settings, num_classes)
        self.net = net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        decay = self.stage.weight_decay
        self.optimizer = timm.optim.create_optimizer_v2(self.net, opt="adamw", lr=self.stage.lr, weight_decay=decay)
        self.forward = torch.compile(self.net) if compiled else self.net
        self.autocast = classifier.autocast(settings.precision, self.device)
        self.train_loader, self.val_loader = (self._loader(split, settings.model.image_size) for split in SPLITS)
        self.loss = timm.loss.LabelSmoothingCrossEntropy(self.stage.label_smoothing)

    def epoch_seconds(self) -> float:
        """Train, validate and save an epoch, and return the seconds."""
        started = time.perf_counter()
        self.net.train()
        for photos, labels in self.train_loader:
            photos, labels = self._to_device(photos, labels)
            with self.autocast:
                loss = self.loss(self.forward(photos), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._validate()
        state = {"state_dict": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / "last.pth.tar")
        return time.perf_counter() - started

    @torch.inference_mode()
    def _validate(self) -> float:
        self.net.eval()
        hits, count = 0.0, 0
        for photos, labels in self.val_loader:
            photos, labels = self._to_device(photos, labels)
            with self.autocast:
                hits += float((self.net(photos).argmax(1) == labels).sum())
            count += len(labels)
        return hits / count

    def _loader(self, split: str, size: int) -> DataLoader:
        is_training = split == "train"
        return timm.data.create_loader(
            timm.data.ImageDataset(str(self.folder / split)),
            input_size=(3, size, size),
            batch_size=self.stage.batch_size,
            is_training=is_training,
            auto_augment=RAND_AUGMENT if is_training else None,
            interpolation="random" if is_training else "bicubic",
            num_workers=max(1, (os.cpu_count() or 1) - 1),
            pin_memory=self.device.type == "cuda",
            use_prefetcher=self.device.type == "cuda",
            device=self.device,
        )

    def _to_device(self, photos: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        photos, labels = photos.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        return photos.contiguous(memory_format=torch.channels_last), labels


SPLITS = ("train", "val")


def build_network(weights: Path, settings: TrainSettings, num_classes: int) -> nn.Module:
    """Return timm's resnet50 with weights from a file and a new classifier."""
    net = timm.create_model("resnet50", num_classes=num_classes)
    for block in net.modules():
        if isinstance(block, timm.models.resnet.Bottleneck) and settings.model.stride_in_1x1:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    state = {name: value for name, value in load_file(weights).items() if not name.startswith("fc.")}
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("fc.") or "num_batches_tracked" in name for name in missing), missing
    return net
