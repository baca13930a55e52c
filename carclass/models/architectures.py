"""Classifiers by the name of their architecture."""

from carclass.config.schema import ModelSettings
from carclass.models import resnet
from carclass.models.classifier import Classifier
from carclass.models.preprocessing import IMAGENET, Normalisation


def build(settings: ModelSettings, num_classes: int) -> Classifier:
    """Build the untrained network: float normalised RGB (N,3,S,S) → logits (N,num_classes)."""
    return resnet.build(settings, num_classes)


def normalisation(settings: ModelSettings) -> Normalisation:
    """Return the scale of a network's input, without building it."""
    return IMAGENET
