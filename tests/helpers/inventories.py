"""Datasets from a few keys, for tests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from carclass.data import dataset
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory, Listed

T = TypeVar("T")


def add_keys(inventory: Inventory, keys: Iterable[str]) -> None:
    """Add files of these keys."""
    inventory.add_inputs(map(Listed, keys))


def complete_dataset(
    uri: str, inputs: Iterable[str], *, settings: dict[str, Any], classes: Sequence[str], facts: dict[str, Any]
) -> dataset.Dataset:
    """Return the complete dataset of these inputs, whose parts exist already."""
    with Inventory() as inventory:
        add_keys(inventory, inputs)
        return Draft(uri, settings, inventory).complete(classes, facts)


def run_all(_: str, keys: Sequence[str], work: Callable[[list[int]], Iterable[T]]) -> Iterator[T]:
    """Process a batch as CrashGuard.run does, without Ray."""
    yield from work(list(range(len(keys))))
