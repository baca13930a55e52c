"""Datasets without pixels, in which photos are held out from train."""

from pathlib import Path
from typing import NamedTuple

from carclass import storage
from carclass.data import publishing
from carclass.data.dataset import Dataset
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed
from carclass.ingestion import split

SHARES = {"test": 0.2, "val": 0.2}


class Photo(NamedTuple):
    """A photo of a source without pixels, whose content is its key by default."""

    key: str
    label: str
    subset: str = "train"
    content: str = ""
    group: str | None = None


def publish(
    root: Path, photos: list[Photo], shares: dict[str, float] = SHARES, published: Dataset | None = None, seed: int = 1
) -> Dataset:
    """Publish a dataset of these photos, or its next version."""
    with Inventory() as inventory:
        add_photos(inventory, photos)
        inventory.set_held_out(shares)
        draft = Draft(str(root), {"val_fraction": 0.2}, inventory, published)
        draft.begin()
        draft.reconcile()
        draft.write_missing(lambda: write_pending(draft, photos))
        split.hold_out(draft, shares, seed)
        return draft.publish(
            draft.complete(sorted({photo.label for photo in photos}), {"kind": "photos", "held_out": shares})
        )


def add_photos(inventory: Inventory, photos: list[Photo]) -> None:
    inventory.add_inputs(Listed(photo.key) for photo in photos)
    rows = [(photo.label, photo.subset, photo.group, photo.key) for photo in photos]
    inventory.insert("UPDATE input SET label = ?, subset = ?, photo_group = ? WHERE key = ?", rows)


def write_pending(draft: Draft, photos: list[Photo]) -> None:
    contents = {photo.key: photo.content or photo.key for photo in photos}
    for table in draft.inventory.pending(16):
        rows = [
            {**row, "image_id": storage.sha256(contents[row["key"]].encode()), "split": row["subset"], "image": b""}
            for row in table.to_pylist()
        ]
        publishing.write_rows(draft.uri, "parts", [{"width": 1, "height": 1, **row} for row in rows], draft.settings)


def splits(published: Dataset) -> dict[str, str]:
    rows = published.read(["key", "split"]).to_pylist()
    return {row["key"]: row["split"] for row in rows}
