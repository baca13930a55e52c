"""Detection networks by name or YAML file, with their weights."""

import torch

from carclass import storage
from carclass.config.schema import DetectorSettings
from carclass.config.section import NAMED_DETECTORS
from carclass.errors import UserError
from carclass.masking import detectron, detectron_network
from carclass.masking.network import Network
from carclass.masking.torchvision_rcnn import TorchvisionMaskRCNN
from carclass.models import weights

TORCHVISION = "torchvision_mask_rcnn_v2"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2"
ZOO = {
    "mask_rcnn_r50_fpn": f"{_DETECTRON2}/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/"
    "model_final_f10217.pkl",
    "faster_rcnn_r101_fpn": f"{_DETECTRON2}/COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl",
    TORCHVISION: "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
}
"""Network → URI of its `zoo` weights. They have no published sha256, but the start of a hash in their names."""
SAMPLE = "detector.safetensors"
KEY = "mask.detector.weights"


def build_network(settings: DetectorSettings) -> Network:
    """Build the network and load its weights, on the CPU in eval mode.

    Raise UserError for an unknown network, and for weights that are missing, have another hash or do not fit.
    """
    _check_model(settings.model)
    network = (
        TorchvisionMaskRCNN(settings) if settings.model == TORCHVISION else detectron_network.build_network(settings)
    )
    _load_weights(network.model, settings)
    return network.eval()


def pin_weights(settings: DetectorSettings, root: str) -> DetectorSettings:
    """Return the settings with verified weights that every node can open, by URI and sha256.

    Downloads and pickles are converted once to .safetensors below `<root>/weights/`, where their sha256 is recorded if
    none is set. Raise UserError for weights that are missing or have another hash.
    """
    file = weights.cache_weights(
        _weights_uri(settings), settings.weights_sha256, sample=SAMPLE, cache=storage.join(root, "weights"), key=KEY
    )
    return settings.model_copy(update={"weights": file.uri, "weights_sha256": file.sha256})


def architecture_digest(settings: DetectorSettings) -> str:
    """Return the sha256 of the network's complete settings, including those of `_BASE_` files."""
    _check_model(settings.model)
    description = TORCHVISION if settings.model == TORCHVISION else detectron.load_config(settings.model).dump()
    return storage.sha256(description.encode())


def _check_model(model: str) -> None:
    if model not in NAMED_DETECTORS and not model.endswith((".yaml", ".yml")):
        raise UserError(
            f"`{detectron.KEY}`: unknown detector {model}. Choose one of {', '.join(NAMED_DETECTORS)}, "
            "or give the URI of a Detectron2 .yaml."
        )


def _weights_uri(settings: DetectorSettings) -> str:
    """Return the URI of the weights, or `sample`."""
    if settings.weights != "zoo":
        return settings.weights
    if settings.model not in ZOO:
        raise UserError(
            f"`{KEY}`: no zoo weights for {settings.model}, only for {', '.join(ZOO)}. Set the URI of its weights"
            + (" or `sample`." if settings.model == "sample" else ".")
        )
    return ZOO[settings.model]


def _load_weights(model: torch.nn.Module, settings: DetectorSettings) -> None:
    """Load the weights into the model; raise UserError if tensors are missing or have other shapes."""
    state, _ = weights.load_weights(_weights_uri(settings), settings.weights_sha256, sample=SAMPLE, key=KEY)
    expected = model.state_dict()
    # Some files omit BatchNorm's counters and the anchors, which are not learnt.
    missing = [n for n in expected if n not in state and "num_batches_tracked" not in n and "cell_anchors" not in n]
    misshapen = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    if missing or misshapen:
        raise UserError(
            f"`{KEY}`: {settings.weights} is not a {settings.model} checkpoint: {len(missing)} tensors missing, "
            f"{len(misshapen)} with other shapes (the first: {[*missing, *misshapen][0]}). "
            f"Set the `{detectron.KEY}` of these weights."
        )
    model.load_state_dict({name: state[name].float() for name in state if name in expected}, strict=False)
