"""Classification of photos by a saved model."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from carclass.cluster.device import choose_device
from carclass.data.photo import decode_photos
from carclass.errors import UserError
from carclass.models import classifier
from carclass.models.classifier import Classifier
from carclass.models.gpu_memory import report_out_of_memory
from carclass.models.precision import Precision
from carclass.models.preprocessing import to_network_input
from carclass.runs.saved_model import load_network


class Predictor:
    """A saved model on a device: encoded photos → class probabilities."""

    def __init__(self, model_uri: str, *, use_gpu: bool) -> None:
        self.model_uri = model_uri
        self.device = choose_device(use_gpu)
        self.net, facts = load_network(model_uri)
        self.net.to(self.device)
        self.image_size: int = facts["model"]["image_size"]
        self.precision: Precision = facts["precision"]
        self.classes: list[str] = facts["classes"]
        self.sha256: str = facts["sha256"]

    @report_out_of_memory("Lower `batch_size` of `evaluate` or `predict`.")
    @torch.inference_mode()
    def probabilities(self, images: Sequence[bytes], batch_size: int = 0) -> np.ndarray:
        """Return float32 (N,C) class probabilities of N encoded photos. Raise UserError if a logit is not finite.

        batch_size: fewer photos are padded to it with black ones, as the network's rounding depends on the size of
        its input.
        """
        pixels = decode_photos(images, self.image_size)
        padding = max(0, batch_size - len(pixels))
        padded = np.pad(pixels, ((0, padding), (0, 0), (0, 0), (0, 0)))
        photos = to_network_input(padded, self.device, self.net.normalisation)
        with classifier.autocast(self.precision, self.device):
            logits = self.net(photos).float()
        if not logits[: len(pixels)].isfinite().all():
            raise UserError(
                f"the network at {self.model_uri}.safetensors has outputs that are not finite on some photos, so no "
                "class is known. Its training diverged: use another epoch or stage, or train it again."
            )
        return logits.softmax(1).cpu().numpy()[: len(pixels)]


class PhotoClassifier(nn.Module):
    """Normalisation and network in one module: uint8 (N,3,S,S) RGB → float32 (N,C) logits.

    net: it is copied.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: Classifier) -> None:
        super().__init__()
        # Buffers, where preprocessing.normalise has constants: an exported program is moved to a GPU as a whole.
        for name, values in net.normalisation._asdict().items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255)
        self.names = {name: net.published_name(name) for name in net.state_dict()}
        # Contiguous format: from channels_last the exporter would make an ONNX graph of more nodes.
        self.net = copy.deepcopy(net)
        self.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.net.prepare_export()
        self.eval()

    def forward(self, photos: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.net((photos.float() - self.mean) / self.std)
        return logits
