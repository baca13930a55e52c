"""Preflight check: requirements of a run against classes, disk space, object store and memory.

Arithmetic on sizes: the cluster's resources are passed as numbers; nothing is trained or allocated. memory_probe
measures, on a free GPU, what is otherwise estimated here.
"""

import copy
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from carclass import storage
from carclass.config.schema import StageSettings, TrainSettings, UnfrozenSettings
from carclass.data import dataset
from carclass.errors import UserError
from carclass.formatting import bytes_text
from carclass.models import architectures, classifier
from carclass.models.classifier import Classifier
from carclass.runs.run import run_uri
from carclass.runs.seen_photos import find_parent_run, find_seen_photos

log = logging.getLogger(__name__)
FLOAT_BYTES = 4
"""Bytes of a weight, a gradient or a moment."""
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}
"""Tensors of an optimizer per weight."""
PROCESS_BYTES = 800_000_000
"""Bytes of a worker without tensors: on a CPU PyTorch's libraries, on a GPU CUDA's context and kernels."""
USABLE_SHARE = 0.9
"""Share of the memory for tensors: workspaces of the libraries and fragmentation take the rest."""
CPU_OVERHEAD = 1.4
"""Bytes of memory per byte of activations on a CPU, as malloc keeps freed fragments: 1.1 to 1.4, measured as resident
memory on Linux. On a GPU, whose allocator is made for tensors, it is 1."""


class StepMemory(NamedTuple):
    """Bytes of a worker in a training step."""

    fixed: int  # independent of the batch size
    per_photo: int


def check_run(
    root: str,
    settings: TrainSettings,
    source: dataset.Dataset,
    *,
    use_gpu: bool,
    object_store: int,
    memory: int | None,
    step: StepMemory | None = None,
) -> None:
    """Raise UserError if a run can't succeed; warn if it can, but slowly or without learning all classes.

    object_store: bytes of the largest node's object store. memory: bytes of one GPU, or on CPUs of all nodes together;
    None if unknown. step: see check_memory.
    """
    counts = check_classes(source)
    check_sampling(settings, counts)
    check_seen_photos(root, settings, source)
    check_warmup(settings)
    check_object_store(settings, source, object_store)
    net = architectures.build(settings.model, len(source.classes))
    check_disk(root, settings, source, net)
    if memory is not None:
        check_memory(settings, source, net, memory, use_gpu=use_gpu, step=step)


def check_classes(source: dataset.Dataset) -> Counter[str]:
    """Return the number of train photos of each class that has any, and warn about the others.

    Raise UserError if fewer than two classes have any.
    """
    labels = source.read(["label", "split"]).filter(pc.field("split") == "train")["label"]
    trained = Counter({row["values"]: row["counts"] for row in labels.value_counts().to_pylist()})
    missing = [name for name in source.classes if name not in trained]
    if len(trained) < 2:
        raise UserError(
            f"`train.dataset`: `{source.name}` has train photos of {len(trained)} of its {len(source.classes)} "
            f"classes, and at least two are needed. See the counts in {source.uri}/manifest.json; correct "
            "that dataset, or choose another."
        )
    if missing:
        names = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        log.warning("train: %d classes have no train photo and will never be predicted: %s", len(missing), names)
    return trained


def check_sampling(settings: TrainSettings, counts: Counter[str]) -> None:
    """Warn if balanced sampling has no effect. counts: train photos by class."""
    if settings.sampling == "balanced" and len({*counts.values()}) == 1:
        log.warning(
            "train: all classes have %d train photos, so `train.sampling: balanced` has no effect. Leave it out.",
            next(iter(counts.values())),
        )


def check_splits(source: dataset.Dataset) -> None:
    """Raise UserError if a dataset has no train or no val photos."""
    for split in ("train", "val"):
        if not source.manifest["splits"][split]:
            raise UserError(f"dataset `{source.name}` has no {split} photos: add some, or change its split.")


def check_seen_photos(root: str, settings: TrainSettings, source: dataset.Dataset) -> None:
    """Warn if the parent of a run, or one of its ancestors, was trained or chosen on val or test photos of the run."""
    if (parent := find_parent_run(root, settings.parent)) is None:
        return
    for split in ("val", "test"):
        seen = find_seen_photos(parent, source, split)
        if seen.text:
            log.warning(
                "train: of the %s photos of dataset %s, %s. Run %s starts from there: its %s accuracy will be too "
                "high. Make datasets that grow by `--update`, which keeps each photo in its split",
                split, source.name, seen.text, settings.name, split,
            )  # fmt: skip
        if seen.unknown:
            log.warning("train: %s photos of dataset %s: %s", split, source.name, seen.unknown_text)


def check_warmup(settings: TrainSettings) -> None:
    """Warn if a stage ends before its warm-up, as one of a single epoch does by default."""
    for stage in (settings.frozen, settings.unfrozen):
        if stage is not None and stage.warmup_epochs >= stage.epochs:
            log.warning(
                "train: all %d epoch(s) of the %s stage are warm-up (`train.%s.warmup_epochs` is %g), so `schedule` "
                "has no effect. Give it more epochs, or a shorter warm-up.",
                stage.epochs, stage.name, stage.name, stage.warmup_epochs,
            )  # fmt: skip


def decoded_size(settings: TrainSettings, source: dataset.Dataset, object_store: int) -> int | None:
    """Return the side in pixels to decode all photos to before training; None if they don't fit.

    object_store: bytes of the largest node's object store.
    """
    return settings.model.image_size if _decoded_bytes(settings, source) <= object_store else None


def check_object_store(settings: TrainSettings, source: dataset.Dataset, available: int) -> None:
    """Warn if the decoded train and val photos, uint8 (S,S,3) each, don't fit into a node's object store."""
    required, count = _decoded_bytes(settings, source), _num_photos(source)
    if required > available:
        log.warning(
            "train: %s photos of `%s` take %s when decoded to %d pixels (`train.model.image_size`), and the cluster's "
            "largest object store has %s: they stay encoded and are decoded in every epoch. Up to %d pixels fit; "
            "or give Ray more memory (`ray start --object-store-memory`, or "
            "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION).",
            f"{count:,}", source.name, bytes_text(required), settings.model.image_size, bytes_text(available),
            int((available / count / 3) ** 0.5),
        )  # fmt: skip


def _decoded_bytes(settings: TrainSettings, source: dataset.Dataset) -> int:
    return 3 * settings.model.image_size**2 * _num_photos(source)


def _num_photos(source: dataset.Dataset) -> int:
    splits = source.manifest["splits"]
    return int(splits["train"] + splits["val"])


def check_disk(root: str, settings: TrainSettings, source: dataset.Dataset, net: Classifier) -> None:
    """Raise UserError if a local root has less space than the run's checkpoints and cached features need."""
    if (path := storage.local_path(root)) is None:
        return
    run = Path(run_uri(path, settings.name))
    written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())  # before the run was interrupted
    existing = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    required = disk_bytes(settings, source, net)
    if required > written + free:
        raise UserError(
            f"`root`: {root} has {bytes_text(free)} free, and run `{settings.name}` needs up to "
            f"{bytes_text(required)}, mostly for checkpoints. Free some, lower `train.keep_checkpoints` (now "
            f"{settings.keep_checkpoints}), or choose another root."
        )


def disk_bytes(settings: TrainSettings, source: dataset.Dataset, net: Classifier) -> int:
    """Return the most bytes that a run has on disk: checkpoints, best models and cached features."""
    total = 0
    for stage, trained in ((settings.frozen, net.fc), (settings.unfrozen, net)):
        if stage is not None:
            # Checkpoints of kept epochs and the last one, and two to resume from; of each kind one more is being
            # written. Besides them, the published model.
            copies = settings.keep_checkpoints + len(stage.keep_epochs) + 2 + 3 * (1 + extra_copies(stage))
            total += FLOAT_BYTES * (copies * _numel(trained) + _numel(net))
    if settings.frozen is not None:
        total += _num_features(settings.frozen.views, source, net) * FLOAT_BYTES // 2  # float16
    return 2 * total if settings.refit else total


def extra_copies(stage: StageSettings) -> int:
    """Return the number of tensors in a checkpoint besides each weight: its moments and moving average."""
    return MOMENTS[stage.optimizer] + (stage.ema_decay is not None)


def check_memory(
    settings: TrainSettings,
    source: dataset.Dataset,
    net: Classifier,
    memory: int,
    *,
    use_gpu: bool,
    step: StepMemory | None = None,
) -> None:
    """Raise UserError, with the value that fits, if a stage doesn't fit into a worker's memory.

    memory: bytes of one GPU, or on CPUs of all nodes together, which the workers share. step: measured memory of a step
    of the unfrozen stage; None: it is estimated.
    """
    min_workers, max_workers = settings.workers
    # The worst case of an elastic run: on GPUs the fewest workers, on CPUs the most.
    num_workers, share = (min_workers, memory) if use_gpu else (max_workers, memory // max_workers)
    usable = USABLE_SHARE * share - PROCESS_BYTES
    available = f"{bytes_text(share)} of {'a GPU' if use_gpu else 'memory for each worker'}"
    if settings.frozen is not None:
        _check_views(settings.frozen.views, source, net, usable, available)
    if settings.unfrozen is not None:
        step = step or step_memory(settings, settings.unfrozen, net, use_gpu=use_gpu)
        _check_batch_size(settings, num_workers, step, usable, available)


def _check_views(views: int, source: dataset.Dataset, net: Classifier, usable: float, available: str) -> None:
    """Raise UserError if the features of all views don't fit. usable: bytes. available: text for the error."""
    # Twice: as the workers' sum, and on the device.
    val_only, one_view = (2 * FLOAT_BYTES * _num_features(count, source, net) for count in (0, 1))
    max_views = int((usable - val_only) // (one_view - val_only))
    if views > max_views:
        advice = f"Up to {max_views} fit." if max_views > 0 else "Use machines with more memory."
        raise UserError(
            f"`train.frozen.views`: features of {views} views of `{source.name}`, {bytes_text(one_view - val_only)} "
            f"each, don't fit into {available}. {advice}"
        )


def _check_batch_size(
    settings: TrainSettings, num_workers: int, step: StepMemory, usable: float, available: str
) -> None:
    """Raise UserError if a worker's share of a step doesn't fit. usable: bytes. available: text for the error."""
    assert settings.unfrozen is not None
    stage, max_photos = settings.unfrozen, max(0, int((usable - step.fixed) // step.per_photo))
    if photos_per_pass(stage, num_workers) > max_photos:
        size_key = "train.unfrozen.train_size" if stage.train_size else "train.model.image_size"
        advice = "Not even one fits"
        if max_photos:
            advice = f"Up to {max_photos * num_workers} fit"
            advice += f"; or set `train.unfrozen.micro_batch_size` to {max_photos} or less"
        raise UserError(
            f"`train.unfrozen.batch_size`: {stage.batch_size} photos of {settings.train_size} pixels "
            f"over {num_workers} worker(s) don't fit into {available}, of which weights, gradients, optimizer "
            f"and libraries take {bytes_text(PROCESS_BYTES + step.fixed)} and each photo {bytes_text(step.per_photo)}. "
            f"{advice}, lower `{size_key}`, or use more or larger machines."
        )


def photos_per_pass(stage: UnfrozenSettings, num_workers: int) -> int:
    """Return the photos in a worker's forward pass."""
    share = -(-stage.batch_size // num_workers)
    return min(share, stage.micro_batch_size or share)


def step_memory(settings: TrainSettings, stage: StageSettings, net: Classifier, *, use_gpu: bool) -> StepMemory:
    """Return the memory of a step that trains the whole network. Validation saves no activations and takes less."""
    one, two = (saved_bytes(net, settings, num_photos, use_gpu=use_gpu) for num_photos in (1, 2))
    weights, extra = weight_bytes(net), extra_copies(stage)
    copies = 1 + extra + (settings.workers[1] > 1)  # gradients, optimizer and average, DDP's buckets of gradients
    if not use_gpu:
        copies += 1 + extra  # a checkpoint that is being written
    # The part of autograd's tensors that doesn't grow with photos are weights: as they are, folded or in bfloat16.
    held = 2 * one - two
    if use_gpu and settings.precision == "bf16":
        held += weights  # besides their copies in bfloat16
    return StepMemory(weights * copies + max(weights, held), int((two - one) * (1.0 if use_gpu else CPU_OVERHEAD)))


def saved_bytes(net: Classifier, settings: TrainSettings, num_photos: int, *, use_gpu: bool) -> int:
    """Return the bytes held between forward and backward pass: photos, weights and tensors that autograd saves.

    Counted on tensors that have a shape but no content, so that it takes a second and no memory. On a GPU, where
    BatchNorm is not folded into the convolutions, the output of every convolution is saved too.
    """
    saved: dict[int, Tensor] = {}  # by storage: its views are counted once

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    assert settings.unfrozen is not None
    net.prepare_stage(settings.unfrozen)
    net.fc.eval()  # dropout takes little memory, but needs the ids of photos
    device, dtype, precision = "cpu", torch.float32, settings.precision
    if use_gpu:  # the meta device takes the same path as a GPU, but has no autocast
        device, dtype, precision = "meta", torch.bfloat16 if precision == "bf16" else dtype, "fp32"
        net = copy.deepcopy(net).to(device, dtype)
    size = settings.train_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        photos = save(torch.empty(num_photos, 3, size, size, device=device).to(memory_format=torch.channels_last))
        labels = torch.empty(num_photos, dtype=torch.int64, device=device)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            with classifier.autocast(precision, torch.device("cpu")):
                logits = _forward(net, photos.to(dtype), settings)
            functional.cross_entropy(logits.float(), labels)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _forward(net: Classifier, photos: Tensor, settings: TrainSettings) -> Tensor:
    """Return the logits of photos. Raise UserError for a network that is built for photos of `image_size` alone."""
    try:
        logits: Tensor = net(photos)
    except (AssertionError, RuntimeError, ValueError) as error:
        if settings.train_size == settings.model.image_size:
            raise
        raise UserError(
            f"`train.unfrozen.train_size` is {settings.train_size}, which {settings.model.architecture} cannot take: "
            f"it is built for the {settings.model.image_size} pixels of `model.image_size`. Leave `train_size` out."
        ) from error
    return logits


def weight_bytes(net: nn.Module) -> int:
    """Return the bytes of a network's weights, or of their gradients."""
    return FLOAT_BYTES * _numel(net)


def _numel(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _num_features(views: int, source: dataset.Dataset, net: Classifier) -> int:
    """Return the number of values in the cached features: all views of train and one of val."""
    splits = source.manifest["splits"]
    return int((views * splits["train"] + splits["val"]) * net.num_features)
