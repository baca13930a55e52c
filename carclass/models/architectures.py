"""Classifiers by the name of their architecture."""

from carclass.config.model_settings import TIMM, ModelSettings
from carclass.models import resnet, timm_classifier
from carclass.models.classifier import Classifier
from carclass.models.preprocessing import IMAGENET, Normalisation


def build(settings: ModelSettings, num_classes: int) -> Classifier:
    """Build the untrained network: float normalised RGB (N,3,S,S) → logits (N,num_classes).

    Raise UserError if there is none of this name, or none for photos of this size.
    """
    is_timm = settings.architecture.startswith(TIMM)
    return (timm_classifier if is_timm else resnet).build(settings, num_classes)


def normalisation(architecture: str) -> Normalisation:
    """Return the scale of a network's input, without building it."""
    return timm_classifier.normalisation(architecture) if architecture.startswith(TIMM) else IMAGENET


def pretrained_weights(architecture: str) -> str:
    """Return the name or URI of the weights that are published for an architecture. Raise UserError if none are."""
    if architecture.startswith(TIMM):
        return timm_classifier.weights_uri(architecture)
    return "imagenet" if architecture == "resnet50" else "sample"
