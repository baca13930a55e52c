"""Settings of the classifier network."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from carclass.config.effects import RESNETS
from carclass.config.section import Section

TIMM = "timm:"
"""Start of the names of timm's."""


def _check_architecture(value: Any) -> Any:
    if isinstance(value, str) and not (value in RESNETS or value.removeprefix(TIMM) not in ("", value)):
        raise ValueError(f"must be {', '.join(map(repr, RESNETS))} or '{TIMM}NAME'")
    return value


class ModelSettings(Section):
    """Classifier network."""

    architecture: Annotated[str, BeforeValidator(_check_architecture)] = "resnet50"
    """`resnet50`, or `timm:NAME` for any network of timm, such as `timm:convnext_tiny`; `resnet26-narrow` has two
    blocks per layer and a quarter of the width: for the sample and for tests."""
    stride_in_1x1: bool = False
    """Stride in a block's 1x1 convolution: true for Keras' and MSRA's weights, false for torchvision's."""
    image_size: int = Field(224, ge=32)
    """Side in pixels of the square input."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout before the classifier."""
