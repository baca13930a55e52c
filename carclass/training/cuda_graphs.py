"""A network's passes as CUDA graphs: the same kernels on the same numbers, started all at once.

A step of ResNet50 is a thousand kernels. Where a GPU has few photos at a time it is done with each before the program
has started the next one, and waits most of the time. With more photos it doesn't, and graphs would only hold memory
that the last, shorter step of an epoch needs too: 1.4 GB for 64 photos of 224 pixels in ResNet50 and bfloat16.
"""

import torch
from torch import Tensor, nn

from carclass.models.resnet import FoldedResNet, Precision, autocast
from carclass.training.dataloader import SMALL_STEP_PIXELS


class GraphedNetwork(nn.Module):
    """A network on a GPU whose training passes on batches of one shape are graphs; other batches go as always.

    Not for several passes to a step: each leaves its gradients where the one before left them. Nor for DDP, which sends
    gradients while others are still computed. What drops out lies behind the graphs, in the classifier.
    """

    def __init__(self, net: FoldedResNet, num_photos: int, size: int, precision: Precision) -> None:
        super().__init__()
        self.net = net
        self.shape = (num_photos, 3, size, size)
        device = net.conv1.weight.device
        photos = torch.zeros(self.shape, device=device).to(memory_format=torch.channels_last)
        # The graphs' own nodes live on the stream of their capture; that others wait for it there is meant.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        features = _GraphedFeatures(net)
        with autocast(precision, device, cached=False):  # weights are to be rounded in every replay
            torch.cuda.make_graphed_callables(features, (photos,), allow_unused_input=True)
        self.features = features.forward  # not as a module: its tensors are the network's

    def forward(self, photos: Tensor) -> Tensor:
        """(N,3,S,S) float normalised RGB → (N,num_classes) logits."""
        if photos.shape != self.shape or not torch.is_grad_enabled():
            return self.net(photos)
        return self.net.fc(self.features(photos))


class _GraphedFeatures(nn.Module):
    """A network without its classifier, as a module, which capturing asks for."""

    def __init__(self, net: FoldedResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, photos: Tensor) -> Tensor:
        return self.net.features(photos)


def capture_if_faster(net: FoldedResNet, num_photos: int, size: int, precision: Precision) -> nn.Module:
    """The network, with graphs where they make it faster. num_photos: of a step, computed in one pass."""
    if net.conv1.weight.device.type != "cuda" or num_photos * size**2 > SMALL_STEP_PIXELS:
        return net
    return GraphedNetwork(net, num_photos, size, precision)
