"""Which network finds the vehicles, and with which weights."""

import torch

from carclass import storage
from carclass.config.schema import DetectorSettings
from carclass.config.section import NAMED_DETECTORS
from carclass.errors import UserError
from carclass.masking import detectron
from carclass.masking.detectron import Network
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
"""What `weights: zoo` stands for. None of them is published with its sha256: the user pins the copy they trust."""
SAMPLE = "detector.safetensors"
KEY = "mask.detector.weights"


def build_network(settings: DetectorSettings) -> Network:
    """The network with its weights, on the CPU and in eval mode.

    UserError when there is no such network, or the weights aren't there, aren't what their hash says or don't fit.
    """
    _check_model(settings.model)
    network = TorchvisionMaskRCNN(settings) if settings.model == TORCHVISION else detectron.build_network(settings)
    _load_weights(network.model, settings)
    return network.eval()


def fetch_weights(settings: DetectorSettings, root: str) -> DetectorSettings:
    """The settings with weights that every process can open: tensors as data, checked and on storage.

    What comes from the web or is a pickle is kept below `<root>/weights/` as .safetensors, made once. UserError as
    for build, as far as it is about the weights.
    """
    source = weights.fetch(
        _source(settings), settings.weights_sha256, sample=SAMPLE, cache=storage.join(root, "weights"), key=KEY
    )
    return settings.model_copy(update={"weights": source.uri, "weights_sha256": source.sha256})


def architecture_digest(settings: DetectorSettings) -> str:
    """sha256 of what the network is made of: another when a YAML file, or one that it stands on, changes."""
    _check_model(settings.model)
    description = TORCHVISION if settings.model == TORCHVISION else detectron.load_config(settings.model).dump()
    return storage.sha256(description.encode())


def _check_model(model: str) -> None:
    if model not in NAMED_DETECTORS and not model.endswith((".yaml", ".yml")):
        raise UserError(
            f"`{detectron.KEY}`: {model} is no detector. Choose one of {', '.join(NAMED_DETECTORS)}, "
            "or give the URI of a Detectron2 .yaml."
        )


def _source(settings: DetectorSettings) -> str:
    """The URI of the weights, or `sample`."""
    if settings.weights != "zoo":
        return settings.weights
    if settings.model not in ZOO:
        raise UserError(
            f"`{KEY}`: zoo has none for {settings.model}, only for {', '.join(ZOO)}. Give the URI of its weights"
            + (", or say `sample`." if settings.model == "sample" else ".")
        )
    return ZOO[settings.model]


def _load_weights(model: torch.nn.Module, settings: DetectorSettings) -> None:
    state, _ = weights.load(_source(settings), settings.weights_sha256, sample=SAMPLE, key=KEY)
    expected = model.state_dict()
    # BatchNorm's counters and the anchors, which some files leave out, are never learnt.
    missing = [n for n in expected if n not in state and "num_batches_tracked" not in n and "cell_anchors" not in n]
    wrong = [name for name in state if name in expected and state[name].shape != expected[name].shape]
    if missing or wrong:
        raise UserError(
            f"`{KEY}`: {settings.weights} is no {settings.model}: {len(missing)} tensors are missing, "
            f"{len(wrong)} don't fit (the first: {[*missing, *wrong][0]}). Choose the `{detectron.KEY}` it is for."
        )
    model.load_state_dict({name: state[name].float() for name in state if name in expected}, strict=False)
