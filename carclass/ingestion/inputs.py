"""Inputs of an ingestion: all files of the source with their labels and subsets, before any photo is read."""

from collections.abc import Sequence
from typing import NamedTuple

from carclass.config.ingest_settings import IngestSettings
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.ingestion.labelling import label_photos, log_empty_folders, log_junk, read_labels
from carclass.ingestion.listing import list_photos
from carclass.ingestion.own_files import holds_own_files
from carclass.ingestion.split import find_shares
from carclass.sample import source as sample


class ListedInputs(NamedTuple):
    """Files of a source with their labels."""

    settings: IngestSettings  # with the URIs of the sample's files
    inventory: Inventory
    shares: dict[str, float]  # splits to hold out from train


def list_inputs(root: str, settings: IngestSettings, inventory: Inventory) -> ListedInputs:
    """Add the source's files with their labels to the inventory. The sample is drawn if it is missing.

    Raise UserError if photos or labels are unusable, as far as it can be known from their names.
    """
    if settings.photos == "sample":
        uris = sample.ensure_sample(root)
        settings = settings.model_copy(update={"photos": uris.photos, "labels": uris.labels})
    read_labels(settings, inventory)  # its errors come before the listing of millions
    empty: list[str] = []
    list_photos(settings.photos, inventory, root=root, empty=empty)
    label_photos(settings, inventory)
    if settings.labels is None:  # else folders are no classes
        log_empty_folders([folder for folder in empty if not holds_own_files(folder, settings.photos, root)])
    check_classes(inventory.classes(), settings, "labelled photos")
    log_junk(inventory)
    return ListedInputs(settings, inventory, find_shares(inventory, settings))


def check_classes(classes: Sequence[str], settings: IngestSettings, photos: str) -> None:
    """Raise UserError if the number of classes is not as set, or less than two. photos: in words."""
    source = settings.labels or settings.photos
    if settings.num_classes not in (None, len(classes)):
        raise UserError(
            f"`ingest.num_classes` is {settings.num_classes}, but the {photos} of {source} have {len(classes)} "
            "classes. Correct the number, or check the labels for misspelt or missing classes."
        )
    if len(classes) < 2:
        found = f"only one class ({classes[0]})" if classes else "no class"
        raise UserError(f"{source}: the {photos} have {found}; training needs at least two.")
