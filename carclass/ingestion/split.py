"""Assignment of train photos to the val split, by seed and content."""

from carclass import storage


def split_of(subset: str, image_id: str, *, seed: int, val_fraction: float) -> str:
    """Return the split of a photo of a subset: train photos may be held out for val."""
    return "val" if subset == "train" and is_held_out(image_id, seed, val_fraction) else subset


def is_held_out(image_id: str, seed: int, fraction: float) -> bool:
    """Return True if a train photo belongs to the val split.

    This depends on seed and content only: copies share a split, and adding photos moves none. The expected fraction is
    the same for every class.
    """
    return int(storage.sha256(f"{seed}:{image_id}".encode())[:12], 16) / 16**12 < fraction
