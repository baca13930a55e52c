"""Training of the sample's detector from scratch, on drawn photos that are not in the sample.

    python -m carclass.tools.sample_weights.train_detector

writes carclass/sample/detector.safetensors and its hash in about half an hour on two cores. The weights are equivalent
but not bit-identical, because multithreaded sums round differently.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from detectron2.structures import BitMasks, Boxes  # isort: skip
from detectron2.utils.events import EventStorage  # isort: skip
from carclass import sample
from carclass.masking import detectron
from carclass.sample.draw import mask_to_box
from carclass.sample.models import MODELS, PRETRAIN_MODELS
from carclass.tools.sample_weights.drawings import SEED, Drawing, draw, save_weights

NUM_PHOTOS = 4_000
BATCH_SIZE = 4
SHORT_SIDE = 160
"""Pixels, as `mask.detector.short_side` in jobs/experiments/sample.yml."""
LR, WEIGHT_DECAY = 2e-3, 0.05
MIN_AREA = 40
"""Square pixels of the resized photo; vehicles with a smaller visible area, behind the main car, are not labelled."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="steps per cycle of the learning rate")
    parser.add_argument("--cycles", type=int, default=2, help="cycles, each from the weights of the previous one")
    parser.add_argument("--out", type=Path, default=Path(sample.__file__).with_name("detector.safetensors"))
    args = parser.parse_args()
    photos = draw((*MODELS, *PRETRAIN_MODELS), NUM_PHOTOS)
    torch.manual_seed(SEED)
    net = detectron.build(detectron.load_config("sample"))
    for cycle in range(args.cycles):
        train(net, photos, args.steps, SEED + cycle)
    save_weights(net.state_dict(), args.out)


def train(net: torch.nn.Module, photos: list[Drawing], num_steps: int, seed: int) -> None:
    """Train with AdamW and a one-cycle schedule, printing losses; leave the network in eval mode."""
    rng = np.random.default_rng(seed)
    examples = [prepare(photo) for photo in photos]
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, num_steps, pct_start=0.1, cycle_momentum=False)
    net.train()
    started, step = time.perf_counter(), 0
    with EventStorage():
        while step < num_steps:
            for batch in batches(examples, rng)[: num_steps - step]:
                with torch.autocast("cpu", torch.bfloat16):
                    losses = net([augment(example, rng) for example in batch])
                optimizer.zero_grad()
                sum(losses.values()).backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                if step % 50 == 0:
                    text = ", ".join(f"{name.removeprefix('loss_')} {loss:.3f}" for name, loss in losses.items())
                    print(f"step {step:,}, {time.perf_counter() - started:.0f} s: {text}", flush=True)
    net.eval()


def prepare(photo: Drawing) -> dict:
    """Return a training example of Detectron2: the resized photo (BGR, 0..255), boxes, classes and masks."""
    height, width = photo.pixels.shape[:2]
    scale = SHORT_SIDE / min(height, width)
    size = round(height * scale), round(width * scale)
    pixels = torch.tensor(photo.pixels).permute(2, 0, 1).flip(0)[None].float()
    image = functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    vehicles = [vehicle for vehicle in photo.vehicles if vehicle.mask.sum() * scale**2 >= MIN_AREA]
    masks = torch.from_numpy(np.stack([vehicle.mask for vehicle in vehicles]))[None].float()
    instances = detectron.Instances(
        size,
        gt_boxes=Boxes(torch.tensor([mask_to_box(vehicle.mask) for vehicle in vehicles]) * scale),
        gt_classes=torch.tensor([vehicle.category_id for vehicle in vehicles]),
        gt_masks=BitMasks(functional.interpolate(masks, size, mode="bilinear", antialias=True)[0] >= 0.5),
    )
    return {"image": image.to(torch.uint8), "instances": instances}


def batches(examples: list[dict], rng: np.random.Generator) -> list[list[dict]]:
    """Return the batches of an epoch in random order, of photos with similar heights to limit padding."""
    order = sorted(rng.permutation(len(examples)), key=lambda i: examples[i]["image"].shape[1] > SHORT_SIDE)
    starts = rng.permutation(range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE))
    return [[examples[i] for i in order[start : start + BATCH_SIZE]] for start in starts]


def augment(example: dict, rng: np.random.Generator) -> dict:
    """Jitter brightness and contrast, and mirror half of the examples."""
    image, instances = example["image"].float(), example["instances"]
    image = ((image - 128) * rng.uniform(0.8, 1.25) + 128 + rng.uniform(-25, 25)).clamp(0, 255)
    if rng.random() < 0.5:
        return {"image": image, "instances": instances}
    width = image.shape[2]
    x1, y1, x2, y2 = instances.gt_boxes.tensor.unbind(1)
    mirrored = detectron.Instances(
        instances.image_size,
        gt_boxes=Boxes(torch.stack([width - x2, y1, width - x1, y2], 1)),
        gt_classes=instances.gt_classes,
        gt_masks=BitMasks(instances.gt_masks.tensor.flip(2)),
    )
    return {"image": image.flip(2), "instances": mirrored}


if __name__ == "__main__":
    main()
