"""Cache of the frozen backbone's features, computed once and kept on storage.

<root>/features/<hash of the dependencies>.safetensors: float16 (V,N,D) by view and photo, labels and ids of each split
"""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

from carclass import storage
from carclass.config.schema import TrainSettings
from carclass.data.formats import json_text
from carclass.errors import UserError
from carclass.formatting import duration_text
from carclass.models import classifier
from carclass.models.classifier import Classifier
from carclass.models.preprocessing import to_network_input
from carclass.progress import Progress, print_line
from carclass.runs.run import Run
from carclass.training.dataloader import FeatureLoader, PhotoSamples, feature_view
from carclass.training.distributed import sum_over_workers, wait_for_workers
from carclass.training.sample_order import SampleOrder

SPLITS = ("train", "val")
CONTENT = "content_sha256"
BATCH_SIZE = 64
"""Photos per forward pass: enough for any device. The rounding of a photo's features depends on the size of its batch,
and in the last, smaller batch of each worker it differs: which photos that holds depends on the order of the dataset's
rows and on the number of workers."""
VIEWS_SEED = 123
"""Seed of the augmented views, so that runs with different seeds share them."""


def cache_uri(run: Run, dataset_digest: str) -> str:
    """Return the URI of the features of a run's frozen stage."""
    key = {"parent": run.lineage()["parent_sha256"], "dataset": dataset_digest, **cache_key(run.settings)}
    digest = storage.sha256(json_text(key, sort_keys=True).encode())
    return storage.join(run.root, "features", f"{digest[:24]}.safetensors")


def cache_key(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that features depend on, besides the parent's weights and the photos."""
    assert settings.frozen is not None
    views = settings.frozen.views
    key: dict[str, Any] = {
        "format": 3,  # views don't depend on the run's seed
        "model": settings.model.model_dump(exclude={"dropout"}),
        "views": views,
        "precision": settings.precision,
    }
    if views == 2:  # the second view is the mirror image, if photos are flipped
        key["mirrored"] = settings.augmentation.flip != "none"
    if views > 2:
        key["augmentation"] = settings.augmentation.model_dump(exclude_none=True)
    return key


def write_cache(uri: str, net: Classifier, splits: Sequence[PhotoSamples], run: Run, device: torch.device) -> None:
    """Compute the features of train and val (`splits`), all workers together, and publish them."""
    assert run.settings.frozen is not None
    started, tensors = time.monotonic(), {}
    for split, samples, views in zip(SPLITS, splits, (run.settings.frozen.views, 1), strict=True):
        tensors[split] = compute_features(net, samples, views, run, device).half()
        if not tensors[split].isfinite().all():
            raise UserError(
                f"`train.parent`: the backbone {run.settings.parent} gives features that are not finite, or beyond "
                "float16, on some photos. Choose other weights, or skip this stage (`train.frozen: null`)."
            )
        tensors[f"{split}_labels"] = torch.from_numpy(samples.labels)
        tensors[f"{split}_ids"] = torch.from_numpy(samples.ids.view(np.int64))
    if splits[0].rank == 0:
        storage.write_bytes(uri, save(tensors, {CONTENT: _content_digest(tensors)}))
        print_line(f"{run.settings.name} features: computed in {duration_text(time.monotonic() - started)}")
    wait_for_workers()


def open_cache(uri: str, batch_size: int, device: torch.device, **share: Any) -> FeatureLoader:
    """Return a loader of published features. share: seed, rank, num_workers, balanced of SampleOrder.

    Raise UserError if they are damaged.
    """
    data = storage.read_bytes(uri)
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise _damaged(uri, str(error)) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    expected = header.get("__metadata__", {}).get(CONTENT)  # none in files of earlier versions
    if expected not in (None, _content_digest(tensors)):
        raise _damaged(uri, "other bytes than those that were written")
    train, val = (
        SampleOrder(tensors[f"{split}_ids"].numpy().view(np.uint64), tensors[f"{split}_labels"].numpy(), **share)
        for split in SPLITS
    )
    return FeatureLoader(train, val, (tensors["train"].float(), tensors["val"].float()), batch_size, device)


def _content_digest(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of all tensors: safetensors has no checksum, and wrong features train a wrong model."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _damaged(uri: str, reason: str) -> UserError:
    return UserError(
        f"{uri} is damaged ({reason}). Delete it and run the same command again, which computes the features anew."
    )


@torch.inference_mode()
def compute_features(net: Classifier, samples: PhotoSamples, num_views: int, run: Run, device: torch.device) -> Tensor:
    """Return the features of a split, float32 (V,N,D). Each worker computes its share; all get the whole."""
    settings = run.settings
    net.eval()
    progress = Progress(f"{settings.name} features", total=len(samples), interval=1.0, write=print_line)
    features = torch.zeros(num_views, len(samples), net.num_features)
    share = np.arange(len(samples))[samples.rank :: samples.num_workers]
    batches = ((share[start : start + BATCH_SIZE], None) for start in range(0, len(share), BATCH_SIZE))
    for indices, _, pixels in samples.read(batches):
        photos = to_network_input(pixels, device, net.normalisation)
        for view in range(num_views):
            inputs = feature_view(photos, view, samples.ids[indices], VIEWS_SEED, settings.augmentation)
            with classifier.autocast(settings.precision, device):
                features[view, indices] = net.features(inputs).float().cpu()
        if samples.rank == 0:  # the other workers are about as fast
            progress.add(min(len(indices) * samples.num_workers, len(samples) - progress.done))
    return sum_over_workers(features)  # rows of other workers are zero
