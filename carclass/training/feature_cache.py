"""What the frozen backbone says of each photo, computed once and kept on storage.

<root>/features/<hash of all it depends on>.safetensors: of each split half (V,N,D) by view and photo, labels, ids
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor, distributed

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.models import resnet
from carclass.models.preprocessing import to_network_input
from carclass.progress import say
from carclass.runs.run import Run
from carclass.training.dataloader import FeatureLoader, PhotoSamples, SampleOrder, feature_view

SPLITS = ("train", "val")
BATCH_SIZE = 64
"""Photos per forward pass without gradients: enough for any device, and it changes no result."""
VIEWS_SEED = 123
"""Draws the augmented views, whatever the run's own seed: runs that differ in it share them."""


def cache_uri(run: Run, dataset_digest: str) -> str:
    """Where the features of a run's frozen stage lie, or will."""
    depends = {"parent": run.lineage()["parent_sha256"], "dataset": dataset_digest, **cache_key(run.settings)}
    digest = storage.sha256(json.dumps(depends, sort_keys=True).encode())
    return storage.join(run.root, "features", f"{digest[:24]}.safetensors")


def cache_key(settings: TrainSettings) -> dict[str, Any]:
    """All that makes features what they are, besides the parent's weights and the photos."""
    assert settings.frozen is not None
    views = settings.frozen.views
    depends: dict[str, Any] = {
        "format": 3,  # since views no longer depend on the run's seed
        "model": settings.model.model_dump(exclude={"dropout"}),
        "views": views,
        "precision": settings.precision,
    }
    if views == 2:  # the second one is the mirror image, if any
        depends["mirrored"] = settings.augmentation.flip != "none"
    if views > 2:
        depends["augmentation"] = settings.augmentation.model_dump()
    return depends


def write_cache(
    uri: str, net: resnet.FoldedResNet, feeds: Sequence[PhotoSamples], run: Run, device: torch.device
) -> None:
    """Computes the features of train and val, all workers together, and publishes them."""
    assert run.settings.frozen is not None
    started, tensors = time.monotonic(), {}
    for split, feed, views in zip(SPLITS, feeds, (run.settings.frozen.views, 1), strict=True):
        tensors[split] = compute_features(net, feed, views, run, device).half()
        tensors[f"{split}_labels"] = torch.from_numpy(feed.labels)
        tensors[f"{split}_ids"] = torch.from_numpy(feed.ids.view(np.int64))
    if feeds[0].rank == 0:
        storage.write_bytes(uri, save(tensors))
        say(f"{run.settings.name} features: computed in {time.monotonic() - started:.0f} s")
    if distributed.is_initialized():
        distributed.barrier()


def open_cache(uri: str, batch_size: int, device: torch.device, **share: int) -> FeatureLoader:
    """Published features to train on; the photos are not needed. share: seed, rank, num_workers, as of a Feed."""
    kept = load_tensors(storage.read_bytes(uri))
    train, val = (
        SampleOrder(kept[f"{split}_ids"].numpy().view(np.uint64), kept[f"{split}_labels"].numpy(), **share)
        for split in SPLITS
    )
    return FeatureLoader(train, val, (kept["train"].float(), kept["val"].float()), batch_size, device)


@torch.inference_mode()
def compute_features(
    net: resnet.FoldedResNet, feed: PhotoSamples, num_views: int, run: Run, device: torch.device
) -> Tensor:
    """float (V,N,D): each worker takes its share of the photos, all get the whole."""
    settings = run.settings
    net.eval()
    width = resnet.num_features(net)
    found = torch.zeros(num_views, len(feed), width)
    mine = np.arange(len(feed))[feed.rank :: feed.num_workers]
    for indices, start, pixels in feed.read((mine[i : i + BATCH_SIZE], i) for i in range(0, len(mine), BATCH_SIZE)):
        photos = to_network_input(pixels, device)
        for view in range(num_views):
            seen = feature_view(photos, view, feed.ids[indices], VIEWS_SEED, settings.augmentation)
            with resnet.autocast(settings.precision, device):
                found[view, indices] = net.features(seen).float().cpu()
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
