"""Pretraining of the sample's backbone on drawn car models that are not in the sample.

    python -m carclass.tools.sample_weights.train_backbone

writes carclass/sample/backbone.safetensors and its hash in about a minute on one core. The weights are equivalent but
not bit-identical, because multithreaded sums round differently. Training is short and classifies body types only, so
that the features are generic, as ImageNet's: distinguishing similar models is left to the unfrozen stage.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from carclass import sample
from carclass.config.schema import AugmentationSettings, CutoutSettings, ModelSettings
from carclass.data import photo
from carclass.masking.cutout import cut
from carclass.models import architectures, classifier, preprocessing
from carclass.models.sample_rng import uniforms
from carclass.sample.draw import mask_to_box
from carclass.sample.models import PRETRAIN_MODELS
from carclass.tools.sample_weights.drawings import SEED, Drawing, draw, save_weights
from carclass.training.augmentation import warp_photos

NUM_PHOTOS, NUM_HELD_OUT = 2_400, 600
NUM_EPOCHS, BATCH_SIZE = 3, 32
LR, WEIGHT_DECAY = 3e-3, 0.05
BODY_TYPES = sorted({model.shape.kind for model in PRETRAIN_MODELS})
SETTINGS = ModelSettings(architecture="resnet26-narrow", image_size=96)


def main() -> None:
    torch.manual_seed(SEED)
    drawings = draw(PRETRAIN_MODELS, NUM_PHOTOS)
    photos = torch.from_numpy(np.stack([prepare(drawing, index) for index, drawing in enumerate(drawings)]))
    labels = torch.tensor([BODY_TYPES.index(PRETRAIN_MODELS[drawing.label].shape.kind) for drawing in drawings])
    net = architectures.build(SETTINGS, len(BODY_TYPES))
    train(net, photos[NUM_HELD_OUT:], labels[NUM_HELD_OUT:])
    print(
        f"accuracy on {NUM_HELD_OUT} held-out photos: {accuracy(net, photos[:NUM_HELD_OUT], labels[:NUM_HELD_OUT]):.3f}"
    )
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    save_weights(state, Path(sample.__file__).with_name("backbone.safetensors"))


def prepare(drawing: Drawing, index: int) -> np.ndarray:
    """Return uint8 (3,S,S) RGB, cropped as by masking; every other round of models keeps its background."""
    settings = CutoutSettings(mode="crop+mask" if index // len(PRETRAIN_MODELS) % 2 else "crop")
    main = drawing.vehicles[0].mask
    pixels = cut(drawing.pixels, np.array(mask_to_box(main)), main, settings)
    return photo.resize(pixels, SETTINGS.image_size, SETTINGS.image_size).transpose(2, 0, 1)


def train(net: torch.nn.Module, photos: Tensor, labels: Tensor) -> None:
    """Train on augmented uint8 (N,3,S,S) photos with AdamW and a one-cycle schedule; leave the network in eval mode."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    num_steps = NUM_EPOCHS * (len(photos) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, num_steps, pct_start=0.1, cycle_momentum=False)
    started = time.perf_counter()
    for epoch in range(1, NUM_EPOCHS + 1):
        net.train()
        total = 0.0
        for batch in torch.randperm(len(photos))[: num_steps // NUM_EPOCHS * BATCH_SIZE].split(BATCH_SIZE):
            draws = uniforms(SEED, epoch, batch.numpy().astype(np.uint64), 5)
            inputs = warp_photos(preprocessing.normalise(photos[batch]), AugmentationSettings(), draws)
            with classifier.autocast("bf16", inputs.device):
                logits = net(inputs.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        print(f"epoch {epoch}, {time.perf_counter() - started:.0f} s: loss {total / len(photos):.3f}", flush=True)
    net.eval()


@torch.inference_mode()
def accuracy(net: torch.nn.Module, photos: Tensor, labels: Tensor) -> float:
    """Return the share of photos with a correctly predicted body type."""
    return float((net(preprocessing.normalise(photos)).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
