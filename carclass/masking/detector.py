"""Vehicle detector: from photos as arrays to the main vehicle of each."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from carclass.config.schema import DetectorSettings
from carclass.masking import networks
from carclass.masking.detection import Detection
from carclass.masking.detectron import Instances, paste_masks_in_image
from carclass.masking.selection import SelectionRule, select_vehicle, stability, touches_border
from carclass.models.gpu_memory import report_out_of_memory
from carclass.models.resnet import autocast, fold

log = logging.getLogger(__name__)
MAX_BATCH = 1024
OUT_OF_MEMORY_REMEDY = (
    "A single photo does not fit: lower `mask.detector.short_side` or `mask.detector.num_proposals`, ingest smaller "
    "photos (`ingest.max_side`), or set `mask.use_gpu: false`."
)


class Detector:
    """A detection network with weights, on one device.

    On a GPU, photos with the same canvas (size after scaling, as the network pads it) share a batch, which is halved if
    it exceeds the GPU's memory. On a CPU, where batches gain nothing, photos are processed one by one. No photo is
    padded to another's size, so its result is independent of the batch. Raise UserError for wrong weights.
    """

    def __init__(self, settings: DetectorSettings, rule: SelectionRule = "largest", device: str = "cpu") -> None:
        self.settings, self.rule, self.device = settings, rule, torch.device(device)
        self.network = networks.build_network(settings)
        self.finds_masks = self.network.finds_masks
        _optimise_for_inference(self.network, settings.precision)
        self.network.to(self.device)
        self.max_batch = MAX_BATCH if self.device.type == "cuda" else 1
        """Photos per forward pass; fewer once they have not fit into the GPU's memory."""

    def __call__(self, photos: Sequence[np.ndarray], batch_size: int = 1) -> list[Detection | None]:
        """Return each photo's main vehicle or None. photos: uint8 (H,W,3) RGB; batch_size: photos per forward pass."""
        detections: list[Detection | None] = [None] * len(photos)
        for batch in self._batches(photos, batch_size):
            with report_out_of_memory(OUT_OF_MEMORY_REMEDY):
                outputs = self._forward_in_parts([photos[i] for i in batch])
                for i, instances in zip(batch, outputs, strict=True):
                    detections[i] = self._select(instances, photos[i].shape[:2])
        return detections

    def _forward_in_parts(self, photos: Sequence[np.ndarray]) -> list[Instances]:
        """Return the result of `forward`, halving the batch until it fits into a GPU's memory."""
        try:
            return self.forward(photos)
        except torch.cuda.OutOfMemoryError:
            if len(photos) == 1:
                raise
        half = len(photos) // 2  # outside of the handler, which holds the tensors of the failed attempt
        torch.cuda.empty_cache()
        log.warning("mask: %d photos don't fit into the GPU's memory at once; going on with %d", len(photos), half)
        self.max_batch = half
        return self._forward_in_parts(photos[:half]) + self._forward_in_parts(photos[half:])

    @torch.inference_mode()
    def forward(self, photos: Sequence[np.ndarray]) -> list[Instances]:
        """Return the instances in photos of one canvas, in pixels of the scaled photos, with masks not pasted."""
        inputs = [{"image": self._network_input(photo)} for photo in photos]
        with autocast(self.settings.precision, self.device):
            return [output["instances"] for output in self.network(inputs)]

    def _batches(self, photos: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
        """Yield indices of photos that share a canvas, at most batch_size and max_batch at a time."""
        groups = defaultdict(list)
        for i, photo in enumerate(photos):
            groups[tuple(-(-side // self.network.canvas) for side in self._scaled_size(photo))].append(i)
        for group in groups.values():
            while group:
                size = min(batch_size, self.max_batch)  # which may have been lowered meanwhile
                yield group[:size]
                del group[:size]

    def _scaled_size(self, photo: np.ndarray) -> tuple[int, int]:
        """Return height and width of the network's input."""
        height, width = photo.shape[:2]
        scale = min(self.settings.short_side / min(height, width), self.settings.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _network_input(self, photo: np.ndarray) -> Tensor:
        """Resize a photo on the device: float (3,h,w), 0..255, in the network's channel order."""
        pixels = torch.tensor(photo, device=self.device).permute(2, 0, 1)[None].float()
        if self.network.input_format == "BGR":
            pixels = pixels.flip(1)
        size = self._scaled_size(photo)
        return nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]

    @torch.inference_mode()
    def _select(self, instances: Instances, shape: tuple[int, int]) -> Detection | None:
        """Select the main vehicle, pasting only its mask into a photo of this shape; None without a vehicle."""
        boxes, scores = instances.pred_boxes.tensor.float().cpu(), instances.scores.float().cpu()
        masks = instances.pred_masks.float() if self.finds_masks else None
        size = instances.image_size
        selection = select_vehicle(boxes, scores, None if masks is None else masks.cpu(), size, self.rule)
        if selection is None:
            return None
        i, (height, width) = selection.best, shape
        box = boxes[i] * torch.tensor([width / size[1], height / size[0]] * 2)
        if masks is None:
            mask, area = None, float((box[2] - box[0]) * (box[3] - box[1])) / (height * width)
            at_border = bool((box[:2] < 1).any() or box[2] > width - 1 or box[3] > height - 1)
        else:
            pasted = paste_masks_in_image(masks[i], box[None].to(self.device), shape, threshold=0.5)
            mask = pasted[0].to(torch.uint8).cpu().numpy().view(bool)
            if not mask.any():  # it is smaller than a pixel
                return None
            area, at_border = float(mask.mean()), touches_border(mask)
        return Detection(
            category=int(instances.pred_classes[i]),
            score=float(scores[i]),
            box=box.numpy(),
            mask=mask,
            num_vehicles=selection.num_vehicles,
            several_vehicles=selection.several_vehicles,
            touches_border=at_border,
            area_fraction=area,
            stability=None if masks is None else stability(masks[i].cpu()),
        )


def _optimise_for_inference(network: nn.Module, precision: str) -> None:
    """Fold BatchNorm, cast weights to the precision and convert them to channels_last, all in place."""
    for module in network.modules():
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and hasattr(norm, "running_var"):
            assert norm is not None
            module.weight, module.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in fold(module, norm))
            module.norm = None  # type: ignore[assignment]
        if precision == "bf16" and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(torch.bfloat16)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
