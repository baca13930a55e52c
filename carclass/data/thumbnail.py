"""Thumbnails of photos, for pages."""

from carclass.data import photo

QUALITY = 75


def thumbnail(data: bytes, side: int) -> bytes:
    """Return a photo as a JPEG file of at most `side` pixels. Raise PhotoError as `photo.decode` does."""
    pixels = photo.decode(data, min_side=1, max_pixels=photo.MAX_JPEG_SIDE**2, max_side=side)
    return photo.encode(pixels, quality=QUALITY)
