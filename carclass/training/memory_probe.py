"""Probe of the memory that steps of the unfrozen stage take on a GPU."""

import gc

import numpy as np
import torch

from carclass.config.schema import TrainSettings
from carclass.models import architectures, classifier
from carclass.training import loop
from carclass.training.dataloader import Batch
from carclass.training.learner import make_learner
from carclass.training.preflight import StepMemory, photos_per_pass, weight_bytes


def measure_step(settings: TrainSettings, num_classes: int) -> StepMemory:
    """Train steps of two sizes on this process' GPU and return the memory they take.

    The larger size is that of a worker's forward pass, or the half, quarter, … of it that fits. If not even one photo
    does, it takes all of the GPU's memory.
    """
    assert settings.unfrozen is not None
    # DDP keeps the gradients in its buckets too.
    buckets = weight_bytes(architectures.build(settings.model, num_classes)) if settings.workers[1] > 1 else 0
    num_photos = photos_per_pass(settings.unfrozen, settings.workers[0])
    while num_photos > 1:
        fewer = num_photos // 2
        try:
            large, small = (peak_bytes(settings, num_classes, count) for count in (num_photos, fewer))
        except torch.cuda.OutOfMemoryError:
            num_photos = fewer
        else:
            per_photo = max(1, (large - small) // (num_photos - fewer))
            return StepMemory(large - num_photos * per_photo + buckets, per_photo)
    try:
        return StepMemory(buckets, peak_bytes(settings, num_classes, 1))
    except torch.cuda.OutOfMemoryError:
        return StepMemory(buckets, torch.cuda.get_device_properties(0).total_memory)


def peak_bytes(settings: TrainSettings, num_classes: int, num_photos: int) -> int:
    """Return the most bytes of tensors that are on the GPU in a step."""
    assert settings.unfrozen is not None
    device, size = torch.device("cuda"), settings.train_size
    gc.collect()
    torch.cuda.empty_cache()  # of an earlier attempt
    net = architectures.build(settings.model, num_classes).to(device)
    net.prepare_stage(settings.unfrozen)
    learner = make_learner(net, settings.unfrozen, classifier.autocast(settings.precision, device), seed=0)
    for step in (1, 2):  # the first one allocates the optimizer's moments at its end
        torch.cuda.reset_peak_memory_stats(device)
        inputs = torch.zeros(num_photos, 3, size, size, device=device).to(memory_format=torch.channels_last)
        labels = torch.zeros(num_photos, dtype=torch.int64, device=device)
        loop.train_step(learner, Batch(inputs, labels, 1.0, np.arange(num_photos, dtype=np.uint64)), step, num_steps=2)
    return int(torch.cuda.max_memory_allocated(device))
