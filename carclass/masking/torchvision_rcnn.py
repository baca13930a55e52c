"""torchvision's Mask R-CNN v2 with Detectron2's inputs and outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from carclass.config.schema import DetectorSettings
from carclass.masking.detectron import Boxes, Instances
from carclass.masking.network import Network, check_classes, merge_into_background

_NAMES = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
COCO_IDS = [number for number, name in enumerate(_NAMES) if name not in ("__background__", "N/A")]
"""COCO category id of each of the 80 classes; the ids have gaps."""


class TorchvisionMaskRCNN(Network):
    """maskrcnn_resnet50_fpn_v2 (Li et al. 2021), untrained and without its resizing: inputs are resized before."""

    input_format = "RGB"
    finds_masks = True

    class_of_coco_id: Tensor

    def __init__(self, settings: DetectorSettings) -> None:
        super().__init__()
        check_classes(settings.classes, len(COCO_IDS))
        self.model = maskrcnn_resnet50_fpn_v2(
            weights=None,
            weights_backbone=None,
            rpn_post_nms_top_n_test=settings.num_proposals,
            box_score_thresh=settings.score_threshold,
            box_detections_per_img=settings.num_detections,
        )
        self.canvas = self.model.transform.size_divisible
        heads = self.model.roi_heads
        merge_into_background(heads.box_predictor.cls_score, [COCO_IDS[number] for number in settings.classes], 0)
        # Boxes are computed in the dtype of their offsets; in bf16 they would be off by pixels.
        self.model.rpn.head.register_forward_hook(_to_float32)
        heads.box_predictor.register_forward_hook(_to_float32)
        class_of_coco_id = torch.full((len(_NAMES),), -1)
        class_of_coco_id[COCO_IDS] = torch.arange(len(COCO_IDS))
        self.register_buffer("class_of_coco_id", class_of_coco_id, persistent=False)

    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Instances]]:
        """Detect vehicles; see Network for inputs and outputs."""
        images = self._batch([item["image"] for item in inputs])
        features = self.model.backbone(images.tensors)
        proposals, _ = self.model.rpn(images, features)
        results, _ = self.model.roi_heads(features, proposals, images.image_sizes)
        pairs = zip(results, images.image_sizes, strict=True)
        return [{"instances": self._instances(result, size)} for result, size in pairs]

    def _batch(self, photos: list[Tensor]) -> ImageList:
        """Normalise and pad photos as torchvision's transform does."""
        transform = self.model.transform
        sizes = [(photo.shape[1], photo.shape[2]) for photo in photos]
        return ImageList(transform.batch_images([transform.normalize(photo / 255) for photo in photos]), sizes)

    def _instances(self, result: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        return Instances(
            size,
            pred_boxes=Boxes(result["boxes"]),
            scores=result["scores"],
            pred_classes=self.class_of_coco_id[result["labels"]],
            pred_masks=result["masks"],
        )


def _to_float32(_: nn.Module, __: Any, output: Any) -> Any:
    """Return a module's output, a tensor or nested sequence of tensors, in float32."""
    return output.float() if isinstance(output, Tensor) else type(output)(_to_float32(_, __, item) for item in output)
