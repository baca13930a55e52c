"""Inputs of an ingestion: all files of the source with their labels and subsets, before any photo is read."""

from collections.abc import Sequence

from carclass.config.ingest_settings import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion.labelling import label_photos, read_labels
from carclass.ingestion.listing import list_photos
from carclass.ingestion.split import find_shares


def list_inputs(root: str, settings: IngestSettings, inventory: Inventory) -> dict[str, float]:
    """Add the source's files with their labels to the inventory, and return the splits to hold out with their shares.

    Raise UserError if photos or labels are unusable, as far as it can be known from their names.
    """
    read_labels(settings, inventory)  # its errors come before the listing of millions
    list_photos(settings.photos, inventory, root=root)
    label_photos(settings, inventory)
    check_classes(inventory.classes(), settings, "labelled photos")
    return find_shares(inventory, settings)


def check_classes(classes: Sequence[str], settings: IngestSettings, photos: str) -> None:
    """Raise UserError if the number of classes is not as set, or less than two. photos: in words."""
    source = settings.labels or settings.photos
    if settings.num_classes not in (None, len(classes)):
        raise UserError(
            f"`ingest.num_classes` is {settings.num_classes}, but the {photos} of {source} have {len(classes)} "
            "classes. Correct the number, or check the labels for misspelt or missing classes."
        )
    if len(classes) < 2:
        raise UserError(f"{source}: the {photos} have {len(classes)} class(es); training needs at least two.")
