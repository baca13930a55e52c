"""What a run will need against what there is, before a long wait: classes, disk, object store, memory.

Arithmetic on sizes: what Ray knows comes in as numbers, and nothing is trained or allocated.
"""

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from pyarrow import fs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torchvision.models.resnet import ResNet

from carclass import storage
from carclass.config.schema import StageSettings, TrainSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.formatting import bytes_text
from carclass.models import resnet
from carclass.runs.run import run_uri

log = logging.getLogger(__name__)
FLOAT = 4
"""Bytes of a weight, of its gradient, of a moment."""
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors that an optimizer keeps per weight."""
PROCESS = 800_000_000
"""Bytes of a worker before it holds a tensor: on a CPU PyTorch's libraries, on a GPU CUDA's context and its kernels."""
USABLE = 0.9
"""Share of the memory to count on: workspaces of the libraries and fragmentation take the rest."""
HEAP = 1.4
"""What a byte of a photo's tensors takes on a CPU, where malloc keeps pieces of what was freed: 1.1 to 1.4, measured as
resident memory on Linux. On a GPU, whose allocator is made for tensors, it is 1."""


class StepMemory(NamedTuple):
    """Memory of a worker in a training step."""

    fixed: int  # bytes, whatever the batch
    per_photo: int  # bytes


def check_run(
    root: str,
    settings: TrainSettings,
    source: dataset.Dataset,
    *,
    use_gpu: bool,
    object_store: int,
    memory: int | None,
) -> None:
    """UserError when a run cannot end well; a warning when it can, but will leave classes unlearned.

    object_store: bytes that the cluster's largest node has for decoded photos. memory: bytes of one GPU, or without
    GPUs of all nodes together; None where nobody knows.
    """
    check_classes(source)
    check_object_store(settings, source, object_store)
    net = resnet.build(settings.model, len(source.classes))
    check_disk(root, settings, source, net)
    if memory is not None:
        check_memory(settings, source, net, memory, use_gpu=use_gpu)


def check_classes(source: dataset.Dataset) -> None:
    """Warns of classes without train photos: a trial of a few photos may lack some, and its report says so.

    UserError when fewer than two classes have any, as then there is nothing to tell apart.
    """
    table = source.read(["label", "split"]).to_pydict()
    seen = {label for label, split in zip(table["label"], table["split"], strict=True) if split == "train"}
    unseen = [name for name in source.classes if name not in seen]
    if len(seen) < 2:
        raise UserError(
            f"`train.dataset`: `{source.name}` has train photos of {len(seen)} of its {len(source.classes)} classes, "
            f"and at least two are needed. {source.uri}/manifest.json says where the others went; mend that dataset, "
            "or choose another."
        )
    if unseen:
        names = ", ".join(unseen[:10]) + (", …" if len(unseen) > 10 else "")
        log.warning("train: %d classes have no train photo and will never be predicted: %s", len(unseen), names)


def decoded_size(settings: TrainSettings, source: dataset.Dataset, object_store: int) -> int | None:
    """Pixels of the sides that photos are decoded to before training, once; None where they would not fit into memory.

    object_store: bytes that the cluster's largest node has for them.
    """
    return settings.model.image_size if _decoded(settings, source) <= object_store else None


def check_object_store(settings: TrainSettings, source: dataset.Dataset, there: int) -> None:
    """Warns when the decoded train and val photos, uint8 (S,S,3) each, are more than a node's object store."""
    needed, count = _decoded(settings, source), _num_photos(source)
    if needed > there:
        log.warning(
            "train: %s photos of `%s` take %s when decoded to %d pixels (`train.model.image_size`), and the cluster's "
            "largest object store has %s: they stay encoded and are decoded anew in every epoch. Up to %d pixels fit; "
            "or give Ray more memory (`ray start --object-store-memory`, or "
            "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION).",
            f"{count:,}", source.name, bytes_text(needed), settings.model.image_size, bytes_text(there),
            int((there / count / 3) ** 0.5),
        )  # fmt: skip


def _decoded(settings: TrainSettings, source: dataset.Dataset) -> int:
    """Bytes of the decoded train and val photos."""
    return 3 * settings.model.image_size**2 * _num_photos(source)


def _num_photos(source: dataset.Dataset) -> int:
    splits = source.manifest["splits"]
    return int(splits["train"] + splits["val"])


def check_disk(root: str, settings: TrainSettings, source: dataset.Dataset, net: ResNet) -> None:
    """UserError when a local root has less space than the run's checkpoints and cached features will take."""
    filesystem, path = storage.locate(root)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return
    run = Path(run_uri(path, settings.name))
    written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())  # by a run that goes on
    free = shutil.disk_usage(next(place for place in (Path(path), *Path(path).parents) if place.exists())).free
    needed = disk_bytes(settings, source, net)
    if needed > written + free:
        raise UserError(
            f"`root`: {root} has {bytes_text(free)} free, and run `{settings.name}` takes up to {bytes_text(needed)}, most of it "
            f"for checkpoints. Free some, lower `train.keep_checkpoints` (now {settings.keep_checkpoints}), or choose "
            "another root."
        )


def disk_bytes(settings: TrainSettings, source: dataset.Dataset, net: ResNet) -> int:
    """What a run writes at most: each stage's checkpoints and best model, and the frozen stage's features."""
    total = 0
    for stage, trained in ((settings.frozen, net.fc), (settings.unfrozen, net)):
        if stage is not None:
            # Epochs that are kept, the last one too, and the two latest to go on from, each with one being written, and
            # the published model.
            kept = settings.keep_checkpoints + len(stage.keep_epochs) + 2 + 3 * (1 + kept_copies(stage))
            total += FLOAT * (kept * _numel(trained) + _numel(net))
    if settings.frozen is not None:
        total += _features(settings.frozen.views, source, net) * FLOAT // 2  # kept in half precision
    return total


def kept_copies(stage: StageSettings) -> int:
    """Tensors that checkpoints hold besides each weight: its moments, and its average."""
    return MOMENTS[stage.optimizer] + (stage.ema_decay is not None)


def check_memory(settings: TrainSettings, source: dataset.Dataset, net: ResNet, memory: int, *, use_gpu: bool) -> None:
    """UserError when a stage doesn't fit into a worker's memory; it names the value that would fit.

    memory: bytes of one GPU, or of all nodes together, which the workers share.
    """
    fewest, most = settings.workers
    # Where their number is free: a GPU bears most with the fewest workers, hosts with the most.
    num_workers, share = (fewest, memory) if use_gpu else (most, memory // most)
    usable = USABLE * share - PROCESS
    there = f"{bytes_text(share)} of {'a GPU' if use_gpu else 'memory for each worker'}"
    if settings.frozen is not None:
        _check_views(settings.frozen.views, source, net, usable, there)
    if settings.unfrozen is not None:
        step = step_memory(settings, settings.unfrozen, net, use_gpu=use_gpu)
        _check_batch_size(settings, num_workers, step, usable, there)


def _check_views(views: int, source: dataset.Dataset, net: ResNet, usable: float, there: str) -> None:
    # Twice: as they come from the workers, and as they are trained on.
    none, one = (2 * FLOAT * _features(count, source, net) for count in (0, 1))
    fitting = int((usable - none) // (one - none))
    if views > fitting:
        advice = f"Up to {fitting} fit." if fitting > 0 else "Take machines with more memory."
        raise UserError(
            f"`train.frozen.views`: features of {views} views of `{source.name}`, {bytes_text(one - none)} each, don't fit "
            f"into {there}. {advice}"
        )


def _check_batch_size(settings: TrainSettings, num_workers: int, step: StepMemory, usable: float, there: str) -> None:
    assert settings.unfrozen is not None
    stage, fitting = settings.unfrozen, max(0, int((usable - step.fixed) // step.per_photo))
    share = -(-stage.batch_size // num_workers)
    if min(share, stage.micro_batch_size or share) > fitting:
        fits = (
            f"Up to {fitting * num_workers} fit; or set `train.unfrozen.micro_batch_size` to {fitting} or less"
            if fitting
            else "Not even one fits"
        )
        raise UserError(
            f"`train.unfrozen.batch_size`: {stage.batch_size} photos of {settings.model.image_size} pixels "
            f"over {num_workers} worker(s) don't fit into {there}, of which weights, gradients, optimizer and "
            f"libraries take {bytes_text(PROCESS + step.fixed)} and each photo {bytes_text(step.per_photo)}. {fits}, "
            "lower `train.model.image_size`, or take more or larger machines."
        )


def step_memory(settings: TrainSettings, stage: StageSettings, net: ResNet, *, use_gpu: bool) -> StepMemory:
    """Of a step that trains the whole network; validation, with larger batches but nothing kept, takes less."""
    one, two = (saved_bytes(net, settings, num_photos) for num_photos in (1, 2))
    weights, kept = FLOAT * _numel(net), kept_copies(stage)
    copies = 1 + kept + (settings.workers[1] > 1)  # gradients, what is kept, with several workers DDP's gradients
    if not use_gpu:
        copies += 1 + kept  # a checkpoint that is being written
    # What autograd saves whatever the number of photos are weights, as they are and folded or in bfloat16.
    return StepMemory(weights * copies + max(weights, 2 * one - two), int((two - one) * (1.0 if use_gpu else HEAP)))


def saved_bytes(net: ResNet, settings: TrainSettings, num_photos: int) -> int:
    """Bytes that a step holds between its forward and backward pass: photos, weights and what autograd saves.

    Counted by PyTorch itself, on tensors that have a shape and no content (fake tensors), so that it takes a second
    and no memory. Every photo adds the same.
    """
    held: dict[int, Tensor] = {}  # by storage: views of one are counted once

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    resnet.prepare_stage(net, "unfrozen")
    net.fc.eval()  # dropout would want ids of photos, and holds next to nothing
    size = settings.model.image_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        photos = hold(torch.empty(num_photos, 3, size, size).to(memory_format=torch.channels_last))
        labels = torch.empty(num_photos, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with resnet.autocast(settings.precision, photos.device):
                logits = net(photos)
            functional.cross_entropy(logits.float(), labels)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _numel(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _features(views: int, source: dataset.Dataset, net: ResNet) -> int:
    """Numbers in the cached features: of every view of train, and of val."""
    splits = source.manifest["splits"]
    return int((views * splits["train"] + splits["val"]) * resnet.num_features(net))
