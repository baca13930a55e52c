"""What the frozen backbone says of each photo, computed once and kept on storage."""

import json

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, distributed, nn

from carclass import lineage, model, storage
from carclass.progress import say
from carclass.training.feed import Feed, to_device, view_of

BATCH_SIZE = 64
"""Photos per forward pass without gradients: enough for any device, and it changes no result."""


def load_or_compute(
    net: nn.Module, train: Feed, val: Feed, run: lineage.Run, dataset_digest: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features of every train view and of val: float (V,N,D) and (1,M,D), in the feeds' order, on every worker.

    They are kept in <root>/features under the hash of all they depend on.
    """
    settings = run.settings
    assert settings.frozen is not None
    depends = {
        "parent": run.lineage()["parent_sha256"],
        "model": settings.model.model_dump(exclude={"dropout"}),
        "dataset": dataset_digest,
        "views": settings.frozen.views,
        "augmentation": settings.augmentation.model_dump(),
        "seed": settings.seed,
        "precision": settings.precision,
    }
    digest = storage.sha256(json.dumps(depends, sort_keys=True).encode())
    uri = storage.join(run.root, "features", f"{digest[:24]}.safetensors")
    if storage.exists(uri):
        kept = load(storage.read_bytes(uri))
        return tuple(
            _reorder(kept[split], kept[f"{split}_ids"], feed) for split, feed in (("train", train), ("val", val))
        )  # type: ignore[return-value]
    found = compute(net, train, settings.frozen.views, run, device), compute(net, val, 1, run, device)
    if train.rank == 0:
        tensors = {"train": found[0].half(), "val": found[1].half()}
        ids = {
            "train_ids": torch.from_numpy(train.ids.view(np.int64)),
            "val_ids": torch.from_numpy(val.ids.view(np.int64)),
        }
        storage.write_bytes(uri, save({**tensors, **ids}))
    return found


@torch.inference_mode()
def compute(net: nn.Module, feed: Feed, num_views: int, run: lineage.Run, device: torch.device) -> Tensor:
    """float (V,N,D): each worker takes its share of the photos, all get the whole."""
    settings = run.settings
    net.eval()
    width = model.num_features(net)
    found = torch.zeros(num_views, len(feed), width)
    mine = np.arange(len(feed))[feed.rank :: feed.num_workers]
    for indices, start, pixels in feed.read((mine[i : i + BATCH_SIZE], i) for i in range(0, len(mine), BATCH_SIZE)):
        photos = to_device(pixels, device)
        for view in range(num_views):
            seen = view_of(photos, view, feed.ids[indices], feed.seed, settings.augmentation)
            with model.autocast(settings.precision, device):
                found[view, indices] = model.features(net, seen).float().cpu()
        if feed.rank == 0 and start // BATCH_SIZE % 20 == 19:
            say(f"{settings.name} features: {start + len(indices):,} of {len(mine):,} photos")
    return _sum_over_workers(found, device)


def _sum_over_workers(found: Tensor, device: torch.device) -> Tensor:
    """Each worker filled its own rows and left the others zero."""
    if distributed.is_initialized():
        shared = found.to(device)
        distributed.all_reduce(shared)
        return shared.cpu()
    return found


def _reorder(kept: Tensor, ids: Tensor, feed: Feed) -> Tensor:
    """Kept features in the order of a feed, which may have read its photos in another one."""
    place = {photo: i for i, photo in enumerate(ids.numpy().view(np.uint64).tolist())}
    return kept[:, [place[photo] for photo in feed.ids.tolist()]].float()
