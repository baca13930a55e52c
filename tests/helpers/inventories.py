"""Inventorys for tests that come with a handful of keys."""

from collections.abc import Iterable, Sequence
from typing import Any

from carclass.data import dataset, publishing
from carclass.data.inventory import Inventory


def draft(
    uri: str, inputs: Iterable[str], *, settings: dict[str, Any], classes: Sequence[str], facts: dict[str, Any]
) -> dataset.Dataset:
    """The draft of a dataset into which these keys came."""
    with Inventory() as inventory:
        inventory.add_inputs(inputs)
        return publishing.complete_dataset(uri, inventory, settings=settings, classes=classes, facts=facts)
