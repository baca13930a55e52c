"""Sizes of the detector's input."""

from carclass.config.schema import DetectorSettings

MULTIPLE = 32
"""Height and width of a canvas are multiples of it in networks with a feature pyramid."""


def scaled_size(height: int, width: int, settings: DetectorSettings) -> tuple[int, int]:
    """Return height and width of the network's input for those of a photo."""
    scale = min(settings.short_side / min(height, width), settings.max_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def canvas(height: int, width: int, settings: DetectorSettings, multiple: int = MULTIPLE) -> tuple[int, int]:
    """Return the canvas of a photo in units of `multiple` pixels. Photos of one canvas can share a forward pass."""
    scaled = scaled_size(height, width, settings)
    return -(-scaled[0] // multiple), -(-scaled[1] // multiple)
