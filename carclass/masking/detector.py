"""Vehicle detector: from photos as arrays to the main vehicle of each."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from carclass.config.schema import DetectorSettings
from carclass.masking import networks
from carclass.masking.canvas import canvas, scaled_size
from carclass.masking.detection import Detection, Detections
from carclass.masking.fused_layers import optimise_for_inference
from carclass.masking.selection import SelectionRule, select_vehicle, stability
from carclass.models.classifier import autocast
from carclass.models.gpu_memory import report_out_of_memory

log = logging.getLogger(__name__)
MAX_BATCH = 1024
OUT_OF_MEMORY_REMEDY = (
    "A single photo does not fit: lower `mask.detector.short_side` or `mask.detector.num_proposals`, ingest smaller "
    "photos (`ingest.max_side`), or set `mask.use_gpu: false`."
)


class ForwardPass(NamedTuple):
    """A forward pass that a GPU may still be computing."""

    photos: list[int]
    detections: Detections
    finished: torch.cuda.Event | None  # None on a CPU


class Detector:
    """A detection network with weights, on one device.

    On a GPU, photos with the same canvas (size after scaling, as the network pads it) share a batch, which is halved if
    it exceeds the GPU's memory, and a batch's results are read after the next one has begun. On a CPU, where batches
    gain nothing, photos are processed one by one. No photo is padded to another's size, so its result is independent of
    the batch. Raise UserError for wrong weights.
    """

    def __init__(self, settings: DetectorSettings, rule: SelectionRule = "largest", device: str = "cpu") -> None:
        self.settings, self.rule, self.device = settings, rule, torch.device(device)
        self.network = networks.build_network(settings)
        self.finds_masks = self.network.finds_masks
        optimise_for_inference(self.network, settings.precision, self.device)
        self.max_batch = MAX_BATCH if self.device.type == "cuda" else 1
        """Photos per forward pass; fewer once they have not fit into the GPU's memory."""

    def __call__(self, photos: Sequence[np.ndarray], batch_size: int = 1) -> list[Detection | None]:
        """Return each photo's main vehicle or None. photos: uint8 (H,W,3) RGB; batch_size: photos per forward pass."""
        detections: list[Detection | None] = [None] * len(photos)
        with report_out_of_memory(OUT_OF_MEMORY_REMEDY):
            for started in self._forward_passes(photos, batch_size):
                for i, detection in zip(started.photos, self._read(started, photos), strict=True):
                    detections[i] = detection
        return detections

    def _forward_passes(self, photos: Sequence[np.ndarray], batch_size: int) -> Iterator[ForwardPass]:
        """Yield each forward pass after the next one has begun, so that a GPU computes while its results are read."""
        previous: ForwardPass | None = None
        for batch in self._batches(photos, batch_size):
            for started in self._start(photos, batch):
                if previous is not None:
                    yield previous
                previous = started
        if previous is not None:
            yield previous

    def _start(self, photos: Sequence[np.ndarray], batch: list[int]) -> Iterator[ForwardPass]:
        """Yield the forward pass of a batch, or several if it exceeds a GPU's memory."""
        try:
            yield self._forward_pass(photos, batch)
            return
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
        half = len(batch) // 2  # outside of the handler, which holds the tensors of the failed attempt
        torch.cuda.empty_cache()
        log.warning("mask: %d photos don't fit into the GPU's memory at once; going on with %d", len(batch), half)
        self.max_batch = half
        yield from self._start(photos, batch[:half])
        yield from self._start(photos, batch[half:])

    def _forward_pass(self, photos: Sequence[np.ndarray], batch: list[int]) -> ForwardPass:
        detections = self.forward([photos[i] for i in batch]).to_host(wait=False)
        finished = None
        if self.device.type == "cuda":
            finished = torch.cuda.Event()
            finished.record()
        return ForwardPass(batch, detections, finished)

    @torch.inference_mode()
    def forward(self, photos: Sequence[np.ndarray]) -> Detections:
        """Return the detections in photos of one canvas, in pixels of the scaled photos, on the device."""
        with autocast(self.settings.precision, self.device):
            return self.network.detect([self._network_input(photo) for photo in photos])

    @torch.inference_mode()
    def forward_alone(self, photo: np.ndarray) -> Detections:
        """Return the detections in a photo by the framework's own inference, without a limit on intermediate steps."""
        with autocast(self.settings.precision, self.device):
            return networks.Network.detect(self.network, [self._network_input(photo)])

    def _read(self, started: ForwardPass, photos: Sequence[np.ndarray]) -> Iterator[Detection | None]:
        """Yield the main vehicle of each photo of a forward pass, or None."""
        if started.finished is not None:
            started.finished.synchronize()
        found = started.detections
        for number, i in enumerate(started.photos):
            if found.complete is None or found.complete[number]:
                yield self._select(found.photo(number), photos[i].shape[:2])
            else:
                yield self._select(self.forward_alone(photos[i]).to_host().photo(0), photos[i].shape[:2])

    def _batches(self, photos: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
        """Yield indices of photos that share a canvas, at most batch_size and max_batch at a time."""
        groups = defaultdict(list)
        for i, photo in enumerate(photos):
            groups[canvas(photo.shape[0], photo.shape[1], self.settings, self.network.canvas)].append(i)
        for group in groups.values():
            while group:
                size = min(batch_size, self.max_batch)  # which may have been lowered meanwhile
                yield group[:size]
                del group[:size]

    def _network_input(self, photo: np.ndarray) -> Tensor:
        """Resize a photo on the device: float (3,h,w), 0..255, in the network's channel order."""
        uploaded = torch.empty(photo.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        uploaded.numpy()[:] = photo[:, :, ::-1] if self.network.input_format == "BGR" else photo
        pixels = uploaded.to(self.device, non_blocking=True).permute(2, 0, 1)[None].float()
        size = scaled_size(photo.shape[0], photo.shape[1], self.settings)
        return nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]

    @torch.inference_mode()
    def _select(self, found: Detections, shape: tuple[int, int]) -> Detection | None:
        """Select the main vehicle of a photo of this shape among its detections, on the CPU; None without a vehicle."""
        height, width = shape
        size = scaled_size(height, width, self.settings)
        selection = select_vehicle(found.boxes, found.scores, found.masks, size, self.rule)
        if selection is None:
            return None
        i, masks = selection.best, found.masks
        return Detection(
            category=int(found.classes[i]),
            score=float(found.scores[i]),
            box=(found.boxes[i] * torch.tensor([width / size[1], height / size[0]] * 2)).numpy(),
            grid=None if masks is None else masks[i].numpy(),
            num_vehicles=selection.num_vehicles,
            several_vehicles=selection.several_vehicles,
            stability=None if masks is None else stability(masks[i]),
        )
