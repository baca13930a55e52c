"""Assignment of train photos to the val split, by seed and content."""

from carclass import storage


def is_held_out(image_id: str, seed: int, fraction: float) -> bool:
    """Return True if a train photo belongs to the val split.

    This depends on seed and content only: copies share a split, and adding photos moves none. The expected fraction is
    the same for every class.
    """
    return int(storage.sha256(f"{seed}:{image_id}".encode())[:12], 16) / 16**12 < fraction
