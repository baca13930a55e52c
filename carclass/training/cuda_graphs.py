"""CUDA graphs of a network's forward and backward pass: the same kernels on the same numbers, launched all at once.

A step of ResNet50 launches a thousand kernels. With small batches a GPU finishes each before the next is launched and
is idle most of the time. With larger ones it isn't, and graphs would only take memory that the last, smaller step of
an epoch needs too: 1.4 GB for 64 photos of 224 pixels in ResNet50 and bfloat16.
"""

import torch
from torch import Tensor, nn

from carclass.models.classifier import Classifier, autocast
from carclass.models.precision import Precision
from carclass.training.dataloader import SMALL_STEP_PIXELS


class GraphedNetwork(nn.Module):
    """A network on a GPU that trains on batches of one shape by graphs, and on other batches by eager execution.

    Not for gradient accumulation: each replay overwrites the gradients of the previous one. Nor for DDP, which sends
    gradients while others are still computed. Dropout is in the classifier, outside of the graphs.
    """

    def __init__(self, net: Classifier, num_photos: int, size: int, precision: Precision) -> None:
        super().__init__()
        self.net = net
        self.shape = (num_photos, 3, size, size)
        device = net.device
        photos = torch.zeros(self.shape, device=device).to(memory_format=torch.channels_last)
        # Gradients accumulate on the stream of the capture, and other streams wait for it, as intended.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        features = _GraphedFeatures(net)
        with autocast(precision, device, cached=False):  # round the weights in every replay
            torch.cuda.make_graphed_callables(features, (photos,), allow_unused_input=True)
        self.features = features.forward  # a function, not a submodule: its parameters are the network's

    def forward(self, photos: Tensor) -> Tensor:
        """Return (N,num_classes) logits of (N,3,S,S) float normalised RGB."""
        if photos.shape != self.shape or not torch.is_grad_enabled():
            return self.net(photos)
        return self.net.classify(self.features(photos))


class _GraphedFeatures(nn.Module):
    """A network without its classifier; capturing requires a module."""

    def __init__(self, net: Classifier) -> None:
        super().__init__()
        self.net = net

    def forward(self, photos: Tensor) -> Tensor:
        return self.net.features(photos)


def capture_if_faster(net: Classifier, num_photos: int, size: int, precision: Precision) -> nn.Module:
    """Return the network, with graphs if they are faster. num_photos: photos per step, in one pass."""
    if net.device.type != "cuda" or num_photos * size**2 > SMALL_STEP_PIXELS:
        return net
    return GraphedNetwork(net, num_photos, size, precision)
