"""A saved model that classifies photos."""

import copy
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from carclass.config.schema import ModelSettings
from carclass.models import preprocessing, resnet
from carclass.models.preprocessing import decode_photos, to_network_input
from carclass.runs.saved_model import read_model


class PredictPhotos:
    """A predictor process: rows with an image → key, label and probabilities."""

    def __init__(self, model_uri: str, *, use_gpu: bool) -> None:
        if not use_gpu:
            torch.set_num_threads(1)
        state, facts = read_model(model_uri)
        self.settings = ModelSettings.model_validate(facts["model"])
        self.precision = facts["precision"]
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.net = resnet.build(self.settings, len(facts["classes"]))
        self.net.load_state_dict(state)
        self.net.eval().to(self.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        column = pa.array(list(self.probabilities(batch["image"].to_pylist())), pa.list_(pa.float32()))
        return pa.table({"key": batch["key"], "label": batch["label"], "probabilities": column})

    @torch.inference_mode()
    def probabilities(self, images: Sequence[bytes], batch_size: int = 0) -> np.ndarray:
        """float32 (N,C) of N encoded photos.

        batch_size: fewer photos than that are filled up with black ones, so that the network's arithmetic, which
        depends on the size of its input, is always the same.
        """
        pixels = decode_photos(images, self.settings.image_size)
        missing = max(0, batch_size - len(pixels))
        photos = to_network_input(np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0))), self.device)
        with resnet.autocast(self.precision, self.device):
            logits = self.net(photos)
        return logits.float().softmax(1).cpu().numpy()[: len(pixels)]


class PhotoClassifier(nn.Module):
    """`model.normalise` and the network in one: uint8 (N,3,S,S) RGB → float32 (N,C) logits.

    net: of model.build; it stays as it is, and its tensors are copied.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        # Buffers, where model.normalise has constants: an exported program is then moved to a GPU as a whole.
        self.register_buffer("mean", torch.tensor(preprocessing.MEAN).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.STD).view(3, 1, 1) * 255)
        # Plain strides: from channels_last the exporter would make an ONNX graph of more nodes.
        self.net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        # torchvision's own forward pass: exporters fold its BatchNorms, ours would be folded again in every pass.
        for module in self.net.modules():
            if isinstance(module, resnet.FoldedBottleneck):
                module.__class__ = Bottleneck
        self.net.__class__ = ResNet
        self.eval()

    def forward(self, photos: Tensor) -> Tensor:
        """The logits."""
        return self.net((photos.float() - self.mean) / self.std)
