"""Files of rows and quarantined photos, written by the same functions as in jobs."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from carclass.data import dataset, publishing
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from tests.helpers import inventories

SETTINGS = {"photos": "s3://bucket/photos", "seed": 1}


def row(key: str, **columns: Any) -> dict[str, Any]:
    default = {"image_id": key * 2, "key": key, "label": "a", "split": "train", "width": 1, "height": 1, "image": b"x"}
    return default | columns


def quarantined(key: str, reason: str = "leakage") -> dict[str, Any]:
    return {"key": key, "image_id": None, "reason": reason, "detail": "", "attempts": 0}


def write_rows(uri: str, keys: Sequence[str], settings: dict[str, Any] = SETTINGS, **columns: Any) -> None:
    rows = pa.Table.from_pylist([row(key, **columns) for key in keys], dataset.ROW)
    publishing.write_part(uri, "parts", rows, settings)


def write_quarantine(uri: str, keys: Sequence[str], settings: dict[str, Any] = SETTINGS) -> None:
    rows = pa.Table.from_pylist([quarantined(key) for key in keys], dataset.QUARANTINE)
    publishing.write_part(uri, "quarantine", rows, settings)


def publish(uri: str, inputs: Sequence[str], **overrides: Any) -> dataset.Dataset:
    args = {"settings": SETTINGS, "classes": ["a", "b"], "facts": {"kind": "photos"}} | overrides
    return publishing.publish_manifest(inventories.complete_dataset(uri, inputs, **args))


def finished_keys(uri: str) -> set[str]:
    """Return the keys that a job with SETTINGS has written."""
    with Inventory() as inventory:
        Draft(uri, SETTINGS, inventory).sync()
        return {key for (key,) in inventory.query("SELECT key FROM written")}
